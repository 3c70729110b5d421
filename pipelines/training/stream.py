"""`train.input=stream`: Ray Data prepares rows on free CPUs while the workers train on others.

The position of a stream is the set of partitions that are done: a checkpoint's ledger names every
row that its weights have seen. What a run continues with is every partition that was not seen to
its end, from its beginning, so that each row of an epoch is trained on *at least once*; rows of the
partitions that were open when it stopped are seen again.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import loading, progress
from cluster.config import RunConfig, TextData
from cluster.errors import CapacityError, SourceError, TrainingError
from cluster.session import Session
from cluster.storage import Store
from pipelines.data import contamination, documents, live, sources
from pipelines.data.corpus import Corpus
from pipelines.families.base import Batch, Family
from pipelines.training import checkpoint, ledger
from pipelines.training.engine import World
from pipelines.training.sampler import Sample, prefetched
from pipelines.training.zero import micro_batch

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.training.loop import TrainJob

NAME = "train"
"""Of the dataset, as workers ask for it."""
MARGIN = 1.5
"""Rows that are lined up for each that is needed: how many a partition gives is an estimate."""


def check(joined: Session, config: RunConfig) -> None:
    """
    Raises:
        CapacityError: if training would take every CPU, and none were left to prepare rows.
    """
    train = config.train
    taken = train.world_sizes[0] * train.threads_per_worker
    if joined.cpus <= taken:
        raise CapacityError(
            f"train.input stream prepares rows on CPUs beside the {taken} of the workers, and the "
            f"cluster has {joined.cpus}: take fewer train.workers, or add a node"
        )


@dataclass(frozen=True)
class Standing:
    """How far a run's stream is."""

    done: frozenset[live.Piece]
    step: int

    def pending(self, weights: Sequence[float], seed: int) -> Iterator[live.Piece]:
        """What is left, in order, without an end."""
        first = min((piece.epoch for piece in self.done), default=0)
        return (p for p in live.epochs(weights, seed, first) if p not in self.done)


def standing(store: Store, name: str, run: str) -> Standing:
    """Of the newest checkpoint of a run."""
    found = checkpoint.newest(store, name, run)
    if found is None:
        return Standing(frozenset(), 0)
    led = ledger.read(found)
    done = live.finished(led["epoch"], led["sample"]) if len(led["epoch"]) else set()
    return Standing(frozenset(done), int(found.manifest.detail["step"]))


def say(store: Store, job: TrainJob, config: RunConfig) -> None:
    """How the stream begins, for a person."""
    at = standing(store, config.name, job.run)
    plan = Corpus(store.artifact("corpus", *job.corpus)).artifact.manifest.detail["stream"]
    text = f"pretrain: streaming {plan['partitions']:,} partitions"
    if at.step:
        text += f"; step {at.step} has seen {len(at.done):,} of them whole"
    progress.say(
        f"{text}; each row of an epoch is trained on at least once: where workers stop, partitions "
        "that were not seen whole are read again from their beginning"
    )


@dataclass(frozen=True)
class Feed:
    """Makes the dataset. Called at each start of the workers, so that it begins where the newest
    checkpoint stands."""

    job: TrainJob

    def __call__(self) -> Any:
        import ray.data

        config = loading.validate(dict(self.job.config))
        store = Store(self.job.root)
        corpus = Corpus(store.artifact("corpus", *self.job.corpus))
        parts = partitions(corpus, config)
        at = standing(store, config.name, self.job.run)
        wanted = lined_up(corpus, config, at.step)
        weights = live.weights(parts, config.train.mix)
        pieces = islice(at.pending(weights, config.seed), wanted)
        blocks = [_block((piece, parts[piece.partition % len(parts)])) for piece in pieces]
        tools = live.stored_encoder(corpus, config), _evaluations(config)
        return ray.data.from_blocks(blocks).map_batches(
            _prepared,
            fn_kwargs={"config": self.job.config, "tools": pickle.dumps(tools)},
            batch_size=None,
            batch_format="pyarrow",
        )


def partitions(corpus: Corpus, config: RunConfig) -> list[list[sources.SourceFile]]:
    """The partitions of the sources, as they were when the corpus was prepared.

    Raises:
        SourceError: if the sources have changed since.
    """
    readings = documents.readings(config.data)
    found = sources.listing(config.data.sources, config.data.kind, readings)
    listed = sources.summary(config.data.sources, found)
    if isinstance(config.data, TextData):
        listed |= contamination.summary(config.data.decontaminate)
    before = corpus.artifact.manifest.inputs
    if any(before.get(name) != tree for name, tree in listed.items()):
        raise SourceError(
            f"data.sources, or the evaluation sets, changed since {corpus.artifact.id} was "
            "prepared: run `heliostat prepare` again, and train anew"
        )
    return sources.partition(found.files, config.data.partition_bytes)


def _evaluations(config: RunConfig) -> contamination.Evaluations | None:
    data = config.data
    if not isinstance(data, TextData) or not data.decontaminate.sources:
        return None
    return contamination.evaluations(data.decontaminate)


def lined_up(corpus: Corpus, config: RunConfig, step: int) -> int:
    """Partitions that are enough for the steps that are left."""
    plan = corpus.artifact.manifest.detail["stream"]
    needed = (config.train.steps - step) * config.train.global_batch
    return 1 + int(np.ceil(MARGIN * needed * plan["partitions"] / max(plan["rows"], 1)))


def options(config: RunConfig) -> Any:
    """How far rows may be prepared ahead of the workers: then Ray Data starts no more tasks."""
    import ray.train
    from ray.data import ExecutionOptions, ExecutionResources

    limit = ExecutionResources(object_store_memory=config.train.stream_bytes)
    where = config.prepare.labels or None
    return ray.train.DataConfig(
        execution_options=ExecutionOptions(resource_limits=limit, label_selector=where)
    )


def _block(work: Any) -> pa.Table:
    import pyarrow as pa

    return pa.table({"work": pa.array([pickle.dumps(work)], pa.binary())})


def _prepared(block: pa.Table, *, config: dict[str, Any], tools: bytes) -> pa.Table:
    """In a task: rows of a partition."""
    import os

    import pyarrow as pa

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = loading.validate(dict(config))
    encoder, against = pickle.loads(tools)
    tables = []
    for raw in block.column("work").to_pylist():
        piece, files = pickle.loads(raw)
        tables.append(live.rows(files, piece, settings, encoder, against))
    filled = [table for table in tables if table.num_rows]
    return pa.concat_tables(filled) if filled else pa.table({})


@dataclass
class StreamSource:
    """This rank's micro-batches of a stream: in the place of `loop.BatchSource`."""

    config: RunConfig
    family: Family
    corpus: Corpus
    world: World
    _taken: dict[int, list[Sample]] = field(default_factory=dict)
    _batches: Iterator[pa.Table] | None = None

    def between(self, first: int, last: int, shift: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        """Steps `first` to `last - 1`, with whatever comes next."""
        ahead = prefetched(self.at, first + shift, last + shift)
        for step, batches in zip(range(first, last), ahead, strict=True):
            device = self.world.device
            yield (
                step,
                [
                    {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                    for batch in batches
                ],
            )

    def at(self, number: int) -> list[Batch]:
        """The next micro-batches of this rank, on the host; called in order of the steps."""
        rows = live.as_rows(self._next())
        samples = [Sample(int(row["epoch"]), int(row["id"])) for row in rows]
        self._taken[number] = samples
        examples = [self._example(*pair) for pair in zip(rows, samples, strict=True)]
        size = micro_batch(self.config.train, self.world.size)
        return [
            self.family.collate(examples[begin : begin + size])
            for begin in range(0, len(examples), size)
        ]

    def taken(self, number: int) -> list[Sample]:
        """What a batch was made from; to be asked for once."""
        return self._taken.pop(number)

    def again(self) -> StreamSource:
        """After a rewind: the stream goes on, it has no way back."""
        return self

    def _example(self, row: Any, sample: Sample) -> Any:
        rng = np.random.default_rng([self.config.seed, sample.epoch, sample.id])
        return self.family.example(self.config, self.corpus.facts, row, rng)

    def _next(self) -> pa.Table:
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches, None)
        if batch is None:  # fewer rows came than were estimated: once more from the start
            self._batches = self._open()
            batch = next(self._batches, None)
        if batch is None:
            raise TrainingError(
                "the stream gives fewer rows than one batch of train.global_batch "
                f"{self.config.train.global_batch}: give more data.sources or a smaller batch"
            )
        return batch

    def _open(self) -> Iterator[pa.Table]:
        import ray.train

        train = self.config.train
        return iter(
            ray.train.get_dataset_shard(NAME).iter_batches(
                batch_size=train.global_batch // self.world.size,
                batch_format="pyarrow",
                drop_last=True,
                prefetch_batches=2,
                local_shuffle_buffer_size=train.shuffle_window * self.config.data.row_group_rows,
                local_shuffle_seed=self.config.seed,
            )
        )
