"""What trials did, kept in files, and what a study comes to."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import loading, progress
from cluster.config import RunConfig
from cluster.storage import Store
from tests.tuning import NO_SEARCH
from tune import ledger, outcome, plots, report, space, watching
from tune.ledger import Attempt, Ledger, State

RATES = "tune.space.train.learning_rate=loguniform(1e-4, 1e-1)"
LAYERS = "tune.space.model.layers=choice[1, 2]"


def config(*overrides: str) -> RunConfig:
    return loading.load("gpt-demo", [*NO_SEARCH, RATES, LAYERS, *overrides])


def attempt(
    name: str, loss: float, state: State = "done", role: str = "search", seed: int = 1, **more: Any
) -> Attempt:
    rows = [
        {
            "step": step,
            "loss": loss + 1,
            "heldout_loss": loss + 1 / step,
            "tokens": 10 * step,
            "train_seconds": step / 2,
            "parameters": 100.0 - loss,
        }
        for step in (1.0, 2.0, 4.0)
    ]
    values = {"train.learning_rate": 10 ** -(loss + 1), "model.layers": 1 + int(loss) % 2}
    return Attempt(
        name,
        role,
        seed,
        values,
        began=float(len(name)),
        rows=rows,
        state=state,
        seconds=3.0,
        **more,
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    book = Ledger(Store(str(tmp_path)), "study")
    failed = attempt("二", 1.0, "failed", reason="发散").reported(
        {"step": 5, "heldout_loss": math.inf, "done": True, "state": "failed"}, {"a": 1}
    )
    for one in (failed, attempt("a", 2.0)):
        book.write(one)
    found = book.attempts()
    assert {a.trial for a in found} == {"a", "二"}
    (again,) = [a for a in found if a.trial == "二"]
    assert again.last["heldout_loss"] == math.inf and again == failed
    assert book.read("nobody") is None


def test_a_step_that_comes_again_replaces_what_it_said() -> None:
    one = attempt("a", 1.0)
    again = one.reported({"step": 2, "heldout_loss": 7.0, "tokens": 20}, one.values)
    assert [row["step"] for row in again.rows] == [1.0, 2.0]
    assert again.last["heldout_loss"] == 7.0 and again.turns == []


def test_values_that_change_on_the_way_are_all_told() -> None:
    one = attempt("a", 1.0)
    other = one.reported({"step": 6, "tokens": 5}, {"train.learning_rate": 0.5})
    assert other.turns == [(0, one.values), (6, {"train.learning_rate": 0.5})]
    # Weights of another replaced its own: what those cost is spent all the same.
    assert other.tokens == 40 and other.values == {"train.learning_rate": 0.5}


def test_the_best_came_to_its_end() -> None:
    trials = [
        attempt("a", 3.0),
        attempt("bb", 1.0, "ended"),
        attempt("ccc", 2.0),
        attempt("dddd", 0.0, "failed"),
    ]
    best = ledger.best(trials, "heldout_loss", "min")
    assert best is not None and best.trial == "ccc"
    early = ledger.best(trials[1:2], "heldout_loss", "min")
    assert early is not None and early.trial == "bb"
    most = ledger.best(trials, "heldout_loss", "max")
    assert most is not None and most.trial == "a"
    assert ledger.best(trials[3:], "heldout_loss", "min") is None


def test_a_front_holds_what_nothing_beats() -> None:
    trials = [attempt("a", 1.0), attempt("b", 2.0), attempt("c", 3.0)]
    both = {"heldout_loss": "min", "parameters": "min"}
    assert len(ledger.front(trials, both)) == 3
    assert [a.trial for a in ledger.front(trials, {"heldout_loss": "min"})] == ["a"]


def test_budgets_are_shares_of_what_there_is() -> None:
    settings = config("tune.tokens=160", "tune.money=1", "tune.price_per_hour=600").tune
    used = ledger.spent(settings, [attempt("a", 1.0), attempt("b", 2.0)], workers=2)
    assert used == pytest.approx({"tokens": 0.5, "money": 2.0})


def summed(attempts: list[Attempt], **overrides: str) -> outcome.Outcome:
    winner = ledger.best([a for a in attempts if a.role == "search"], "heldout_loss", "min")
    assert winner is not None
    return outcome.summary(config(), attempts, winner, every=2)


def confirmations(winner: list[float], recipe: list[float]) -> list[Attempt]:
    sides = {"winner": winner, "recipe": recipe}
    return [
        attempt(f"{role}{seed}", loss, role=role, seed=seed)
        for role, losses in sides.items()
        for seed, loss in enumerate(losses)
    ]


def test_a_gain_is_shown_beside_the_noise() -> None:
    found = summed([attempt("a", 1.0), *confirmations([1.0, 1.2], [2.0, 2.2])])
    assert found.figures["gain"] == pytest.approx(1.0)
    assert found.figures["noise"] == pytest.approx(math.sqrt(0.02))
    assert "is more than" in found.text
    unsure = summed([attempt("a", 1.0), *confirmations([1.0, 2.0], [1.1, 2.1])])
    assert "not clearly more" in unsure.text


def test_a_failed_trial_spent_what_it_had_reported() -> None:
    rows = [{"step": 1.0, "train_seconds": 2.0}, {"step": 2.0, "train_seconds": math.inf}]
    assert Attempt("a", "search", 1, {}, 0.0, rows, state="failed").train_seconds == 2.0


def test_every_fold_spends() -> None:
    counts = [(0, 640.0), (0, 1280.0), (1, 640.0), (1, 1280.0)]
    rows = [{"step": float(n), "fold": float(f), "tokens": t} for n, (f, t) in enumerate(counts)]
    one = Attempt("a", "search", 1, {}, 0.0, rows)
    assert one.tokens == 2560.0
    assert one.reported({"step": 9, "tokens": 1280.0}, {}).tokens == 2560.0  # it failed


def test_a_winner_that_is_the_recipe_is_called_that() -> None:
    own = attempt("a", 1.0)
    own = replace(own, values={"train.learning_rate": config().train.learning_rate})
    assert "That is the recipe as it is" in summed([own, *confirmations([1.0, 1.2], [])]).text
    other = summed([attempt("a", 1.0), *confirmations([1.0, 1.2], [])])
    assert "No run could be finished with the recipe as it is" in other.text


def test_without_a_confirmation_nothing_is_claimed() -> None:
    found = summed([attempt("a", 1.0), attempt("b", 2.0, "failed")])
    assert "gain" not in found.figures and "gain" not in found.text
    assert found.figures["failed"] == 1


def test_the_best_recipe_stands_alone(tmp_path: Path) -> None:
    tuned = config(f"storage.root={tmp_path}/数据", "seed=5", "tune.enabled=true")
    found = summed([attempt("a", 1.0)])
    path = tmp_path / "best.yaml"
    path.write_text(outcome.best_recipe(tuned, found), encoding="utf-8")
    again = loading.load(str(path))
    assert again.train.learning_rate == pytest.approx(0.01) and again.model.layers == 2
    assert again.train.heldout_every == 2 and not again.tune.enabled and not again.tune.space
    for section in ("name", "seed", "storage", "data"):
        assert getattr(again, section) == getattr(tuned, section)
    assert "train.learning_rate: " in path.read_text("utf-8")


def test_the_page_shows_every_trial_and_five_pictures() -> None:
    trials = [attempt("a" * (n + 1), 0.4 * n) for n in range(6)]
    trials += [attempt("<b>", 9.0, "failed", reason="定日镜")]
    every = [*trials, *confirmations([1.0, 1.2], [2.0, 2.2])]
    found = summed(every)
    text = report.page(space.parse(config()), every, found).decode()
    assert text.count("<img") == 5 and "&lt;b&gt;" in text and "定日镜" in text
    assert "Importance" not in text  # it is in the picture
    assert all(f"<td>{a.trial}</td>" in text for a in trials[:-1])


def test_importance_finds_what_mattered_and_keeps_quiet_without_trials() -> None:
    made = space.parse(config())
    trials = []
    for number in range(24):
        rate, layers = 10 ** -(1 + 3 * (number % 12) / 11), 1 + number % 2
        row = {"step": 1.0, "heldout_loss": math.log(rate)}
        values = {"train.learning_rate": rate, "model.layers": layers}
        trials.append(Attempt(str(number), "search", 1, values, 0.0, [row], state="done"))
    weights = plots.importance(made, trials, "heldout_loss")
    assert weights["train.learning_rate"] > 0.8 > weights["model.layers"]
    assert plots.importance(made, trials[:2], "heldout_loss") == {}
    same = [attempt(str(n), 1.0) for n in range(8)]
    assert plots.importance(made, same, "heldout_loss") == {}


def test_a_terminal_shows_the_trials_as_they_are_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    monkeypatch.setitem(progress._state, "console", terminal)
    table = watching.Table(config())
    running, lost = attempt("first", 2.0, "running"), attempt("gone", 2.0, "ended", role="lost")
    table.show(lambda: [running, lost])
    table.show(list)  # so soon after the last time it stays as it is
    table.end(lambda: [replace(running, state="done"), attempt("二", 1.0, "failed")])
    drawn = terminal.file.getvalue()
    assert table.live and "1 trials" in drawn and "gone" not in drawn
    last = drawn[drawn.rindex("2 trials") :]
    assert all(word in last for word in ("first", "done", "二", "failed", "2.25", "0.001", "4"))
    assert "running" not in last
