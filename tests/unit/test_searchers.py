"""What the next trial is: no Ray, Optuna itself."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from cluster import loading
from cluster.errors import UsageError
from tests.tuning import NO_SEARCH
from tune import searchers, space
from tune.schedulers import Mended, clamped
from tune.searchers import Asked, Listed
from tune.space import Range, Space

RATE = "tune.space.train.learning_rate=loguniform(1e-4, 1e-1)"


def made(*overrides: str) -> Space:
    return space.parse(loading.load("gpt-demo", [*NO_SEARCH, *overrides]))


def told(asked: Asked, number: int, value: float, step: int = 10) -> Any:
    """One trial from suggestion to end."""
    chosen = asked.suggest(str(number))
    asked.on_trial_result(str(number), {"heldout_loss": value, "step": step})
    asked.on_trial_complete(str(number), {"heldout_loss": value, "step": step})
    return chosen["values"]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_the_first_trial_is_the_recipe_as_it_is(search: str) -> None:
    asked = Asked(made(RATE, f"tune.search={search}"), steps=10)
    assert asked.suggest("a") == {"values": {"train.learning_rate": 0.004}, "seed": 1337}
    assert asked.suggest("b")["values"] != {"train.learning_rate": 0.004}


def test_the_same_seed_asks_the_same() -> None:
    def some(seed: int) -> list[Any]:
        asked = Asked(made(RATE, "tune.search=random", f"seed={seed}"), steps=10)
        return [asked.suggest(str(n))["values"] for n in range(4)]

    assert some(1) == some(1) != some(2)


def test_tpe_learns_where_the_good_values_are() -> None:
    asked = Asked(made(RATE, "tune.trials=40"), steps=10)
    misses = []
    for number in range(40):
        rate = asked.suggest(str(number))["values"]["train.learning_rate"]
        misses.append(abs(math.log(rate / 0.02)))
        asked.on_trial_complete(str(number), {"heldout_loss": misses[-1], "step": 10})
    assert statistics.median(misses[-15:]) < 0.5 * statistics.median(misses[:10])


def test_what_cannot_be_and_what_was_tried_become_no_trials() -> None:
    asked = Asked(made("tune.space.train.global_batch=randint(10, 13)"), steps=10)
    found = {told(asked, number, 1.0)["train.global_batch"] for number in range(2)}
    assert found == {10, 12}  # 11 and 13 do not divide by two workers
    assert asked.suggest("more") == "FINISHED"


def test_a_space_of_nothing_but_impossible_points_is_refused() -> None:
    impossible = made("tune.space.train.global_batch=choice[11, 13]")
    for call in (
        lambda: Asked(impossible, 10).suggest("a"),
        lambda: searchers.possible(impossible),
    ):
        with pytest.raises(UsageError, match="nothing that can be trained: .*does not divide"):
            call()


def test_more_trials_than_points_are_refused_where_all_must_be_there() -> None:
    few = made("tune.space.train.weight_decay=choice[0.0, 0.1]")
    assert len(searchers.drawn(few, 2)) == 2
    with pytest.raises(UsageError, match="take tune.trials=2"):
        searchers.drawn(few, 3)


@pytest.mark.parametrize("end", ["failed", "infinite", "early"])
def test_a_bad_end_counts_as_bad(end: str) -> None:
    asked = Asked(made(RATE), steps=10)
    asked.suggest("a")
    if end == "early":
        asked.on_trial_result("a", {"heldout_loss": 9.0, "step": 4})
    value = 9.0 if end == "early" else float("inf")
    asked.on_trial_complete("a", {"heldout_loss": value, "step": 4}, error=end == "failed")
    (trial,) = [t for t in asked._study.trials if t.state.is_finished()]
    assert trial.state.name == "PRUNED"
    assert told(asked, 1, 1.0) and len(asked._study.best_trials) == 1


def test_several_objectives_are_all_told() -> None:
    objectives = "tune.objectives={heldout_loss: min, predictions_per_second: max}"
    asked = Asked(made(RATE, objectives, "tune.scheduler=none"), steps=10)
    for number, pair in enumerate([(1.0, 5.0), (2.0, 9.0), (3.0, 1.0)]):
        asked.suggest(str(number))
        result = dict(zip(("heldout_loss", "predictions_per_second"), pair, strict=True))
        asked.on_trial_complete(str(number), {**result, "step": 10})
    assert len(asked._study.best_trials) == 2


@pytest.mark.parametrize("kind", ["asked", "listed"])
def test_a_search_goes_on_where_it_was_saved(tmp_path: Path, kind: str) -> None:
    def fresh() -> Any:
        points = [{"train.weight_decay": n / 10} for n in range(4)]
        return Asked(made(RATE), 10) if kind == "asked" else Listed(points, 1)

    first, second = fresh(), fresh()
    first.suggest("a")
    first.save(str(tmp_path / "state"))
    following = first.suggest("b")
    second.restore(str(tmp_path / "state"))
    assert second.suggest("b") == following
    second.on_trial_complete("a", {"heldout_loss": 1.0, "step": 10})


def test_perturbed_values_stay_in_the_space() -> None:
    mended = Mended(made("tune.space.train.weight_decay=uniform(0, 0.5)", RATE))
    found = mended({"seed": 1, "values": {"train.weight_decay": 0.6, "train.learning_rate": 1e-5}})
    assert found["values"] == {"train.weight_decay": 0.5, "train.learning_rate": 1e-4}
    assert clamped(Range(2, 9, whole=True, step=3), 7.6) == 8
