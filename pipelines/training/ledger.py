"""Which samples a run has trained on, step by step: proof that none was lost or seen twice.

    <root>/runs/<run>/ledger/<first>-<last>-<save>-<rank>.npz     arrays `step`, `epoch`, `sample`

Each rank writes what it took since the last checkpoint beside the next one. A checkpoint names the
stretches of steps that led to it (`ledger.json`), and only those count: what was written for a save
that never committed is named by no checkpoint.
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pyarrow import fs

from cluster.errors import ArtifactError
from cluster.storage import Artifact, Store
from pipelines.training.sampler import Sample

FILE = "ledger.json"


@dataclass(frozen=True)
class Stretch:
    """Steps `first + 1` to `last` as one launch took them."""

    first: int
    last: int
    ranks: int
    save: str
    """Tells it from the same steps taken by another launch."""


Taken = dict[int, Sequence[Sample]]
"""Step, counted from 1, to the samples of one rank."""


def write(store: Store, run: str, stretch: Stretch, rank: int, taken: Taken) -> None:
    """
    Raises:
        StorageError: if it cannot be written.
    """
    rows = [
        (step, sample.epoch, sample.id) for step, samples in taken.items() for sample in samples
    ]
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 3).T
    buffer = io.BytesIO()
    np.savez_compressed(buffer, step=columns[0], epoch=columns[1], sample=columns[2])
    store.write(_path(store, run, stretch, rank), lambda out: out.write(buffer.getvalue()))


def stretches(checkpoint: Artifact) -> tuple[Stretch, ...]:
    """What led to a checkpoint, oldest first; nothing for one from before there were ledgers."""
    if not any(entry.path == FILE for entry in checkpoint.manifest.files):
        return ()
    return tuple(Stretch(**tree) for tree in checkpoint.read_json(FILE))


def begun(store: Store, run: str) -> bool:
    """Whether the run has ever begun to save."""
    selector = fs.FileSelector(_folder(store, run), allow_not_found=True)
    return bool(store.filesystem.get_file_info(selector))


def encode(led: Iterable[Stretch]) -> bytes:
    return json.dumps([asdict(stretch) for stretch in led]).encode()


def read(checkpoint: Artifact) -> dict[str, np.ndarray]:
    """Every sample that a checkpoint's weights have seen: `step`, `epoch`, `sample`, `rank`.

    Raises:
        ArtifactError: if a file of the ledger is missing.
    """
    store, run = checkpoint.store, str(checkpoint.manifest.detail["run"])
    parts: list[dict[str, np.ndarray]] = []
    for stretch in stretches(checkpoint):
        for rank in range(stretch.ranks):
            path = _path(store, run, stretch, rank)
            raw = store.read(path)
            if raw is None:
                raise ArtifactError(f"the ledger of {run} lacks {path}")
            with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
                part: dict[str, Any] = {key: arrays[key] for key in ("step", "epoch", "sample")}
            parts.append({**part, "rank": np.full(len(part["step"]), rank)})
    keys = ("step", "epoch", "sample", "rank")
    empty = [np.empty(0, dtype=np.int64)]
    return {key: np.concatenate([part[key] for part in parts] or empty) for key in keys}


def faults(checkpoint: Artifact, samples: int, global_batch: int) -> list[str]:
    """What is wrong with the ledger of a checkpoint; empty if each sample of each epoch was taken
    once, and each step took one global batch.

    Args:
        samples: in one epoch.
    """
    led, step = read(checkpoint), int(checkpoint.manifest.detail["step"])
    found: list[str] = []
    numbers, sizes = np.unique(led["step"], return_counts=True)
    if list(numbers) != list(range(1, step + 1)):
        found.append(f"steps {numbers.tolist()} instead of 1 to {step}")
    if set(sizes.tolist()) - {global_batch}:
        found.append(f"steps of {sorted(set(sizes.tolist()))} samples instead of {global_batch}")
    left = step * global_batch
    for epoch in range(-(-left // samples)):
        ids, times = np.unique(led["sample"][led["epoch"] == epoch], return_counts=True)
        expected = min(samples, left - epoch * samples)
        if (times > 1).any():
            found.append(f"epoch {epoch}: samples {ids[times > 1].tolist()} more than once")
        if len(ids) != expected:
            found.append(f"epoch {epoch}: {len(ids)} samples instead of {expected}")
    return found


def _path(store: Store, run: str, stretch: Stretch, rank: int) -> str:
    name = f"{stretch.first:08d}-{stretch.last:08d}-{stretch.save}-{rank:05d}.npz"
    return f"{_folder(store, run)}/{name}"


def _folder(store: Store, run: str) -> str:
    return f"{store.base}/runs/{run}/ledger"
