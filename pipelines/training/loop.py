"""What every training worker runs. Plain data in, plain data out; heavy imports inside."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import TrainingError
from cluster.journal import Journal
from cluster.storage import Artifact, Store
from cluster.telemetry import Row
from pipelines import families
from pipelines.data.corpus import Corpus
from pipelines.families.base import Batch, Family
from pipelines.training import elastic, folds, guard, heldout
from pipelines.training.agreement import agreed
from pipelines.training.checkpoint import (
    CheckpointWriter,
    Lineage,
    Progress,
    check_parent,
    newest,
    of_run,
    progress_of,
)
from pipelines.training.diary import Diary, Suspects
from pipelines.training.engine import Engine, StepOutcome, World
from pipelines.training.folds import Fold
from pipelines.training.forecast import STEPS, Forecast
from pipelines.training.guard import Verdict
from pipelines.training.heldout import HeldOut
from pipelines.training.meter import Clock, Rates, peak_memory, peak_of
from pipelines.training.sampler import (
    GlobalOrder,
    RowReader,
    Sample,
    order_of,
    prefetched,
    share,
)
from pipelines.training.schedule import learning_rate
from pipelines.training.stream import StreamSource
from pipelines.training.threads import compute_on
from pipelines.training.trial import Trial, asked, at_step
from pipelines.training.watchdog import Preempted, Pulse
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
    """Actor handle of `telemetry.Board`; None keeps the figures to the worker."""
    trial: Trial | None = None
    """Where it is one of a search; then the board is a `trial.Gate`."""
    fold: Fold | None = None

    def last_step(self, config: RunConfig) -> int:
        """Where it ends: before the schedule does, where a search tries it out."""
        return min(config.train.steps, self.trial.steps if self.trial else config.train.steps)


def train(job: TrainJob) -> dict[str, Any]:
    """Train from the newest checkpoint of the run to its last step; once per fold where it has any.

    Returns:
        `{"step", "seconds", "whole"}`: where it ended, and whether that is its last step.

    Raises:
        TrainingError: where the guard stops the run, naming step and documents.
        Preempted: if a worker was told to end; the step is committed.
    """
    if job.trial is not None and job.trial.folds and job.fold is None:
        for number in range(job.trial.folds):
            fold = Fold(number, job.trial.folds, job.trial.fold_seed)
            ended = train(replace(job, fold=fold, run=f"{job.run}-fold{number}"))
            if not ended["whole"]:
                break
        return ended
    config = loading.validate(dict(job.config))
    store = Store(job.root)
    corpus = Corpus(store.artifact("corpus", *job.corpus))
    family = families.load(config.family)
    world = join_world(config)
    # A trial is to say how good its settings are, and says nothing of the machine.
    forecast = None if job.trial else _forecast(config, family, corpus, world)
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
    start = restore(store, lineage, engine, job.trial.start if job.trial else None)
    diary = Diary(Journal(store, job.run), Suspects(config, corpus), writes=world.first)
    diary.tell("launch", step=start.step, workers=world.size)
    if config.train.input == "stream":
        batches: BatchSource | StreamSource = StreamSource(config, family, corpus, world)
    else:
        batches = BatchSource(config, family, corpus, world, job.fold)
    rates = _rates(config, family, corpus, world, diary.began)
    try:
        with Pulse.of(job.board, world, start.step) as pulse:
            board = _Board(job.board, world)
            parts = (engine, batches, writer, diary, pulse, rates, board, forecast)
            measured = _heldout(config, family, corpus, world, job)
            end = _Run(config, store, lineage, *parts, job, measured).to_the_end(start)
    finally:
        engine.close()
    whole = end.step == job.last_step(config)
    return {"step": end.step, "seconds": end.seconds, "whole": whole}


@dataclass
class _Run:
    """The loop, and what hangs on it."""

    config: RunConfig
    store: Store
    lineage: Lineage
    engine: Engine
    batches: BatchSource | StreamSource
    writer: CheckpointWriter
    diary: Diary
    pulse: Pulse
    rates: Rates
    board: _Board
    forecast: Forecast | None
    job: TrainJob
    heldout: HeldOut | None
    shift: int = 0
    """Batches that were left out: step n takes batch n + shift."""
    compared_at: int = 0
    """Step after which the figures are held against the forecast."""
    save_seconds: float = 0.0
    """That the last checkpoint held training up."""
    saved: int = -1
    """Step of the newest checkpoint that this launch has begun."""

    def to_the_end(self, start: Progress) -> Progress:
        """To the last step, or until the driver wants it to end."""
        at, rewinds = start, 0
        self.compared_at = start.step + STEPS
        self.shift = guard.shift(start.history)
        while True:
            self.writer.begin(at)
            at, verdict = self._steps(at)
            if verdict.action == "go":
                return at
            if verdict.action == "end":
                return self._ended(at, verdict)
            rewinds += 1
            if verdict.action == "stop" or rewinds > guard.MOST_REWINDS:
                self._give_up(at, verdict)
            at = self._rewound(at)

    def _steps(self, start: Progress) -> tuple[Progress, Verdict]:
        """The loop itself: take a batch, step, record, judge, now and then save."""
        train, clock, verdict = self.config.train, Clock(), Verdict("go")
        at, last = replace(start, history=list(start.history)), self.job.last_step(self.config)
        if self.job.trial and at.history and "heldout_loss" in at.history[-1]:
            verdict = self._at_the_gate(at)  # whoever watches it may not have heard of this step
            last = at.step if verdict.action == "end" else last
        for step, micro_batches in self.batches.between(start.step, last, self.shift):
            clock.data_is_there()
            outcome = self._step(step, micro_batches)
            at = self._recorded(at, outcome, clock)
            verdict = self._judged(at, outcome)
            if verdict.action in ("stop", "rewind"):
                break
            due = at.step == last or at.step % train.checkpoint_every == 0
            if due or verdict.action == "end":
                self._save(at)
                clock.restart()
            if verdict.action == "go" and self.job.trial and "heldout_loss" in at.history[-1]:
                verdict = self._at_the_gate(at)
                clock.restart()
            if verdict.action == "end":
                break
        self.board.flush()
        self.pulse.at("save")
        self.writer.wait()
        return at, verdict

    def _step(self, step: int, micro_batches: list[Batch]) -> StepOutcome:
        self.pulse.at("step", step + self.shift)
        outcome = self.engine.step(
            micro_batches,
            learning_rate=learning_rate(self.config.train, step),
            seed=dropout_seed(self.config.seed, step, self.engine.world.rank),
            signals=self.pulse.signals,
        )
        self.writer.record(step + 1, self.batches.taken(step + self.shift))
        return outcome

    def _recorded(self, at: Progress, outcome: StepOutcome, clock: Clock) -> Progress:
        waited, seconds = clock.waited, clock.step_is_done()
        counted = at.seconds + seconds
        row = {
            "step": at.step + 1.0,
            "batch": float(at.step + self.shift),
            "learning_rate": learning_rate(self.config.train, at.step),
            "peak_memory_bytes": peak_memory(self.engine.world.device),
            "save_seconds": self.save_seconds,
            **self.rates.row(outcome, seconds=seconds, waited=waited, counted=counted),
        }
        if self.forecast is not None and at.step + 1 == self.compared_at:
            row |= self.forecast.row()
        at.history.append(row)
        row["spike"] = float(guard.spikes(self.config.train, at.history))
        if self._looks_at(at.step + 1):
            row["heldout_loss"] = self._measured()
            clock.restart()
        self.board.put(row)
        self.pulse.done(at.step + 1, own=waited + outcome.own_seconds, seconds=seconds)
        return replace(at, step=at.step + 1, seconds=counted)

    def _looks_at(self, step: int) -> bool:
        every = self.config.train.heldout_every
        return bool(every) and (step % every == 0 or step == self.job.last_step(self.config))

    def _measured(self) -> float:
        assert self.heldout is not None
        self.pulse.at("save")  # as long as a checkpoint, and no hang
        return self.heldout.loss(self.engine)

    def _at_the_gate(self, at: Progress) -> Verdict:
        """Wait to hear how a trial goes on."""
        self.pulse.at("save")
        message: dict[str, Any] = at_step(at, self.job, self.engine)
        while True:
            answer = asked(self.job.board, message, self.engine.world)
            if answer != "save":
                break
            if self.saved != at.step:
                self._save(at)
            self.writer.wait()
            found = of_run(self.store, self.lineage.name, self.lineage.run)
            place = [found[0].name, found[0].version] if found else None
            message = {"step": message["step"], "checkpoint": place}
        self.pulse.at("data")
        return Verdict("go") if answer == "go" else Verdict("end", "ended_by_search")

    def _judged(self, at: Progress, outcome: StepOutcome) -> Verdict:
        verdict = guard.judge(self.config.train, at.history)
        if verdict.event:
            self.diary.tell_of(verdict.event, at.history[-1])
        if verdict.action == "go" and any(outcome.signals):
            asked, preempted = outcome.signals
            return Verdict("end", "preempted" if preempted and not asked else "asked_to_stop")
        return verdict

    def _save(self, at: Progress) -> None:
        self.pulse.at("save")
        self.board.flush()  # a worker that dies after the commit does not come by these steps again
        began = time.monotonic()
        self.engine.average_buffers()
        self.writer.save(self.engine, at, complete=at.step == self.config.train.steps)
        self.save_seconds = time.monotonic() - began
        self.saved = at.step
        self.pulse.at("data")

    def _ended(self, at: Progress, verdict: Verdict) -> Progress:
        self.diary.tell(verdict.event, step=at.step)
        if verdict.event == "preempted" and at.step < self.config.train.steps:
            raise Preempted(f"a worker was told to end (SIGTERM): step {at.step} is committed")
        return at

    def _give_up(self, at: Progress, verdict: Verdict) -> NoReturn:
        """Raise on all ranks, with the documents that rank 0 looks up."""
        with agreed(self.engine.world):
            if self.engine.world.first:
                message = self.diary.diagnosis(verdict.reason, at.history[-1])
                raise TrainingError(message)
        raise AssertionError("rank 0 raises, so all do")

    def _rewound(self, at: Progress) -> Progress:
        """Back to the newest checkpoint before the leap began; what lies between is left out."""
        with agreed(self.engine.world):
            if self.engine.world.first:
                _forget_after(self.store, self.lineage, at.step - self.config.train.spike_steps)
        back = restore(self.store, self.lineage, self.engine)
        left_out = [back.step + self.shift, at.step + self.shift - 1]
        self.shift += at.step - back.step
        self.diary.tell("rewound", step=at.step, to=back.step, batches_left_out=left_out)
        self.batches = self.batches.again()
        return back


def _forecast(config: RunConfig, family: Family, corpus: Corpus, world: World) -> Forecast | None:
    """Rank 0's. All ranks make one, and end where one fails: each needs the libraries for it, and
    would only import them later if it waited."""
    with agreed(world):
        found = Forecast.of(config, family, corpus.facts, world)
    return found if world.first else None


def _heldout(
    config: RunConfig, family: Family, corpus: Corpus, world: World, job: TrainJob
) -> HeldOut | None:
    """What the run is measured on while it trains, where it is."""
    if not config.train.heldout_every:
        return None
    rows = config.train.heldout_rows
    if job.fold is not None:
        _, out = folds.rows_of(corpus, job.fold)
        return HeldOut(config, family, corpus, world, out[:rows].tolist(), "train")
    confirm = job.trial is not None and job.trial.confirm
    ids = heldout.chosen(corpus, rows, confirm=confirm)
    return HeldOut(config, family, corpus, world, ids)


def _rates(config: RunConfig, family: Family, corpus: Corpus, world: World, began: float) -> Rates:
    flops = family.flops_per_prediction(config, corpus.facts)
    return Rates(world.size, flops, peak_of(world.device), began)


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
    fold: Fold | None = None

    def __post_init__(self) -> None:
        train = self.config.train
        groups = self.corpus.row_groups("train")
        if self.fold is None:
            self.order: GlobalOrder | folds.Subset = order_of(groups, self.config)
        else:
            ids, _ = folds.rows_of(self.corpus, self.fold)
            self.order = folds.Subset(ids, groups.sizes, self.config.seed, train.shuffle_window)
        self._reader = RowReader(groups, keep=2 * train.shuffle_window)
        self._taken: dict[int, list[Sample]] = {}

    def between(self, first: int, last: int, shift: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        """Steps `first` to `last - 1`, with the micro-batches of batch `step + shift`."""
        ahead = prefetched(self.at, first + shift, last + shift)
        for step, batches in zip(range(first, last), ahead, strict=True):
            yield step, [_to(batch, self.world.device) for batch in batches]

    def at(self, number: int) -> list[Batch]:
        """Micro-batches of this rank of a global batch, on the host."""
        train = self.config.train
        positions = share(number, train.global_batch, *self._place)
        samples = self._taken[number] = [self.order.at(position) for position in positions]
        rows = [self._example(sample) for sample in samples]
        size = micro_batch(train, self.world.size)
        return [
            self.family.collate(rows[begin : begin + size]) for begin in range(0, len(rows), size)
        ]

    def taken(self, number: int) -> list[Sample]:
        """What this rank's part of a batch was made from; to be asked for once."""
        return self._taken.pop(number)

    def again(self) -> BatchSource:
        """For batches from another place on: this one's thread may still be reading."""
        return replace(self)

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


def join_world(config: RunConfig) -> World:
    import ray.train
    import ray.train.torch
    import torch

    compute_on(config.train.threads_per_worker)
    # Adam's second moments shrink into denormal numbers, which CPUs compute many times slower.
    torch.set_flush_denormal(True)
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def restore(
    store: Store, lineage: Lineage, engine: Engine, other: tuple[str, int] | None = None
) -> Progress:
    """Rank 0 chooses the newest good checkpoint, all ranks load it.

    Args:
        other: name and version of a checkpoint to begin with, where the run has none of its own.
    """
    import torch.distributed as dist

    chosen: list[tuple[str, int] | None] = [other]
    with agreed(engine.world):
        if engine.world.first:
            found = newest(store, lineage.name, lineage.run)
            if found is not None:
                chosen = [(found.name, found.version)]
            elif other is not None:
                found = store.artifact("checkpoint", *other)
            if found is not None:
                check_parent(found, lineage.parent)
    dist.broadcast_object_list(chosen, src=0, device=engine.world.device)
    if chosen[0] is None:
        return Progress(0, 0.0, [])
    artifact: Artifact = store.artifact("checkpoint", *chosen[0])
    elastic.restore(engine, artifact)
    return progress_of(artifact)


def _forget_after(store: Store, lineage: Lineage, step: int) -> None:
    """Remove the run's checkpoints after a step, so that the newest is one from before it.

    Raises:
        TrainingError: if there would be none.
    """
    own = of_run(store, lineage.name, lineage.run)
    later = [artifact for artifact in own if artifact.manifest.detail["step"] > step]
    if len(later) == len(own):
        raise TrainingError(
            f"the loss leapt after step {step}, and no checkpoint from before it is left to go "
            "back to: continue with train.on_spike=continue, or take train.checkpoint_every "
            f"below {max(2, step)}"
        )
    for artifact in later:
        store.delete(artifact)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
