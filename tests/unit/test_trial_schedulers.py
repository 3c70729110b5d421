"""What ends trials compares them at the same place, also where the driver died in between."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle as pickle
from ray.tune.schedulers import TrialScheduler

from cluster import loading
from cluster.stages import resolved
from cluster.storage import Store
from tests.tuning import NO_SEARCH
from tune import schedulers, space
from tune.ledger import Attempt, Ledger, State
from tune.objective import Plan
from tune.watching import Watch

BATCH, STEPS = 8, 90
RATE = "tune.space.train.learning_rate=loguniform(1e-4, 1e-1)"


def again(
    root: Path, kind: str, reports: dict[str, list[tuple[int, float]]], state: State = "running"
) -> Any:
    """The scheduler of a search that goes on, after these reports of its trials: step, loss."""
    config = loading.load(
        "gpt-demo", [*NO_SEARCH, RATE, f"tune.scheduler={kind}", f"train.global_batch={BATCH}"]
    )
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
