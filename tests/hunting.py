"""Training on a real Ray, and a hunter that kills its workers."""

import hashlib
import random
import threading
import time
from typing import Any

import psutil
import torch

from cluster import loading
from cluster.config import RunConfig
from cluster.journal import Journal
from cluster.storage import Artifact, Store
from pipelines.data.corpus import Corpus
from pipelines.training import ledger
from pipelines.training.checkpoint import load_weights, read_history

TINY = [
    "data.sequence_length=16",
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=2",
    "model.intermediate_size=64",
    "train.steps=40",
    "train.global_batch=8",
    "train.warmup_steps=4",
    "train.checkpoint_every=5",
]
PATIENCE_SECONDS = 240


def tiny(root: object, *overrides: str) -> RunConfig:
    return loading.load("gpt-demo", [f"storage.root={root}", *TINY, *overrides])


def weights_digest(checkpoint: Artifact) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_weights(checkpoint).items()):
        digest.update(name.encode() + tensor.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def losses(checkpoint: Artifact) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_history(checkpoint)]


class Hunter(threading.Thread):
    """kill -9 of a random training worker, each time once the run has committed something new.

    `with Hunter(...)` around the run; the exit waits for it and raises what it ran into.

    Args:
        after: the first kill comes when a step beyond this one is committed.
    """

    def __init__(
        self, store: Store, name: str, kills: int, seed: int = 0, *, after: int = 0
    ) -> None:
        super().__init__(daemon=True)
        self._store, self._name, self._rng = store, name, random.Random(seed)
        self.wanted, self.killed = kills, list[dict[str, Any]]()
        self._after = after
        self._over, self._error = threading.Event(), ""

    def __enter__(self) -> "Hunter":
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self.join()
        assert len(self.killed) == self.wanted, f"{len(self.killed)} kills: {self._error}"

    def run(self) -> None:
        step = self._after
        for _ in range(self.wanted):
            found = self._committed_after(step)
            if found is None:
                return
            # Anywhere in the steps after a commit, also before it is through with its remains.
            self._over.wait(self._rng.random() * 0.2)
            workers = training_workers()
            victim = self._rng.choice(workers) if workers else None
            if victim is None or not victim.is_running():
                self._error = f"no worker lived after step {found}"
                return
            victim.kill()
            self.killed.append({"pid": victim.pid, "after_step": found})
            step = self._committed()

    def _committed(self) -> int:
        newest = self._store.latest("checkpoint", self._name)
        return int(newest.manifest.detail["step"]) if newest else 0

    def _committed_after(self, step: int) -> int | None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (found := self._committed()) <= step:
            if self._over.is_set() or time.monotonic() > deadline:
                self._error = f"nothing was committed after step {step}"
                return None
            time.sleep(0.02)
        return found


def training_workers() -> list[psutil.Process]:
    """The training workers among the processes of this session's Ray."""
    import ray

    raylet = next(
        info[0].process.pid
        for kind, info in ray._private.worker._global_node.all_processes.items()
        if kind == "raylet"
    )
    return [
        process
        for process in psutil.Process(raylet).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def check_as_undisturbed(
    finished: Artifact, undisturbed: Artifact, corpus: Artifact, hunter: Hunter
) -> None:
    """Bit-equal weights and losses, each sample once, and a journal that tells each kill once."""
    assert finished.manifest.complete and undisturbed.manifest.complete
    assert losses(finished) == losses(undisturbed)
    assert weights_digest(finished) == weights_digest(undisturbed)
    samples = Corpus(corpus).row_groups("train").starts[-1]
    batch = finished.manifest.config["train"]["global_batch"]
    assert ledger.faults(finished, samples, batch) == []

    run = finished.manifest.detail["run"]
    events = list(Journal(finished.store, run).events())
    lost = [event for event in events if event.name == "worker_lost"]
    launches = [event.fields["step"] for event in events if event.name == "launch"]
    assert len(lost) == hunter.wanted, [event.line() for event in events]
    assert len(launches) == hunter.wanted + 1 and launches[0] == 0
    # Each launch went on from what was committed when its predecessor was killed.
    for step, kill in zip(launches[1:], hunter.killed, strict=True):
        assert kill["after_step"] <= step < finished.manifest.detail["step"]
