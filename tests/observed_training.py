"""What a config makes of training, without a cluster. See `observed_data`."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from cluster import telemetry
from cluster.config import RunConfig
from cluster.errors import HeliostatError
from cluster.journal import Journal
from cluster.session import open_store
from cluster.stages import resolved
from pipelines import families, pretrain
from pipelines.data.corpus import Corpus
from pipelines.training import elastic, engine, loop, watchdog
from pipelines.training.engine import StepOutcome, World
from pipelines.training.loop import BatchSource
from pipelines.training.schedule import learning_rate
from tests.corpora import counting_corpus
from tests.observed_data import CLUSTER, FACTS, joined, patched


class DeepSpeed:
    """Notes what it is given."""

    def initialize(self, *, model: Any, **given: Any) -> tuple[Any, ...]:
        self.given = given
        return SimpleNamespace(compile=lambda: torch.compile(model)), None, None, None


def _handed(config: RunConfig, device: str = "cpu") -> dict[str, Any]:
    """What DeepSpeed is made with."""
    deepspeed, world = DeepSpeed(), World(0, 2, torch.device(device))
    with patched() as patch:
        patch.setattr(engine, "_import_deepspeed", lambda device: deepspeed)
        engine.Engine(config, families.load(config.family), FACTS, world)
    return deepspeed.given


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """What DeepSpeed is told on CPUs."""
    settings: dict[str, Any] = _handed(config)["config"]
    return settings


def deepspeed_settings_on_gpus(config: RunConfig) -> dict[str, Any]:
    settings: dict[str, Any] = _handed(config, "cuda")["config"]
    return settings


def optimizer_groups(config: RunConfig) -> list[dict[str, Any]]:
    groups = _handed(config)["optimizer"].param_groups
    return [{key: group[key] for key in group if key != "params"} for group in groups]


def compiles(config: RunConfig) -> bool:
    """Whether anything of the model goes to the compiler, which itself would take a minute."""
    compiled: list[Any] = []
    with patched() as patch:
        patch.setattr(torch, "compile", lambda call, **options: compiled.append(call) or call)
        _handed(config)
    return bool(compiled)


def learning_rates(config: RunConfig) -> list[float]:
    """Of the first steps, whatever the run's length."""
    return [learning_rate(config.train, step) for step in range(100)]


def batches(config: RunConfig) -> list[Any]:
    """Tokens of the micro-batches that one of two workers takes at the first steps."""
    reader = Corpus(counting_corpus(config))
    world = World(0, 2, torch.device("cpu"))
    source = BatchSource(config, families.load(config.family), reader, world)
    return [[micro["input_ids"].tolist() for micro in source.at(number)] for number in range(3)]


def launch(config: RunConfig) -> dict[str, Any]:
    """What Ray Train is asked for."""
    import ray.train.torch

    kept: dict[str, Any] = {}

    class Trainer:
        def __init__(self, worker: Any, **options: Any) -> None:
            kept.update(options)

        def fit(self) -> None:
            pass

    store = open_store(config)
    job = pretrain._job(store, counting_corpus(config), config)
    with patched() as patch:
        patch.setattr(ray.train.torch, "TorchTrainer", Trainer)
        pretrain._fit(job, config, CLUSTER, store)
    scaling, run = kept["scaling_config"], kept["run_config"]
    return {
        "workers": scaling.num_workers,
        "resources": scaling.resources_per_worker,
        "labels": scaling.label_selector,
        "threads": run.worker_runtime_env["env_vars"]["OMP_NUM_THREADS"],
        "failures": run.failure_config.max_failures,
        "streams": sorted(kept.get("datasets", {})),
        "may_wait": kept["dataset_config"]._user_execution_options
        if "dataset_config" in kept
        else None,
    }


class Slow:
    """A state that storage takes a while for."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        time.sleep(0.7)
        return list, ()


class Scripted:
    """An engine whose losses are written down: they fall, but for two that are not finite and then
    two that leap up. Its state is slow to write in a run of one step."""

    precision, parameters = "fp32", 7
    SKIPPED, LEAPS = (22, 23), (25, 26)

    def __init__(self, config: RunConfig, *rest: Any) -> None:
        self.config, self.world, self._steps = config, rest[-1], 0

    def step(self, micro_batches: Any, *, signals: tuple[bool, ...], **_: Any) -> StepOutcome:
        self._steps += 1
        bad = self._steps in self.SKIPPED
        loss = 90.0 if self._steps in self.LEAPS else 10.0 - self._steps / 100
        return StepOutcome(float("nan") if bad else loss, 8, 1.0, bad, 0.01, signals)

    def snapshot(self) -> dict[str, Any]:
        return {"mp_rank_00_model_states.pt": {"a": Slow() if self.config.train.steps == 1 else 1}}

    def average_buffers(self) -> None:
        pass

    def close(self) -> None:
        pass


def run(config: RunConfig) -> dict[str, Any]:
    """How a run of the real loop goes: how it ends, its events, and what is left of it."""
    import torch.distributed as dist

    store, reader = open_store(config), counting_corpus(config)
    job = loop.TrainJob(resolved(config), store.uri, (reader.name, 1), "run", "mark")
    world = World(0, 1, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with patched() as patch:
            patch.setattr(loop, "Engine", Scripted)
            patch.setattr(loop, "join_world", lambda config: world)
            patch.setattr(elastic, "restore", lambda engine, artifact: None)
            end = f"step {loop.train(job)['step']}"
    except HeliostatError as error:
        end = type(error).__name__
    finally:
        dist.destroy_process_group()
    left = store.versions("checkpoint", config.name)
    events = [(e.name, e.fields.get("step")) for e in Journal(store, "run").events()]
    return {"end": end, "events": events, "left": [a.manifest.detail["step"] for a in left]}


def run_end(config: RunConfig) -> Any:
    return run(config)["end"]


def run_events(config: RunConfig) -> Any:
    return run(config)["events"]


def run_left(config: RunConfig) -> Any:
    return run(config)["left"]


class Remote:
    """An actor in this process: `actor.method.remote(...)` answers at once."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


def _sign(start_id: str, step: int) -> telemetry.Sign:
    here = {"pid": 1, "born": 0.0, "node": "n", "start": 0, "phase": "step", "batch": step}
    figures = {"step_seconds": 0.1, "longest": 0.1, "own": 0.0}
    return telemetry.Sign(start_id, 0, 1, step=step, **here, **figures)  # type: ignore[arg-type]


def _pretrain(config: RunConfig, board: telemetry.Board, work: Callable[[], None]) -> None:
    """The stage, with some work in the place of the training workers."""
    import ray

    counting_corpus(config)
    with patched() as patch:
        patch.setattr(ray, "get", lambda answer, **options: answer)
        patch.setattr(telemetry, "start_board", lambda: Remote(board))
        patch.setattr(telemetry, "Gauges", lambda *names: SimpleNamespace(show=lambda row: None))
        patch.setattr(pretrain, "session", joined)
        patch.setattr(pretrain, "_fit", lambda *arguments: work())
        with contextlib.suppress(HeliostatError):  # nothing was trained
            pretrain.run(config)


def replaced_workers(config: RunConfig) -> list[int]:
    """Processes that are killed where a worker has been silent for 40 seconds."""
    now, killed = [0.0], list[int]()
    board = telemetry.Board(clock=lambda: now[0])
    board.begin("first")
    board.sign(_sign("first", 7))
    now[0] = 40.0
    with patched() as patch:
        patch.setattr(watchdog, "on_node", lambda node, work, pid, born: killed.append(pid))
        _pretrain(config, board, lambda: None)
    return killed


def committed_after_interrupt(config: RunConfig) -> bool:
    """Whether workers that were asked to end by Ctrl-C had time to."""
    board, asked, left = telemetry.Board(), threading.Event(), threading.Event()
    ended, in_time = threading.Event(), list[bool]()
    board.begin("first")
    board.sign(_sign("first", 7))
    board.stop = asked.set  # type: ignore[method-assign]
    usual = pretrain.stoppable

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        asked.wait(30)
        in_time.append(not left.wait(0.5))
        ended.set()

    def noting(*arguments: Any) -> None:
        try:
            usual(*arguments)
        finally:
            left.set()

    with patched() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(pretrain, "stoppable", noting)
        _pretrain(config, board, work)
    assert ended.wait(30)
    return in_time[0]
