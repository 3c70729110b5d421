"""A hundred steps at every size and stage, and a node that is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import RunConfig
from cluster.journal import Journal
from cluster.stages import resolved
from cluster.storage import Store
from pipelines.training.checkpoint import read_history
from tests import gloo, growing, ranks
from tests.corpora import counting_corpus
from tests.hunting import tiny
from tests.shrinking import NAME, SETTINGS

SAVED, LAST = 8, 108
STAGES = (0, 1, 2, 3)


def config(root: Path, stage: int) -> RunConfig:
    settings = ["train.global_batch=24", "train.precision=fp32", f"train.steps={LAST + 20}"]
    return tiny(root, "name=sizes", *settings, f"train.zero_stage={stage}")


@pytest.fixture(scope="module", params=STAGES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Stage, root and losses of a run of two ranks, with its checkpoint at step `SAVED`."""
    root = tmp_path_factory.mktemp(f"stage-{request.param}")
    counting_corpus(config(root, request.param), ragged=True)
    tree = resolved(config(root, request.param))
    same, _ = gloo.launch(2, ranks.steps, tree, LAST, save_at=SAVED)
    return request.param, root, same["losses"][SAVED:]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("after", STAGES)
def test_a_hundred_steps_at_another_size(
    saved: tuple[int, Path, list[float]], size: int, after: int
) -> None:
    stage, root, losses = saved
    if stage != after and (0 in (stage, after) or size == 4):
        pytest.skip("stage 0 continues itself only; sizes 1 and 3 show the change of stages")
    tree = resolved(config(root, after))
    there, *_ = gloo.launch(size, ranks.steps, tree, LAST, source=1)
    assert there["losses"][0] == pytest.approx(losses[0], rel=1e-5)
    assert there["losses"] == pytest.approx(losses, rel=1e-3)


def test_a_lost_node_shrinks_the_run(tmp_path: Path) -> None:
    """Two nodes with a worker each, one of which goes: same batches, same losses, one worker."""
    two = tiny(tmp_path, *SETTINGS)
    counting_corpus(two, ragged=True)
    undisturbed, _ = gloo.launch(2, ranks.steps, resolved(two), two.train.steps)
    command = [sys.executable, "-m", "tests.shrinking", str(tmp_path)]
    # Ray waits this long for workers on a node that it does not yet know to be gone.
    environment = os.environ | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    finished = Store(str(tmp_path)).latest("checkpoint", NAME)
    assert finished is not None and finished.manifest.complete
    rows = read_history(finished)
    assert [row["step"] for row in rows] == [float(n + 1) for n in range(two.train.steps)]
    assert [row["loss"] for row in rows] == pytest.approx(undisturbed["losses"], rel=1e-3)
    events = list(Journal(Store(str(tmp_path)), finished.manifest.detail["run"]).events())
    assert [e.fields["workers"] for e in events if e.name == "launch"] == [2, 1]
    assert sum(event.name == "worker_lost" for event in events) == 1
    assert sum(event.name == "resharded" for event in events) == 1


def test_a_node_that_comes_back_is_used_again(tmp_path: Path) -> None:
    """Two workers, one, two: each from the last commit, every batch once and in order."""
    config = tiny(tmp_path, *growing.SETTINGS)
    counting_corpus(config, ragged=True)
    command = [sys.executable, "-m", "tests.growing", str(tmp_path)]
    environment = os.environ | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    store = Store(str(tmp_path))
    finished = store.latest("checkpoint", growing.NAME)
    assert finished is not None and finished.manifest.complete
    assert growing.launches(store, growing.run_of(store)) == [2, 1, 2]
    assert finished.manifest.detail["world_size"] == 2
    rows = read_history(finished)
    assert [row["batch"] for row in rows] == [float(n) for n in range(config.train.steps)]
    events = Journal(store, finished.manifest.detail["run"]).events()
    assert sum(event.name == "resharded" for event in events) == 2
