"""Real Ray Train, real DeepSpeed, real gloo: a run that is killed ends as the undisturbed one."""

import hashlib
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import CapacityError
from cluster.storage import Artifact, Store
from pipelines import pretrain
from pipelines.training.checkpoint import load_weights, read_history
from tests.corpora import counting_corpus

pytestmark = pytest.mark.usefixtures("ray_session")
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
    "train.checkpoint_every=10",
]


def tiny(root: Path, *overrides: str) -> RunConfig:
    return loading.load("gpt-demo", [f"storage.root={root}", *TINY, *overrides])


def weights_digest(checkpoint: Artifact) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_weights(checkpoint).items()):
        digest.update(name.encode() + tensor.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def losses(checkpoint: Artifact) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_history(checkpoint)]


def kill_one_worker(after: Path, name: str) -> threading.Thread:
    """kill -9 one training worker as soon as the run has a checkpoint."""

    def hunt() -> None:
        deadline = time.monotonic() + 120
        while not (after / f"checkpoint/{name}@1/COMMIT").exists():
            assert time.monotonic() < deadline, "the run never reached a checkpoint"
            time.sleep(0.02)
        training_workers()[0].kill()

    thread = threading.Thread(target=hunt)
    thread.start()
    return thread


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


@pytest.mark.parametrize("stage", [2])
def test_a_killed_worker_changes_nothing(root: Path, stage: int) -> None:
    quiet = tiny(root, "name=quiet", f"train.zero_stage={stage}")
    counting_corpus(quiet)
    undisturbed = pretrain.run(quiet).artifact
    assert undisturbed is not None

    config = tiny(root, "name=killed", f"train.zero_stage={stage}", "train.keep_checkpoints=9")
    counting_corpus(config)
    hunter = kill_one_worker(root, "killed")
    finished = pretrain.run(config).artifact
    hunter.join()

    assert finished is not None and finished.manifest.detail["step"] == 40
    assert losses(finished) == losses(undisturbed)
    assert weights_digest(finished) == weights_digest(undisturbed)
    assert losses(finished)[-1][1] < 0.8 * losses(finished)[0][1]


def test_more_workers_than_cpus_is_refused_at_once(root: Path) -> None:
    config = tiny(root, "train.workers=8")
    counting_corpus(config)
    began = time.monotonic()
    with pytest.raises(CapacityError, match=r"need 8 CPUs and the cluster has 4"):
        pretrain.run(config)
    assert time.monotonic() - began < 20


def test_a_stopped_run_continues_with_the_same_command(root: Path) -> None:
    config = tiny(root, "name=stopped", "train.zero_stage=3", "train.max_failures=0")
    counting_corpus(config)
    hunter = kill_one_worker(root, "stopped")
    with pytest.raises(Exception, match="training failed"):
        pretrain.run(config)
    hunter.join()
    stopped = Store(str(root)).latest("checkpoint", "stopped")
    assert stopped is not None and not stopped.manifest.complete

    finished = pretrain.run(config).artifact
    assert finished is not None and finished.manifest.complete
    assert finished.manifest.detail["run"] == stopped.manifest.detail["run"]
    assert [step for step, _ in losses(finished)] == [float(n) for n in range(1, 41)]
