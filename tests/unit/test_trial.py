"""A run that is watched: its gate, and a real loop that stops at it."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster import loading
from cluster.errors import ConfigError, UsageError
from cluster.stages import resolved
from cluster.storage import Store
from pipelines import pretrain
from pipelines.training import elastic, heldout, loop, trial
from pipelines.training.engine import World
from pipelines.training.trial import Gate, Trial
from tests.corpora import counting_corpus
from tests.hunting import tiny
from tests.observed_data import patched
from tests.observed_training import Remote, Scripted
from tests.tuning import NO_SEARCH
from tune import search


def test_a_gate_passes_messages_and_answers() -> None:
    gate = Gate()
    assert [gate.arrive({"step": n}) for n in (5, 10)] == [1, 2]
    assert gate.arrivals(0) == [{"step": 5}, {"step": 10}] and gate.arrivals(2) == []
    assert gate.answered(2) is None
    gate.answer(2, "save")
    assert gate.answered(2) == "save" and gate.answered(1) is None


def test_jobs_are_handed_out_one_after_another() -> None:
    gate = Gate()
    assert gate.next() == (False, None)
    for job in ("first", "second", None):
        gate.hand(job)
    assert gate.next() == (True, "first") == gate.next()  # asked again by workers that replace them
    gate.finish()
    assert gate.arrivals(0) == [{"over": 1}] and gate.next() == (True, "second")
    gate.finish()
    assert gate.next() == (True, None)


class Answering(threading.Thread):
    """Watches a gate, and answers with what a script says of each step, else `go`."""

    def __init__(self, gate: Gate, script: dict[int, list[trial.Answer]]) -> None:
        super().__init__(daemon=True)
        self.gate, self.script, self.heard = gate, script, list[dict[str, Any]]()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            for message in self.gate.arrivals(len(self.heard)):
                self.heard.append(message)
                left = self.script.get(int(message["step"]), [])
                self.gate.answer(len(self.heard), left.pop(0) if left else "go")


def watched(
    root: Path, script: dict[int, list[trial.Answer]], *, corpus: bool = True, **cut: Any
) -> Any:
    """A run of the real loop over a scripted engine: what its gate heard, and how it ended."""
    import ray

    config = tiny(root, "train.heldout_every=10", "train.checkpoint_every=100", "train.steps=100")
    store, gate = Store(str(root)), Gate()
    name = (counting_corpus(config) if corpus else store.artifact("corpus", config.name, 1)).name
    cut_ = Trial(**{"steps": 40, **cut})
    job = loop.TrainJob(resolved(config), store.uri, (name, 1), "run", "m", Remote(gate), cut_)
    watcher = Answering(gate, script)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with patched() as patch:
            patch.setattr(ray, "get", lambda answer, **options: answer)
            patch.setattr(loop, "Engine", Scripted)
            patch.setattr(loop, "Pulse", Silent)
            patch.setattr(loop, "join_world", lambda config: World(0, 1, torch.device("cpu")))
            patch.setattr(elastic, "restore", lambda engine, artifact: None)
            patch.setattr(heldout.HeldOut, "loss", lambda self, engine: float(len(self._ids)))
            watcher.start()
            ended = loop.train(job)
    finally:
        watcher.over.set()
        dist.destroy_process_group()
    return watcher.heard, ended, store.versions("checkpoint", config.name)


class Silent:
    """In the place of the signs of life, which need Ray."""

    signals = (False, False)

    @staticmethod
    def of(*arguments: Any) -> "Silent":
        return Silent()

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def at(self, *arguments: Any) -> None:
        pass

    def done(self, *arguments: Any, **options: Any) -> None:
        pass


def test_a_trial_reports_and_ends_before_its_schedule_does(tmp_path: Path) -> None:
    heard, ended, left = watched(tmp_path, {})
    assert [message["step"] for message in heard] == [10, 20, 30, 40]
    assert all(message["heldout_loss"] == 10.0 for message in heard)
    assert heard[1]["tokens"] == pytest.approx(2 * heard[0]["tokens"])
    assert ended["step"] == 40 and ended["whole"]
    assert [a.manifest.detail["step"] for a in left] == [40] and not left[0].manifest.complete


def test_a_trial_that_was_at_its_end_says_so_again(tmp_path: Path) -> None:
    first, _, _ = watched(tmp_path, {})
    again, ended, left = watched(tmp_path, {}, corpus=False)
    assert again == first[-1:] and ended["whole"] and len(left) == 1


def test_a_trial_that_goes_on_says_again_where_it_is(tmp_path: Path) -> None:
    """Its driver may have died between the checkpoint and the report."""
    watched(tmp_path, {20: ["save", "end"]})
    again, ended, _ = watched(tmp_path, {}, corpus=False)
    assert [message["step"] for message in again] == [20, 30, 40] and ended["whole"]
    other, ended, _ = watched(tmp_path, {20: ["end"]}, corpus=False, steps=60)
    assert [message["step"] for message in other] == [40, 50, 60] and ended["whole"]


def test_a_trial_that_is_told_to_end_trains_no_further(tmp_path: Path) -> None:
    heard, ended, left = watched(tmp_path, {20: ["end"]})
    assert [message["step"] for message in heard] == [10, 20]
    assert ended["step"] == 20 and not ended["whole"] and left == []


def test_a_trial_saves_when_it_is_asked_to_and_goes_on(tmp_path: Path) -> None:
    heard, ended, left = watched(tmp_path, {20: ["save", "save", "go"]})
    name = left[0].name
    assert heard[2] == heard[3] == {"step": 20, "checkpoint": [name, 1]}  # saved once
    assert ended["step"] == 40
    assert [a.manifest.detail["step"] for a in left] == [20, 40]


def test_folds_go_one_after_another_and_count_on(tmp_path: Path) -> None:
    heard, _, _ = watched(tmp_path, {}, folds=2, steps=20)
    assert [(m["fold"], m["step"]) for m in heard] == [(0, 10), (0, 20), (1, 30), (1, 40)]
    assert [m["heldout_loss"] for m in heard] == [100.0] * 4  # half of 200 rows
    assert watched(tmp_path / "ended", {10: ["end"]}, folds=2)[1]["step"] == 10


def test_a_confirmation_measures_on_the_other_rows(tmp_path: Path) -> None:
    seen: list[Any] = []
    with patched() as patch:
        usual = heldout.chosen

        def noting(*arguments: Any, **options: Any) -> list[int]:
            seen.append(usual(*arguments, **options))
            return seen[-1]

        patch.setattr(heldout, "chosen", noting)
        for confirm in (False, True):
            watched(tmp_path / str(confirm), {10: ["end"]}, confirm=confirm)
    assert not set(seen[0]) & set(seen[1])


def test_looking_at_rows_that_are_not_there_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.heldout_every=5")
    corpus = counting_corpus(config)
    pretrain.check_heldout(corpus, config)
    nothing: Any = SimpleNamespace(row_groups=lambda split: SimpleNamespace(starts=[0]))
    nothing.artifact = corpus
    with pytest.raises(UsageError, match="holds no rows out to measure on: raise data.heldout"):
        heldout.chosen(nothing, 5)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.input=stream"], "same rows in the same order, which train.input stream"),
        (["tune.steps=900"], "tune.steps 900 is more than the run has: train.steps is 750"),
        (["tune.gpus_per_worker=0.5"], "NCCL refuses: take train.workers=1, not 2"),
    ],
)
def test_a_search_that_could_not_be_fair_is_refused(overrides: list[str], reason: str) -> None:
    rate = "tune.space.train.learning_rate=loguniform(1e-4, 1e-2)"
    with pytest.raises(ConfigError, match=reason):
        search.check(loading.load("gpt-demo", [*NO_SEARCH, rate, *overrides]))
