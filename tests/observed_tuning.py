"""What a config makes of a search, without a cluster. See `observed_data`."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from cluster import chain
from cluster.config import RunConfig
from cluster.session import Session, open_store
from cluster.stages import STAGES
from pipelines import pretrain
from pipelines.training import heldout
from tests import observed_training as training
from tests.corpora import counting_corpus
from tests.observed_data import patched
from tune import ledger, objective, schedulers, search, searchers, space
from tune.ledger import Attempt
from tune.search import Study

MACHINES = Session(ours=True, dashboard="", cpus=8, gpus=4, nodes=("here",))
CHOSEN = {"values": {"train.learning_rate": 0.02}, "seed": 1}


def study(config: RunConfig) -> Study:
    store = open_store(config)
    counting_corpus(config)
    return search.study_of(config, store)


def stages(config: RunConfig) -> list[str]:
    """What `up` runs."""
    return [stage.verb for stage in chain.wanted(STAGES, config)]


def points(config: RunConfig) -> list[Any]:
    """The grid."""
    return list(space.parse(config).grid(config.tune.grid_points))


def directions(config: RunConfig) -> list[Any]:
    """What Optuna looks for."""
    return list(searchers.study(space.parse(config)).directions)


def chosen(config: RunConfig) -> Any:
    """What chooses trials, and the first ones, each of which is told that small rates are good."""
    algorithm, number, _ = search.chooser(study(config))
    points = []
    for place in map(str, range(9)):
        points.append(algorithm.suggest(place))
        if isinstance(points[-1], dict):
            loss = float(points[-1]["values"].get("train.learning_rate", 1.0))
            algorithm.on_trial_complete(place, {"heldout_loss": loss, "step": 200})
    return type(algorithm).__name__, number, points


def ends(config: RunConfig) -> Any:
    """What may end trials, and when."""
    made: Any = schedulers.scheduler(space.parse(config), 600, 60)
    brackets = getattr(made, "_brackets", [])
    rungs = [[rung[0] for rung in bracket._rungs] for bracket in brackets]
    waits = [getattr(made, name, None) for name in ("_grace_period", "_perturbation_interval")]
    return type(made).__name__, rungs, waits


def trials(config: RunConfig) -> Any:
    """How each trial is cut."""
    plan = search.plan_of(study(config))
    made = objective.trial_config(plan, "t", CHOSEN)
    return objective.cut(plan, CHOSEN, None), plan.every, made.train.heldout_rows


def at_once(config: RunConfig) -> int:
    most: int = search.at_once(study(config), MACHINES)["max_concurrent_trials"]
    return most


def resources(config: RunConfig) -> Any:
    """What Ray Train is asked for by a worker of a trial."""
    import ray.train.torch

    kept: dict[str, Any] = {}

    def trainer(worker: Any, **options: Any) -> Any:
        kept.update(options)
        return SimpleNamespace(fit=lambda: None)

    store = open_store(config)
    job = pretrain._job(store, counting_corpus(config), config)
    trial = replace(job, trial=objective.Trial(10))
    with patched() as patch:
        patch.setattr(ray.train.torch, "TorchTrainer", trainer)
        pretrain._fit(trial, config, MACHINES, store)
    return kept["scaling_config"].resources_per_worker


def budget(config: RunConfig) -> dict[str, float]:
    """What two trials have used of it."""
    rows = [{"step": 1.0, "tokens": 400.0, "train_seconds": 2.0}]
    made = [Attempt(str(n), "search", 1, {}, 10.0 * n, rows, seconds=7.0) for n in range(2)]
    return ledger.spent(config.tune, made, workers=2)


def confirmed(config: RunConfig) -> list[Any]:
    """What is trained to confirm a winner."""
    return search.confirmations(study(config), {"train.learning_rate": 0.5})


def looks(config: RunConfig) -> list[Any]:
    """Steps at which a run looks at held-out rows, and at how many."""
    seen: list[Any] = []
    counted = lambda self, engine: seen.append(len(self._ids)) or float(len(seen))  # noqa: E731
    with patched() as patch:
        patch.setattr(heldout.HeldOut, "loss", counted)
        training.run(config)
    return seen
