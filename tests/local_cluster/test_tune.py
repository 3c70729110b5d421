"""Ray Tune over the real pretraining stage, and what comes of it; more in tests/chaos."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import CapacityError
from cluster.storage import Artifact, Store
from pipelines import pretrain
from tests.corpora import counting_corpus
from tests.hunting import losses
from tests.tuning import attempts_of, searched, searching
from tune.ledger import Attempt

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_search_ends_in_a_recipe_that_repeats_its_best_trial(root: Path) -> None:
    """TPE and ASHA, one trial after another by the same workers."""
    config = searching(
        root,
        "tune.space={train.learning_rate: 'choice[0.0003, 0.03]'}",
        "train.steps=20",
        "tune.report_every=5",
        "tune.trials=2",
        "tune.concurrent=1",
        "tune.grace=0.3",
        "tune.reduction=2",
    )
    made = searched(config)
    attempts = attempts_of(made)
    trials = [one for one in attempts if one.role == "search"]
    assert len(trials) == 2
    best = min(
        (one for one in trials if one.state == "done"), key=lambda o: o.figure("heldout_loss")
    )
    assert made.manifest.detail["overrides"] == best.values
    check_mlflow(root, config, attempts)
    page = Path(root, "study", f"{config.name}@1", "report.html").read_text("utf-8")
    assert all(one.trial in page for one in trials)
    # Nothing of the trials is left but what they reported.
    assert {a.name for a in Store(str(root)).all("checkpoint")} == set()

    recipe = loading.load(str(root / "study" / f"{config.name}@1" / "best.yaml"))
    finished = pretrain.run(recipe).artifact
    assert finished is not None
    check_repeated(finished, best)


def check_repeated(finished: Artifact, best: Attempt) -> None:
    """The same losses at the same steps, to the last bit, trained and held out."""
    own = dict(losses(finished))
    assert best.rows and all(own[row["step"]] == row["loss"] for row in best.rows)
    history = {row["step"]: row for row in finished.read_json("history.json")}
    for row in best.rows:
        assert history[row["step"]]["heldout_loss"] == row["heldout_loss"]


def check_mlflow(root: Path, config: RunConfig, attempts: list[Attempt]) -> None:
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name(config.name)
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) == len(attempts) and parent.info.status == "FINISHED"
    assert "space.train.learning_rate" in parent.data.params


def test_more_workers_than_cpus_is_refused_at_once(root: Path) -> None:
    config = searching(root, "tune.space.train.beta1=[0.8]", "train.workers=8")
    counting_corpus(config)
    with pytest.raises(CapacityError, match="need 8 CPUs and the cluster has 4"):
        searched_without_corpus(config)


def searched_without_corpus(config: RunConfig) -> Any:
    from tune import search

    return search.run(config)
