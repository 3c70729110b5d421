"""What ends trials compares them at the same place, also where the driver died in between."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle as pickle
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from cluster import loading
from cluster.errors import CapacityError
from cluster.session import Session
from cluster.stages import resolved
from cluster.storage import Store
from tests import observed_tuning
from tests.tuning import NO_SEARCH
from tune import schedulers, search, space
from tune.ledger import Attempt, Ledger, State
from tune.objective import Plan
from tune.watching import Watch

BATCH, STEPS = 8, 90
RATE = "tune.space.train.learning_rate=loguniform(1e-4, 1e-1)"


def again(
    root: Path,
    kind: str,
    reports: dict[str, list[tuple[int, float]]],
    state: State = "running",
    overrides: tuple[str, ...] = (),
) -> Any:
    """The scheduler of a search that goes on, after these reports of its trials: step, loss."""
    own = (f"tune.scheduler={kind}", f"train.global_batch={BATCH}", *overrides)
    config = loading.load("gpt-demo", [*NO_SEARCH, RATE, *own])
    book = Ledger(Store(str(root)), "study")
    for trial, told in reports.items():
        rows = [row(*one) for one in told]
        book.write(Attempt(trial, "search", 1, {}, 0.0, rows, state=state if rows else "running"))
    made = schedulers.scheduler(space.parse(config), STEPS, 10, book)
    made = pickle.loads(pickle.dumps(made))
    made.set_search_properties("heldout_loss", "min")
    for trial in reports:
        made.on_trial_add(None, named(trial))
    return made


def row(step: int, loss: float) -> dict[str, float]:
    return {"step": float(step), "samples": float(step * BATCH), "heldout_loss": loss}


def named(trial: str) -> Any:
    return KNOWN.setdefault(trial, SimpleTrial(trial_id=trial))


class SimpleTrial(SimpleNamespace):
    def __hash__(self) -> int:
        return hash(self.trial_id)


KNOWN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _no_one_is_known() -> None:
    KNOWN.clear()


def test_asha_knows_what_was_reported_before(tmp_path: Path) -> None:
    """The first trial is far: its next report is no first one for others to be held against."""
    made = again(tmp_path, "asha", {"first": [(10, 2.2), (20, 1.3), (30, 0.4)], "other": []})
    first, other = named("first"), named("other")
    assert made.on_trial_result(None, first, row(40, 0.3)) == TrialScheduler.CONTINUE
    assert made.on_trial_result(None, other, row(10, 2.0)) == TrialScheduler.CONTINUE
    made.on_trial_add(None, named("worse"))
    assert made.on_trial_result(None, named("worse"), row(10, 2.4)) == TrialScheduler.STOP


def test_what_was_ended_before_is_ended_at_its_next_report(tmp_path: Path) -> None:
    for kind in ("asha", "median"):
        made = again(tmp_path / kind, kind, {"ended": [(10, 2.2)], "other": []}, state="ended")
        assert made.on_trial_result(None, named("other"), row(10, 2.0)) == TrialScheduler.CONTINUE
        assert made.on_trial_result(None, named("ended"), row(20, 0.1)) == TrialScheduler.STOP


def test_trials_that_ray_does_not_know_of_are_lost(tmp_path: Path) -> None:
    """The driver was killed before it had noted them, and the search begins them again."""
    config = loading.load("gpt-demo", [*NO_SEARCH, RATE, f"storage.root={tmp_path}"])
    plan = Plan(resolved(config), str(tmp_path), ("gpt-demo", 1), "study", "t", 40, 10, False)
    book = Ledger(Store(str(tmp_path)), "study")
    for trial, role in (("known", "search"), ("new", "search"), ("confirmed", "winner")):
        book.write(Attempt(trial, role, 1, {}, 0.0))
    watch = pickle.loads(pickle.dumps(Watch(plan, ("search",))))
    watch.on_step_begin(0, [named("known")])
    assert {a.trial: a.role for a in book.attempts()} == {
        "known": "search",
        "new": "lost",
        "confirmed": "winner",
    }
    book.write(Attempt("later", "search", 1, {}, 0.0))
    watch.on_step_begin(1, [named("known")])
    later = book.read("later")
    assert later is not None and later.role == "search"


def test_median_knows_it_too_and_counts_a_report_once(tmp_path: Path) -> None:
    told = [(10, 2.0), (20, 1.8), (30, 1.6)]
    made = again(tmp_path, "median", {"a": told, "b": told, "c": [(10, 1.9)], "d": [(10, 3.0)]})
    assert made.on_trial_result(None, named("a"), row(30, 1.6)) == TrialScheduler.CONTINUE
    assert len(made._results[named("a")]) == 3
    assert made.on_trial_result(None, named("c"), row(20, 1.5)) == TrialScheduler.CONTINUE
    assert made.on_trial_result(None, named("d"), row(20, 2.9)) == TrialScheduler.STOP


class Running:
    """As much of Ray's controller as a population asks for."""

    search_alg = None

    def __init__(self, made: Any, *trials: str) -> None:
        self.made, self.trials = made, [Member(name) for name in trials]
        for trial in self.trials:
            made.on_trial_add(self, trial)

    def get_trials(self) -> list[Any]:
        return self.trials

    def reports(self, trial: "Member", step: int, loss: float) -> Any:
        decision = self.made.on_trial_result(self, trial, row(step, loss))
        if decision == TrialScheduler.PAUSE:  # Ray saves it and has it stop
            trial.status, trial.checkpoint = Trial.PAUSED, f"{trial.trial_id} at {step}"
        return decision

    def chosen(self) -> list[str]:
        """Trials that begin now, or go on."""
        names = []
        while (trial := self.made.choose_trial_to_run(self)) is not None:
            trial.status = Trial.RUNNING
            names.append(trial.trial_id)
        return sorted(names)


class Member:
    """A trial as a population sees it."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = self.experiment_tag = trial_id
        self.config: dict[str, Any] = {"values": {"train.learning_rate": 0.01}, "seed": 1}
        self.status, self.checkpoint = Trial.PENDING, ""
        manager = SimpleNamespace(
            checkpoint_config=SimpleNamespace(num_to_keep=None), _latest_checkpoint_result=None
        )
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)
        self.temporary_state = SimpleNamespace(saving_to=None)

    @property
    def taken(self) -> Any:
        """The checkpoint of another that it goes on from."""
        found = self.run_metadata.checkpoint_manager._latest_checkpoint_result
        return found and found.checkpoint

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag


def population(root: Path, *trials: str) -> Running:
    """Of trials that exchange every 20 steps."""
    own = ("tune.search=random", "tune.perturb_every=20")
    made = again(root, "pbt", {}, overrides=own)
    return Running(made, *trials)


def test_a_population_waits_for_who_is_slower(tmp_path: Path) -> None:
    ours = population(tmp_path, "early", "late")
    early, late = ours.trials
    assert ours.chosen() == ["early", "late"]
    assert ours.reports(early, 10, 4.0) == TrialScheduler.CONTINUE
    assert ours.reports(early, 20, 3.0) == TrialScheduler.PAUSE
    assert ours.chosen() == [] and late.taken is None
    ours.reports(late, 20, 1.0)
    assert ours.chosen() == ["early", "late"]
    assert early.taken == "late at 20" and late.taken is None
    assert early.config["values"]["train.learning_rate"] != 0.01
    assert ours.reports(early, 30, 1.0) == TrialScheduler.CONTINUE
    assert ours.reports(early, 40, 0.9) == TrialScheduler.PAUSE


def test_a_population_does_not_wait_for_who_is_gone(tmp_path: Path) -> None:
    """One fails while the others wait for it, and the last one goes on alone."""
    ours = population(tmp_path, "good", "bad", "failing")
    good, bad, failing = ours.trials
    ours.chosen()
    ours.reports(good, 20, 1.0)
    ours.reports(bad, 20, 2.0)
    assert ours.chosen() == []
    failing.status = Trial.ERROR
    assert ours.chosen() == ["bad", "good"] and bad.taken == "good at 20"
    ours.reports(good, 40, 0.5)
    bad.status = Trial.TERMINATED
    assert ours.chosen() == ["good"] and good.taken is None


def test_a_population_that_goes_on_after_a_kill_does_not_stand_still(tmp_path: Path) -> None:
    """Its scheduler knows nothing of the steps before; and others may begin when some are done."""
    ours = population(tmp_path, "a", "b")
    a, b = ours.trials
    ours.chosen()
    ours.reports(a, 80, 1.0)
    ours.reports(b, 80, 2.0)
    assert ours.chosen() == ["a", "b"] and b.taken == "a at 80"
    a.status = b.status = Trial.TERMINATED
    ours.trials += [Member("c"), Member("d")]
    c, d = ours.trials[2:]
    for trial in (c, d):
        ours.made.on_trial_add(ours, trial)
    assert ours.chosen() == ["c", "d"]
    ours.reports(c, 20, 3.0)
    ours.reports(d, 20, 2.0)
    assert ours.chosen() == ["c", "d"] and c.taken == "d at 20"


def test_a_population_of_one_is_refused(tmp_path: Path) -> None:
    pbt = ("tune.search=random", "tune.scheduler=pbt", "train.workers=2")
    config = loading.load("gpt-demo", [*NO_SEARCH, RATE, *pbt, f"storage.root={tmp_path}"])
    small = Session(ours=True, dashboard="", cpus=3, gpus=0, nodes=("here",))
    with pytest.raises(CapacityError, match="room for 1 of 2 workers: take fewer workers, or asha"):
        search.at_once(observed_tuning.study(config), small)
