"""What every training worker runs. Plain data in, plain data out; heavy imports inside."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import loading
from cluster.config import RunConfig
from cluster.journal import Journal
from cluster.storage import Artifact, Store
from cluster.telemetry import Row
from pipelines import families
from pipelines.data.corpus import Corpus
from pipelines.families.base import Batch, Family
from pipelines.training import elastic
from pipelines.training.agreement import agreed
from pipelines.training.checkpoint import (
    CheckpointWriter,
    Lineage,
    Progress,
    check_parent,
    newest,
    progress_of,
)
from pipelines.training.engine import Engine, World
from pipelines.training.sampler import GlobalOrder, RowReader, Sample, prefetched, share
from pipelines.training.schedule import learning_rate
from pipelines.training.zero import micro_batch

if TYPE_CHECKING:
    import torch

SEND_EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class TrainJob:
    """One run, as it travels to the workers."""

    config: dict[str, Any]
    root: str
    corpus: tuple[str, int]
    """Name and version."""
    run: str
    """Names the run over all its launches; its checkpoints carry it."""
    fingerprint: str
    board: Any = None
    """Actor handle of `telemetry.Records`; None keeps the figures to the worker."""


def train(job: TrainJob) -> dict[str, Any]:
    """Train from the newest checkpoint of the run to its last step.

    Returns:
        `{"step", "checkpoint"}`: where it ended.
    """
    config = loading.validate(dict(job.config))
    store = Store(job.root)
    corpus = Corpus(store.artifact("corpus", *job.corpus))
    family = families.load(config.family)
    world = _join_world(config)
    engine = Engine(config, family, corpus.facts, world)
    lineage = Lineage(
        config.name,
        job.run,
        job.fingerprint,
        job.config,
        corpus.artifact,
        config.train.keep_checkpoints,
        config.train.keep_best,
    )
    writer = CheckpointWriter(store, lineage, world, config.train.save_timeout_seconds)
    start = _restore(store, lineage, engine)
    writer.begin(start)
    if world.first:
        Journal(store, job.run).write("launch", step=start.step, workers=world.size)
    batches = BatchSource(config, family, corpus, world)
    try:
        end = _run_steps(config, engine, batches, writer, start, _Board(job.board, world))
        writer.wait()
    finally:
        engine.close()
    return {"step": end.step, "seconds": end.seconds}


def _run_steps(
    config: RunConfig,
    engine: Engine,
    batches: BatchSource,
    writer: CheckpointWriter,
    start: Progress,
    board: _Board,
) -> Progress:
    """The loop itself: take a batch, step, record, now and then save."""
    train, world = config.train, engine.world
    history, seconds = list(start.history), start.seconds
    mark = time.monotonic()
    for step, micro_batches in batches.between(start.step, train.steps):
        waited = time.monotonic() - mark
        rate = learning_rate(train, step)
        seed = dropout_seed(config.seed, step, world.rank)
        outcome = engine.step(micro_batches, learning_rate=rate, seed=seed)
        now = time.monotonic()
        row = {
            "step": float(step + 1),
            "loss": outcome.loss,
            "learning_rate": rate,
            "gradient_norm": outcome.gradient_norm,
            "predictions_per_second": outcome.predictions / (now - mark),
            "data_wait": waited / (now - mark),
        }
        seconds, mark = seconds + now - mark, now
        history.append(row)
        board.put(row)
        writer.record(step + 1, batches.taken(step))
        last = step + 1 == train.steps
        if last or (step + 1) % train.checkpoint_every == 0:
            engine.average_buffers()
            writer.save(engine, Progress(step + 1, seconds, history), complete=last)
            mark = time.monotonic()
    board.flush()
    return Progress(max(start.step, train.steps), seconds, history)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Keyed, not carried: a resumed step draws what the undisturbed one drew."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class BatchSource:
    """This rank's micro-batches, by step."""

    config: RunConfig
    family: Family
    corpus: Corpus
    world: World

    def __post_init__(self) -> None:
        train = self.config.train
        groups = self.corpus.row_groups("train")
        self.order = GlobalOrder(groups.sizes, self.config.seed, train.shuffle_window)
        self._reader = RowReader(groups, keep=2 * train.shuffle_window)
        self._taken: dict[int, list[Sample]] = {}

    def between(self, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        for step, batches in zip(range(first, last), prefetched(self.at, first, last), strict=True):
            yield step, [_to(batch, self.world.device) for batch in batches]

    def at(self, step: int) -> list[Batch]:
        """Micro-batches of this rank at a step, on the host."""
        train = self.config.train
        positions = share(step, train.global_batch, *self._place)
        samples = self._taken[step] = [self.order.at(position) for position in positions]
        rows = [self._example(sample) for sample in samples]
        size = micro_batch(train, self.world.size)
        return [
            self.family.collate(rows[begin : begin + size]) for begin in range(0, len(rows), size)
        ]

    def taken(self, step: int) -> list[Sample]:
        """What this rank's batch of a step was made from; to be asked for once."""
        return self._taken.pop(step)

    def _example(self, sample: Sample) -> Any:
        rng = np.random.default_rng([self.config.seed, sample.epoch, sample.id])
        row = self._reader.row(sample.id)
        return self.family.example(self.config, self.corpus.facts, row, rng)

    @property
    def _place(self) -> tuple[int, int]:
        return self.world.rank, self.world.size


class _Board:
    """Rank 0's rows on their way to the driver, a few at a time."""

    def __init__(self, actor: Any, world: World) -> None:
        self._actor = actor if world.first else None
        self._rows: list[Row] = []
        self._sent = time.monotonic()

    def put(self, row: Row) -> None:
        self._rows.append(row)
        if time.monotonic() - self._sent >= SEND_EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._actor is not None and self._rows:
            self._actor.put.remote(self._rows)
        self._rows, self._sent = [], time.monotonic()


def _join_world(config: RunConfig) -> World:
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(config.train.threads_per_worker)
    # Adam's second moments shrink into denormal numbers, which CPUs compute many times slower.
    torch.set_flush_denormal(True)
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def _restore(store: Store, lineage: Lineage, engine: Engine) -> Progress:
    """Rank 0 chooses the newest good checkpoint, all ranks load it."""
    import torch.distributed as dist

    chosen: list[int | None] = [None]
    with agreed(engine.world):
        if engine.world.first:
            found = newest(store, lineage.name, lineage.run)
            if found is not None:
                check_parent(found, lineage.parent)
                chosen = [found.version]
    dist.broadcast_object_list(chosen, src=0, device=engine.world.device)
    if chosen[0] is None:
        return Progress(0, 0.0, [])
    artifact: Artifact = store.artifact("checkpoint", lineage.name, chosen[0])
    elastic.restore(engine, artifact)
    return progress_of(artifact)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
