"""Real Ray Train, real DeepSpeed, real gloo: a run that is killed ends as the undisturbed one."""

from pathlib import Path

import pytest

from cluster.errors import CapacityError
from cluster.journal import Journal
from cluster.stages import resolved
from cluster.storage import Artifact, Store
from pipelines import pretrain
from tests import gloo, ranks
from tests.corpora import counting_corpus
from tests.hunting import Hunter, check_as_undisturbed, losses, tiny

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_killed_worker_changes_nothing(root: Path) -> None:
    """Beside the same steps by ranks that nothing surrounds: neither Ray nor a loop."""
    quiet = tiny(root, "name=quiet")
    counting_corpus(quiet)
    gloo.launch(2, ranks.steps, resolved(quiet), quiet.train.steps, save_at=quiet.train.steps)
    undisturbed = Store(str(root)).latest("checkpoint", "quiet")
    assert undisturbed is not None

    config = tiny(root, "name=killed", "train.keep_checkpoints=9")
    corpus = counting_corpus(config)
    with Hunter(Store(str(root)), "killed", kills=1) as hunter:
        finished = pretrain.run(config).artifact
    assert finished is not None
    check_as_undisturbed(finished, undisturbed, corpus, hunter)
    assert losses(finished)[-1][1] < 0.8 * losses(finished)[0][1]
    check_seen(root, finished)


def check_seen(root: Path, finished: Artifact) -> None:
    """Steps that were done twice are in MLflow once; the run is drawn beside its journal."""
    from mlflow import MlflowClient

    run = finished.manifest.detail["run"]
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name(finished.name)
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == (run, "FINISHED")
    for key in ("loss", "predictions_per_second", "data_wait", "goodput"):
        points = client.get_metric_history(logged.info.run_id, key)
        assert [point.step for point in points] == list(range(1, 41)), key
    assert (root / f"runs/{run}/training.png").read_bytes().startswith(b"\x89PNG")


def test_more_workers_than_cpus_is_refused_at_once(root: Path) -> None:
    config = tiny(root, "train.workers=8")
    counting_corpus(config)
    with pytest.raises(CapacityError, match=r"need 8 CPUs and the cluster has 4"):
        pretrain.run(config)


def test_a_stopped_run_continues_with_the_same_command(root: Path) -> None:
    config = tiny(root, "name=stopped", "train.zero_stage=3", "train.max_failures=0")
    counting_corpus(config)
    with (
        Hunter(Store(str(root)), "stopped", kills=1),
        pytest.raises(Exception, match="training failed"),
    ):
        pretrain.run(config)
    stopped = Store(str(root)).latest("checkpoint", "stopped")
    assert stopped is not None and not stopped.manifest.complete

    finished = pretrain.run(config).artifact
    assert finished is not None and finished.manifest.complete
    assert finished.manifest.detail["run"] == stopped.manifest.detail["run"]
    assert [step for step, _ in losses(finished)] == [float(n) for n in range(1, 41)]
    events = Journal(Store(str(root)), finished.manifest.detail["run"]).events()
    launches = [event.fields["step"] for event in events if event.name == "launch"]
    assert launches[0] == 0 and launches[1] >= 5 and len(launches) == 2
