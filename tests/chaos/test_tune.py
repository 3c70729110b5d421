"""A search whose driver is killed goes on; folds, dying workers, money and time on a real Ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import loading
from cluster.stages import BY_VERB, fingerprint, required
from cluster.storage import Store
from tests import trained
from tests.corpora import counting_corpus
from tests.hunting import losses, training_workers
from tests.tuning import attempts_of, searched, searching
from tune import search
from tune.ledger import Ledger

PATIENCE_SECONDS = 300
SPACE = "tune.space={train.learning_rate: 'loguniform(0.001, 0.1)'}"


def started(recipe: Path, log: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cluster.cli", *(words or ("tune",)), str(recipe)]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def test_a_search_whose_driver_is_killed_goes_on(tmp_path: Path) -> None:
    """kill -9 while trials run; the same command ends the same study, of as many trials."""
    root, recipe, log = tmp_path / "root", tmp_path / "recipe.yaml", tmp_path / "log"
    overrides = (SPACE, "train.steps=200", "tune.report_every=20", "tune.trials=4", "ray.cpus=2")
    config = searching(root, *overrides, "train.checkpoint_every=20")
    recipe.write_text(loading.dump(config), "utf-8")
    config = loading.load(str(recipe))
    counting_corpus(config)
    corpus = required("tune", Store(str(root)), config)
    mark = fingerprint(BY_VERB["tune"], config, corpus, {})
    book = Ledger(Store(str(root)), f"{config.name}-tune-{mark[:10]}")

    driver = started(recipe, log)
    try:
        wait_for(lambda: any(len(a.rows) >= 3 for a in book.attempts()), driver, log)
        before = {a.trial: a for a in book.attempts()}
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert Store(str(root)).latest("study", config.name) is None

    again = started(recipe, log)
    assert again.wait(PATIENCE_SECONDS) == 0, log.read_text("utf-8")[-3000:]
    assert "tune: going on with" in log.read_text("utf-8")
    made = Store(str(root)).latest("study", config.name)
    assert made is not None
    every = attempts_of(made)
    assert len([a for a in every if a.role == "search"]) == 4
    assert set(before) <= {a.trial for a in every}
    for one in every:
        old = before.get(one.trial)
        assert old is None or old.values == one.values
        # What was reported before the kill is what the continued run says of the same step.
        told = {row["step"]: row["heldout_loss"] for row in (old.rows if old else [])}
        assert [row["step"] for row in one.rows] == [20.0 * (n + 1) for n in range(len(one.rows))]
        assert all(
            row["heldout_loss"] == told.get(row["step"], row["heldout_loss"]) for row in one.rows
        )


def test_up_searches_and_pretrains_with_what_was_found(tmp_path: Path) -> None:
    """From files to a published model; once more, and there is nothing left to do."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for number in range(60):
        lines = [
            f"{number} 定日镜跟随太阳 {number + k}, the mirror follows the sun" for k in range(12)
        ]
        (sources / f"{number:03d}.txt").write_text("\n".join(lines), "utf-8")
    root, recipe, log = tmp_path / "root", tmp_path / "recipe.yaml", tmp_path / "log"
    config = searching(
        root,
        f"data.sources=[{sources}]",
        "data.vocab_size=400",
        "evaluate.sample_tokens=4",
        "train.steps=20",
        "train.learning_rate=0.0003",
        "tune.space={train.learning_rate: [0.0003, 0.03]}",
        "tune.trials=2",
        "tune.scheduler=none",
        "tune.enabled=true",
        "ray.cpus=2",
    )
    recipe.write_text(loading.dump(config), "utf-8")
    up = started(recipe, log, "up", "--to", "publish")
    assert up.wait(PATIENCE_SECONDS) == 0, log.read_text("utf-8")[-3000:]

    store = Store(str(root))
    made, model = store.latest("study", config.name), store.latest("model", config.name)
    finished = store.latest("checkpoint", config.name)
    assert made is not None and finished is not None and model is not None
    found = made.manifest.detail["overrides"]
    assert found == {"train.learning_rate": 0.03}
    assert finished.manifest.config["train"]["learning_rate"] == 0.03
    best = next(one for one in attempts_of(made) if one.values == found)
    own = dict(losses(finished))
    assert best.rows and all(own[row["step"]] == row["loss"] for row in best.rows)

    again = started(recipe, log, "up", "--to", "publish")
    assert again.wait(PATIENCE_SECONDS) == 0, log.read_text("utf-8")[-3000:]
    assert log.read_text("utf-8").count(": skipped, ") == 5
    assert [one.version for one in store.versions("model", config.name)] == [model.version]


def wait_for(there: Any, driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not there():
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text("utf-8")[-3000:]
        time.sleep(0.2)


@pytest.mark.usefixtures("ray_session")
def test_folds_are_one_trials_inner_loop(root: Path) -> None:
    config = trained.image_config(
        root,
        train={"steps": 8, "global_batch": 6, "warmup_steps": 1, "workers": 1, "zero_stage": 1},
        tune={
            "space": {"train.learning_rate": "choice[0.001, 0.01]"},
            "folds": 3,
            "trials": 2,
            "report_every": 4,
            "concurrent": 2,
            "scheduler": "none",
            "confirm_seeds": 1,
        },
    )
    trained.corpus(config, trained.pictures(36), trained.pictures(8, seed=1))
    made = search.run(config).artifact
    assert made is not None
    trials = [a for a in attempts_of(made) if a.role == "search"]
    for one in trials:
        assert [row["fold"] for row in one.rows] == [0, 0, 1, 1, 2, 2]
        assert one.last["folds"] == 3 and one.last["heldout_deviation"] > 0
    page = made.read_bytes("report.html").decode()
    assert "±" in page


@pytest.mark.usefixtures("ray_session")
def test_a_dying_worker_is_replaced_within_its_trial(root: Path) -> None:
    """It goes on from its checkpoint, and has reported each step once."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not killed and time.monotonic() < deadline:
            reported = [p for p in root.glob("runs/*/trials/*.json") if "step" in p.read_text()]
            if reported and (workers := training_workers()):
                workers[0].kill()
                killed.append(workers[0].pid)
            time.sleep(0.1)

    config = searching(root, SPACE, "tune.trials=1", "train.steps=200", "tune.scheduler=none")
    hunter = threading.Thread(target=kill, daemon=True)
    hunter.start()
    made = searched(config)
    hunter.join()
    (trial,) = attempts_of(made)
    assert killed and trial.state == "done"
    assert [row["step"] for row in trial.rows] == [10.0 * (n + 1) for n in range(20)]
    assert len(list(root.glob("runs/*/journal/*-worker_lost.json"))) == 1


@pytest.mark.usefixtures("ray_session")
def test_a_budget_ends_the_search_and_not_before(root: Path) -> None:
    config = searching(root, SPACE, "tune.trials=50", "tune.tokens=12000", "tune.scheduler=none")
    trials = attempts_of(searched(config))
    used = sum(one.tokens for one in trials)
    per_report = 10 * 8 * 16
    assert 12_000 <= used <= 12_000 + 2 * per_report and len(trials) < 50


@pytest.mark.usefixtures("ray_session")
def test_several_objectives_leave_a_front(root: Path) -> None:
    config = searching(
        root,
        "tune.space={model.layers: [1, 2, 3]}",
        "tune.objectives={heldout_loss: min, parameters: min}",
        "tune.scheduler=none",
        "tune.trials=3",
    )
    made = searched(config)
    sizes = {one.values["model.layers"]: one.last["parameters"] for one in attempts_of(made)}
    assert sizes[1] < sizes[2] < sizes[3] and made.manifest.metrics["front"] >= 1


@pytest.mark.usefixtures("ray_session")
def test_population_based_training_goes_on_from_the_better_weights(root: Path) -> None:
    """The worse trial takes the better one's ZeRO checkpoint: its loss does not start again."""
    config = searching(
        root,
        "tune.space={train.learning_rate: 'choice[0.00001, 0.03]'}",
        "train.learning_rate=0.03",
        "tune.search=random",
        "tune.scheduler=pbt",
        "tune.trials=2",
        "tune.perturb_every=20",
    )
    trials = attempts_of(searched(config))
    assert [one.state for one in trials] == ["done", "done"]
    loss = [{row["step"]: row["heldout_loss"] for row in one.rows} for one in trials]
    worse, better = sorted(loss, key=lambda of: -of[20])
    # No rate gets from the one to the other in ten steps, and the slow one by itself gets nowhere.
    assert worse[10] - worse[20] < 0.1 < 0.5 < worse[20] - better[20]
    assert abs(worse[30] - better[20]) < 0.3 * (worse[20] - better[20])
    assert worse[40] < (worse[20] + better[20]) / 2


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("search", "scheduler"), [("grid", "median"), ("random", "none")])
def test_other_searchers_and_schedulers(root: Path, search: str, scheduler: str) -> None:
    config = searching(
        root,
        "tune.space={train.weight_decay: [0.0, 0.2], train.global_batch: [8, 7]}",
        "train.workers=2",
        f"tune.search={search}",
        f"tune.scheduler={scheduler}",
        "tune.trials=2",
        "tune.steps=10",
    )
    trials = attempts_of(searched(config))
    assert [one.state for one in trials if one.state != "ended"][:1] == ["done"]
    assert {one.values["train.weight_decay"] for one in trials} <= {0.0, 0.1, 0.2}
    assert all(one.values["train.global_batch"] == 8 for one in trials)  # 7 is not for two workers


@pytest.mark.usefixtures("ray_session")
def test_a_winner_is_confirmed_beside_the_recipe(root: Path) -> None:
    config = searching(
        root,
        "tune.space={train.learning_rate: [0.0003, 0.03]}",
        "train.learning_rate=0.0001",
        "tune.trials=2",
        "tune.scheduler=none",
        "tune.confirm_seeds=1",
    )
    made = searched(config)
    runs = [one for one in attempts_of(made) if one.role != "search"]
    assert sorted((one.role, one.seed) for one in runs) == [
        ("recipe", 1337),
        ("recipe", 1338),
        ("winner", 1337),
        ("winner", 1338),
    ]
    figures = made.manifest.metrics
    assert figures["gain"] > 2 * figures["noise"] > 0


@pytest.mark.usefixtures("ray_session")
def test_a_trial_that_diverges_counts_as_bad_and_ends_nothing(root: Path) -> None:
    config = searching(
        root,
        "tune.space={train.learning_rate: [0.0003, 0.03, 10.0]}",
        "train.weight_decay=10",  # at a rate of 10, weights grow a hundredfold at each step
        "tune.trials=3",
        "tune.scheduler=none",
    )
    made = searched(config)
    trials = attempts_of(made)
    assert sorted(one.state for one in trials) == ["done", "done", "failed"]
    assert ["finite" in one.reason for one in trials] == [o.state == "failed" for o in trials]
    assert made.manifest.metrics["failed"] == 1
    assert made.manifest.detail["overrides"]["train.learning_rate"] < 10
