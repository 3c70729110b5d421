"""STAGE pretrain: Ray Train runs the workers, DeepSpeed shards the model, checkpoints commit."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster import doctor, lease, loading, progress, telemetry
from cluster.config import RunConfig
from cluster.errors import ConfigError, HeliostatError, StorageError, TrainingError
from cluster.journal import Journal
from cluster.session import Session, check_capacity, open_store, session
from cluster.stages import BY_VERB, StageResult, fingerprint, relevant, required, resolved
from cluster.storage import Artifact, Store
from cluster.tracking import Status, Tracker, Tracking
from pipelines.data.corpus import Corpus
from pipelines.training import checkpoint, elastic, heldout, stream, zero
from pipelines.training.diary import Suspects
from pipelines.training.forecast import compared
from pipelines.training.loop import TrainJob, train
from pipelines.training.turns import train_in_turn
from pipelines.training.watchdog import Deaths, Watchdog, asked_to_stop, stoppable

FOLLOW_SECONDS = 0.5
WORTH_A_WORD = 0.02
"""Share of a step that waits for data from which on the progress line says so."""
# glibc gives activations back to the system after each step and faults them in again in the next;
# keeping them was worth 1.7x on a 2 M parameter model (mallopt(3): thresholds in bytes).
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def run(config: RunConfig) -> StageResult:
    """Train to the last step, from wherever the run of this config stands.

    Raises:
        CapacityError: if the cluster cannot hold the workers.
        ClusterError: if its nodes do not fit together.
        StorageError: if another live run has the name, or storage does not take a checkpoint.
        TrainingError: if the run failed more often than `train.max_failures` allows.
    """
    store = open_store(config)
    with lease.held(store, config.name):
        return _run(config, store)


def _run(config: RunConfig, store: Store) -> StageResult:
    corpus = required("pretrain", store, config)
    check_heldout(corpus, config)
    job = _job(store, corpus, config)
    began = time.monotonic()
    launch(job, config, store)
    elastic.discard(store, config.name, job.run)
    return _result(store, config, time.monotonic() - began)


def check_heldout(corpus: Artifact, config: RunConfig) -> None:
    """
    Raises:
        UsageError: if the run is to look at held-out rows and the corpus has none.
    """
    if config.train.heldout_every:
        heldout.chosen(Corpus(corpus), 1)


def launch(job: TrainJob, config: RunConfig, store: Store, board: Any = None) -> None:
    """Run the workers of a job to its end, from wherever it stands.

    Args:
        board: of a trial that is watched (`trial.Gate`), whose figures are its watcher's to keep;
            None makes one.

    Raises:
        CapacityError: if the cluster cannot hold the workers.
        ClusterError: if its nodes do not fit together.
        TrainingError: if the run failed more often than `train.max_failures` allows.
    """
    with session(config) as joined:
        if board is None:  # else whoever watches has looked at the nodes
            doctor.before(joined)
        check_capacity(
            joined,
            workers=config.train.world_sizes[0],
            cpus_per_worker=config.train.threads_per_worker,
        )
        for size in config.train.world_sizes:
            zero.check(config.train, "cuda" if joined.gpus else "cpu", workers=size)
        streamed = config.train.input == "stream"
        if streamed:
            stream.check(joined, config)
        _reshard(job, config, store)
        if streamed:
            stream.say(store, job, config)
        tracked = board is None
        board = telemetry.start_board() if board is None else board
        with _followed(board, store, job.run, config, tracked=tracked):
            stoppable(
                lambda: _fit(replace(job, board=board), config, joined, store),
                lambda: _asked_to_stop(board),
                config.train.grace_seconds,
            )


def _job(store: Store, corpus: Artifact, config: RunConfig) -> TrainJob:
    """A new run, or the one whose unfinished checkpoint fits."""
    mark = fingerprint(BY_VERB["pretrain"], config, corpus, {})
    last = None if config.fresh else checkpoint.last(store, config.name)
    resume = last is not None and not last.manifest.complete and last.manifest.fingerprint == mark
    if resume and last is not None:
        run = str(last.manifest.detail["run"])
    else:
        run = f"{config.name}-{uuid.uuid4().hex[:10]}"
    return TrainJob(resolved(config), store.uri, (corpus.name, corpus.version), run, mark)


def _reshard(job: TrainJob, config: RunConfig, store: Store) -> None:
    """Convert the newest checkpoint before the launch, where no allowed number of workers can load
    it as it is. Workers that turn out to need it after a restart convert by themselves.

    Raises:
        ConfigError: if `train.zero_stage` cannot continue it.
    """
    train = config.train

    def fits_nowhere(saved: Artifact) -> bool:
        return all(elastic.needed(saved, size, train.zero_stage) for size in train.world_sizes)

    own = checkpoint.of_run(store, config.name, job.run)
    # The newest first without reading its files, which most resumptions need not do here.
    if not own or not fits_nowhere(own[0]):
        return
    found = checkpoint.newest(store, config.name, job.run)
    if found is None or not fits_nowhere(found):
        return
    saved = found.manifest.detail
    progress.say(
        f"pretrain: converting {found.id}, saved by {saved['world_size']} workers at ZeRO "
        f"stage {saved['zero_stage']}"
    )
    _on_a_node(elastic.ensure, found)


def _on_a_node(work: Callable[[Artifact], Artifact], artifact: Artifact) -> Artifact:
    """Run in a process of its own on some node, which has DeepSpeed see no GPU."""
    import ray

    task = ray.remote(
        num_cpus=1, max_retries=1, runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}}
    )
    try:
        made: Artifact = ray.get(task(work).remote(artifact))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return made


def _fit(job: TrainJob, config: RunConfig, joined: Session, store: Store) -> None:
    """One launch. Ray Train replaces lost workers; each start restores from our checkpoints."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings = config.train
    gpu = joined.gpus > 0
    share = config.tune.gpus_per_worker if job.trial else 1
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,  # a tuple lets Ray choose, and choose again
            use_gpu=gpu,
            resources_per_worker={
                "CPU": settings.threads_per_worker,
                **({"GPU": share} if gpu else {}),
            },
            label_selector=settings.labels or None,
        ),
        **_datasets(job, config),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=ray.train.RunConfig(
            # A name that was never used: Ray would resume an old one from its own snapshot.
            name=f"{job.run}-{uuid.uuid4().hex[:6]}",
            storage_path=f"{store.base}/.ray",
            storage_filesystem=store.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            callbacks=[_watch(store, job, config)],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": _environment(settings.threads_per_worker, gpu=gpu)},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _named(error) from error


def _datasets(job: TrainJob, config: RunConfig) -> dict[str, Any]:
    if config.train.input != "stream":
        return {}
    return {"datasets": {stream.NAME: stream.Feed(job)}, "dataset_config": stream.options(config)}


def _watch(store: Store, job: TrainJob, config: RunConfig) -> Any:
    """Sees each failure of workers before Ray Train decides what to do about it.

    Ray would launch again after any failure. Raising here makes it one of its controller, which
    ends the run: what a worker says on purpose would only be said again.
    """
    import ray.train

    journal = Journal(store, job.run)
    suspects = Suspects(config, Corpus(store.artifact("corpus", *job.corpus)))
    deaths = Deaths(job.board, suspects)

    class Watch(ray.train.UserCallback):
        def after_exception(
            self, run_context: Any, worker_exceptions: Mapping[int, Exception]
        ) -> None:
            said = final(worker_exceptions)
            ending = deaths.another(
                [_last_line(error) for error in worker_exceptions.values() if not _vanished(error)]
            )
            journal.write(
                "stopped" if said else "worker_lost",
                ranks=sorted(worker_exceptions),
                step=ending.step,
                reasons=sorted({_last_line(error) for error in worker_exceptions.values()}),
            )
            if said is None and ending.diagnosis:
                journal.write("crash_loop", step=ending.step, reason=ending.diagnosis)
                said = TrainingError(ending.diagnosis)
            if said is not None:
                raise said

    return Watch()


def final(errors: Mapping[int, Exception]) -> HeliostatError | None:
    """The error, of those that workers failed with, that another launch would meet again.

    None where a worker vanished: what the others then say may only follow from that.
    """
    if any(map(_vanished, errors.values())):
        return None
    return next((error for error in errors.values() if isinstance(error, HeliostatError)), None)


def _vanished(error: Exception) -> bool:
    """Whether it says that a worker is gone, which Ray found out, not the worker."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(error, RayError | RayTrainError)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    job: TrainJob = config["job"]
    if job.trial is None:
        return train(job)
    train_in_turn(job.board, loading.validate(dict(job.config)))
    return {}


def _environment(threads: int, *, gpu: bool) -> dict[str, str]:
    common = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # Where there are GPUs, DS_ACCELERATOR=cpu would keep DeepSpeed from them.
    return common if gpu else {**common, "DS_ACCELERATOR": "cpu", **KEEP_FREED_MEMORY}


def _asked_to_stop(board: Any) -> bool:
    at_work = asked_to_stop(board)
    if at_work:
        progress.say("pretrain: committing a checkpoint before it ends; Ctrl-C again ends at once")
    return at_work


@contextmanager
def _followed(
    board: Any, store: Store, run: str, config: RunConfig, *, tracked: bool = True
) -> Iterator[None]:
    """Show the workers' figures and watch their signs of life while the main thread waits."""
    stop = threading.Event()
    watchdog = Watchdog(board, store, run, config.train.hang_seconds)
    gauges = telemetry.Gauges(run, config.name)
    with (
        _tracked(store, run, config, on=tracked) as track,
        progress.bar("pretrain", config.train.steps, "steps") as bar,
    ):

        def follow() -> None:
            import ray

            change = 0
            while True:
                last_round = stop.wait(FOLLOW_SECONDS)
                try:
                    change, rows = ray.get(board.since.remote(change), timeout=30)
                    watchdog.look()
                except ray.exceptions.GetTimeoutError:
                    rows = []  # a busy machine; the next round asks again
                except ray.exceptions.RayError:
                    return
                except StorageError as error:
                    progress.say(f"pretrain: the journal could not be written: {error}")
                if rows:
                    track(rows)
                    bar.update(int(rows[-1]["step"]), _note(rows[-1]))
                    for line in filter(None, map(compared, rows)):
                        progress.say(line)
                    gauges.show({**rows[-1], "slow_rank": float(watchdog.slow_rank)})
                if last_round:
                    return

        follower = threading.Thread(target=follow, daemon=True, name="follow")
        follower.start()
        try:
            yield
        finally:
            stop.set()
            follower.join(timeout=5)


@contextmanager
def _tracked(
    store: Store, run: str, config: RunConfig, *, on: bool
) -> Iterator[Callable[[Sequence[telemetry.Row]], None]]:
    """What takes rows to MLflow, where there is one for this storage root."""
    if not on:
        yield lambda rows: None
        return
    try:
        tracking = Tracking.of(store, config, run)
    except ConfigError as error:
        progress.say(f"pretrain: no figures go to MLflow: {error}")
        yield lambda rows: None
        return
    tracker = Tracker(tracking, relevant(BY_VERB["pretrain"], resolved(config)))
    status: Status = "FAILED"
    try:
        yield tracker.put
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.end(status)


def _note(row: telemetry.Row) -> str:
    parts = [f"loss {row['loss']:.3f}", f"{row['predictions_per_second']:,.0f} predictions/s"]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    if row["data_wait"] >= WORTH_A_WORD:
        parts.append(f"waiting for data {row['data_wait']:.0%}")
    return "  ".join([*parts, f"goodput {row['goodput']:.0%}"])


def _result(store: Store, config: RunConfig, seconds: float) -> StageResult:
    final = store.latest("checkpoint", config.name)
    if final is None or not final.manifest.complete:
        raise TrainingError(
            f"{config.name} stopped before step {config.train.steps}; the same command continues"
        )
    _draw(final)
    metrics = dict(final.manifest.metrics)
    metrics["seconds"] = seconds
    return StageResult(
        final, f"loss {metrics['loss']:.3f} after {config.train.steps} steps", metrics
    )


def _draw(final: Artifact) -> None:
    """The run's figures over its steps, as a picture beside its journal."""
    from pipelines.evaluation import plots

    history = checkpoint.read_history(final)
    if not history:
        return
    raw = plots.png(plots.training(history))
    path = f"runs/{final.manifest.detail['run']}/training.png"
    final.store.write(f"{final.store.base}/{path}", lambda stream: stream.write(raw))
    progress.say(f"pretrain: {final.store.uri_of(path)} shows the run")


def _named(error: Exception) -> HeliostatError:
    """The reason below Ray's wrapping: our own error as it is, anything else by its last line."""
    below = getattr(error, "controller_failure", None) or error.__cause__ or error
    causes = list(getattr(error, "worker_failures", {}).values()) or [below]
    for cause in causes:
        if isinstance(cause, HeliostatError):
            return cause
    return TrainingError(f"training failed: {_last_line(causes[0])}")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
