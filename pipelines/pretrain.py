"""STAGE pretrain: Ray Train runs the workers, DeepSpeed shards the model, checkpoints commit."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster import progress, telemetry
from cluster.config import RunConfig
from cluster.errors import ConfigError, HeliostatError, TrainingError
from cluster.session import Session, check_capacity, open_store, session
from cluster.stages import BY_VERB, StageResult, fingerprint, required, resolved
from cluster.storage import Artifact, Store
from pipelines.training import zero
from pipelines.training.loop import TrainJob, train

FOLLOW_SECONDS = 0.5
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
        TrainingError: if the run failed more often than `train.max_failures` allows.
    """
    store = open_store(config)
    corpus = required("pretrain", store, config)
    job = _job(store, corpus, config)
    began = time.monotonic()
    with session(config) as joined:
        check_capacity(
            joined,
            workers=config.train.workers,
            cpus_per_worker=config.train.threads_per_worker,
        )
        device: zero.Device = "cuda" if joined.gpus else "cpu"
        zero.check(config.train, device, workers=config.train.workers)
        board = telemetry.start_board()
        with _followed(board, config):
            _fit(replace(job, board=board), config, joined, store)
    return _result(store, config, time.monotonic() - began)


def _job(store: Store, corpus: Artifact, config: RunConfig) -> TrainJob:
    """A new run, or the one whose unfinished checkpoint fits."""
    mark = fingerprint(BY_VERB["pretrain"], config, corpus, {})
    newest = store.latest("checkpoint", config.name)
    resume = (
        newest is not None
        and not config.fresh
        and not newest.manifest.complete
        and newest.manifest.fingerprint == mark
    )
    if resume and newest is not None:
        run = str(newest.manifest.detail["run"])
        _check_world(newest, config)
    else:
        run = f"{config.name}-{uuid.uuid4().hex[:10]}"
    return TrainJob(resolved(config), store.uri, (corpus.name, corpus.version), run, mark)


def _check_world(checkpoint: Artifact, config: RunConfig) -> None:
    saved = checkpoint.manifest.detail["world_size"]
    if saved != config.train.workers:
        raise ConfigError(
            f"{checkpoint.id} was saved by {saved} workers and train.workers is "
            f"{config.train.workers}: continue with train.workers={saved}, or start over with "
            "--fresh"
        )


def _fit(job: TrainJob, config: RunConfig, joined: Session, store: Store) -> None:
    """One launch. Ray Train replaces lost workers; each start restores from our checkpoints."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings = config.train
    gpu = joined.gpus > 0
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            resources_per_worker={
                "CPU": settings.threads_per_worker,
                **({"GPU": 1} if gpu else {}),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=ray.train.RunConfig(
            # A name that was never used: Ray would resume an old one from its own snapshot.
            name=f"{job.run}-{uuid.uuid4().hex[:6]}",
            storage_path=f"{store.base}/.ray",
            storage_filesystem=store.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": _environment(settings.threads_per_worker, gpu=gpu)},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _named(error) from error


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    return train(config["job"])


def _environment(threads: int, *, gpu: bool) -> dict[str, str]:
    common = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # Where there are GPUs, DS_ACCELERATOR=cpu would keep DeepSpeed from them.
    return common if gpu else {**common, "DS_ACCELERATOR": "cpu", **KEEP_FREED_MEMORY}


@contextmanager
def _followed(board: Any, config: RunConfig) -> Iterator[None]:
    """Show the workers' figures while the main thread waits in `fit`."""
    stop = threading.Event()
    with progress.bar("pretrain", config.train.steps, "steps") as bar:

        def follow() -> None:
            import ray

            change = 0
            while True:
                last_round = stop.wait(FOLLOW_SECONDS)
                try:
                    change, rows = ray.get(board.since.remote(change), timeout=30)
                except ray.exceptions.RayError:
                    return
                if rows:
                    bar.update(int(rows[-1]["step"]), _note(rows[-1]))
                if last_round:
                    return

        follower = threading.Thread(target=follow, daemon=True, name="follow")
        follower.start()
        try:
            yield
        finally:
            stop.set()
            follower.join(timeout=5)


def _note(row: telemetry.Row) -> str:
    return f"loss {row['loss']:.3f}  {row['predictions_per_second']:,.0f} predictions/s"


def _result(store: Store, config: RunConfig, seconds: float) -> StageResult:
    final = store.latest("checkpoint", config.name)
    if final is None or not final.manifest.complete:
        raise TrainingError(
            f"{config.name} stopped before step {config.train.steps}; the same command continues"
        )
    metrics = dict(final.manifest.metrics)
    metrics["seconds"] = seconds
    return StageResult(
        final, f"loss {metrics['loss']:.3f} after {config.train.steps} steps", metrics
    )


def _named(error: Exception) -> HeliostatError:
    """The reason below Ray's wrapping: our own error as it is, anything else by its last line."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error.__cause__ or error]
    for cause in causes:
        if isinstance(cause, HeliostatError):
            return cause
    lines = [line for line in str(causes[0]).splitlines() if line.strip()]
    return TrainingError(f"training failed: {lines[-1].strip() if lines else type(error).__name__}")
