"""Checkpoints without a model: what stands for the engine, and saves of several ranks in one
process."""

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import StorageError
from cluster.storage import Artifact, Staging, Store
from pipelines.training import ledger
from pipelines.training.checkpoint import (
    CheckpointWriter,
    Lineage,
    Progress,
    Save,
    newest,
    retire,
)
from pipelines.training.engine import World
from pipelines.training.sampler import Sample
from tests import fakes

NAME, RUN, RANKS = "tiny", "tiny-0123456789", 3


class Weights:
    """Stands where the engine would: its state is its step, on every rank its own."""

    config = SimpleNamespace(train=SimpleNamespace(zero_stage=2))
    precision = "fp32"

    def __init__(self, rank: int, step: int, size: int = 64) -> None:
        self._rank, self._step, self._size = rank, step, size

    def snapshot(self) -> dict[str, Any]:
        weights = torch.full((self._size,), float(100 * self._rank + self._step))
        return {f"rank_{self._rank}.pt": {"weights": weights, "step": self._step}}


def lineage(store: Store, keep: int = 2, keep_best: int = 0) -> Lineage:
    corpus = store.latest("corpus", NAME) or fakes.commit(store, name=NAME)
    return Lineage(NAME, RUN, "mark", {"seed": 1}, corpus, keep, keep_best)


def progress(step: int) -> Progress:
    history = [{"step": float(n), "loss": 5.0 - n / 10} for n in range(1, step + 1)]
    led = tuple(ledger.Stretch(n, n + 1, RANKS, "s") for n in range(step))
    return Progress(step, float(step), history, led)


def part(
    staging: Staging, rank: int, step: int, line: Lineage | None = None, ranks: int = RANKS
) -> Save:
    """What one rank has to write for a checkpoint."""
    return Save(
        staging,
        line or lineage(staging.store),
        rank,
        ranks,
        Weights(rank, step).snapshot(),
        {step: [Sample(0, ranks * step + rank)]},
        progress(step),
        {"zero_stage": 2},
        complete=False,
    )


def save(store: Store, step: int, line: Lineage | None = None) -> Artifact:
    """What the writer threads of all ranks do for one checkpoint, one after another."""
    line = line or lineage(store)
    staging = store.stage("checkpoint", NAME, run=line.run)
    parts = [part(staging, rank, step, line) for rank in range(RANKS)]
    for one in reversed(parts):
        one.write()
    made = parts[0].commit(timeout=1)
    retire(store, line)
    return made


def check(checkpoint: Artifact) -> int:
    """Step of a checkpoint, once every file of it was found to be that step's and its rank's."""
    step = int(checkpoint.manifest.detail["step"])
    with checkpoint.local("state/") as folder:
        ranks = range(checkpoint.manifest.detail["world_size"])
        names = sorted(path.name for path in Path(folder).iterdir())
        assert names == [f"rank_{rank}.pt" for rank in ranks]
        for rank in ranks:
            expected = Weights(rank, step).snapshot()[f"rank_{rank}.pt"]
            found = torch.load(folder / f"rank_{rank}.pt", weights_only=True)
            assert torch.equal(found["weights"], expected["weights"]) and found["step"] == step
    assert len(checkpoint.read_json("history.json")) == step
    return step


# --- what ranks of their own do (`tests.gloo`)


def _writer(world: World, root: str, timeout: float = 600.0) -> CheckpointWriter:
    store = Store(root)
    if world.first:
        lineage(store)
    dist.barrier()
    writer = CheckpointWriter(store, lineage(store), world, timeout)
    writer.begin(Progress(0, 0.0, []))
    return writer


def _save(writer: CheckpointWriter, world: World, step: int, size: int = 64) -> None:
    weights: Any = Weights(world.rank, step, size)
    writer.save(weights, progress(step), complete=False)


def _refused(writer: CheckpointWriter, world: World, step: int, size: int = 64) -> list[str]:
    """What a save ends with, at the latest when it is waited for."""
    try:
        _save(writer, world, step, size)
        writer.wait()
    except StorageError as error:
        return [str(error)]
    return []


def on_a_full_disk(world: World, root: str) -> list[str]:
    """The second checkpoint does not fit; what is left is whole, and lets the next one begin."""
    writer, store = _writer(world, root), Store(root)
    megabyte = 2**18
    assert not _refused(writer, world, 1, megabyte)
    errors = _refused(writer, world, 2, 2 * megabyte)
    dist.barrier()
    _still_whole(world, store, 1)
    assert not _refused(_writer(world, root), world, 3, megabyte)
    _still_whole(world, store, 3)
    return errors


def on_a_read_only_disk(world: World, root: str) -> list[str]:
    writer, store = _writer(world, root), Store(root)
    assert not _refused(writer, world, 1)
    _remount(world, root, "ro")
    errors = _refused(writer, world, 2)
    dist.barrier()
    _still_whole(world, store, 1)
    _remount(world, root, "rw")
    assert not _refused(_writer(world, root), world, 3)
    _still_whole(world, store, 3)
    return errors


def _remount(world: World, root: str, mode: str) -> None:
    if world.first:
        subprocess.run(["mount", "-o", f"remount,{mode}", root], check=True)
    dist.barrier()


def _still_whole(world: World, store: Store, step: int) -> None:
    if world.first:
        found = newest(store, NAME, RUN)
        assert found is not None and found.manifest.detail["step"] == step
    dist.barrier()


def with_one_rank_failing(world: World, root: str) -> str:
    """Rank 1 cannot write its second checkpoint; what each rank is told."""
    writer = _writer(world, root)
    assert not _refused(writer, world, 1)
    if world.rank == 1:

        def broken(*_: Any) -> None:
            raise StorageError("cannot write: cable pulled")

        Store.write = broken  # type: ignore[method-assign]
    _save(writer, world, 2)
    (said,) = _refused(writer, world, 3)
    return said


def to_a_slow_store(world: World, root: str) -> dict[str, bool]:
    """Training goes on while a save is held up, until the next one is due; then it waits."""
    held, usual = threading.Event(), Store.write

    def slow(self: Store, path: str, produce: Any) -> Any:
        if world.first and path.endswith(".pt"):
            held.wait(60)
        return usual(self, path, produce)

    Store.write = slow  # type: ignore[method-assign]
    patient = _writer(world, root)
    _save(patient, world, 1)
    went_on = Store(root).latest("checkpoint", NAME) is None
    dist.barrier()
    threading.Timer(1.0, held.set).start()
    waited = not _refused(patient, world, 2)
    dist.barrier()
    held.clear()
    hasty = _writer(world, root, timeout=0.5)
    _save(hasty, world, 3)
    errors = _refused(hasty, world, 4)
    held.set()
    _still_whole(world, Store(root), 2)
    late = bool(errors) and "did not take the checkpoint before this one in 0" in errors[0]
    return {"went on": went_on, "error": late, "waited": waited}
