"""A training run in MLflow: each step once, whoever was killed, whatever was away."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import loading, tracking
from cluster.errors import HeliostatError
from cluster.storage import Store
from cluster.telemetry import Row
from cluster.tracking import Tracker, Tracking

PARAMS = {"seed": 7, "description": "y" * 900}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that MLflow has made its tables in, which takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def rows(first: int, last: int) -> list[Row]:
    return [{"step": float(n), "loss": 5.0 / n, "gradient_norm": 1.0} for n in range(first, last)]


def logged(one: Tracking) -> tuple[Any, list[tuple[int, float]]]:
    """The only run of its experiment, and its points of the loss."""
    experiment = one._client.get_experiment_by_name(one._experiment)
    (run,) = one._client.search_runs([experiment.experiment_id])
    points = one._client.get_metric_history(run.info.run_id, "loss")
    return run, [(point.step, point.value) for point in points]


def test_a_step_is_logged_once(uri: str) -> None:
    one = Tracking(uri, "once", "once-1")
    one.begin(PARAMS)
    one.log(rows(1, 700))
    one.log(rows(650, 1203))
    one.end("FINISHED", {"heldout_loss": 0.5})
    run, points = logged(one)
    assert points == [(n, 5.0 / n) for n in range(1, 1203)]
    assert run.data.params == {"seed": "7", "description": "y" * 500}
    assert run.info.status == "FINISHED" and run.data.metrics["heldout_loss"] == 0.5


def test_a_run_that_is_continued_is_one_run(uri: str) -> None:
    one = Tracking(uri, "continued", "continued-1")
    one.begin(PARAMS)
    one.log(rows(1, 11))
    one.end("KILLED")
    assert logged(one)[0].info.status == "KILLED"

    again = Tracking(uri, "continued", "continued-1")
    again.begin(PARAMS)
    assert logged(again)[0].info.status == "RUNNING"
    again.log(rows(6, 21))
    again.end("FINISHED", {"heldout_loss": 0.5})
    Tracking(uri, "continued", "continued-1").end("FINISHED", {"heldout_loss": 0.25})
    run, points = logged(again)
    assert [step for step, _ in points] == list(range(1, 21))
    assert run.data.metrics["heldout_loss"] == 0.5


def test_files_of_a_run_lie_below_the_storage_root(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the folder of whoever made the experiment, which in a job is one that Ray deletes."""
    job = tmp_path / "job"
    job.mkdir()
    monkeypatch.chdir(job)
    root = tmp_path / "根 50%41"
    config = loading.load("gpt-demo", ["name=kept", f"registry.uri={uri}"])
    one = Tracking.of(Store(str(root)), config, "kept-1")
    one.begin({})
    one._client.log_text(one._id, "定日镜", "note.txt")
    (note,) = root.rglob("note.txt")
    assert note.read_text("utf-8") == "定日镜" and note.is_relative_to(root / "mlflow/kept")
    assert list(job.iterdir()) == []


def test_figures_that_are_no_numbers_are_logged_too(uri: str) -> None:
    one = Tracking(uri, "skipped", "skipped-1")
    one.begin({})
    one.log([{"step": 1.0, "loss": float("nan"), "gradient_norm": float("inf")}])
    assert [step for step, _ in logged(one)[1]] == [1]


class Away(Tracking):
    """A server that cannot be reached for the first few calls."""

    def __init__(self, uri: str, run: str, refusals: int) -> None:
        super().__init__(uri, "away", run)
        self._left, self.back = refusals, threading.Event()

    def log(self, some: Any) -> None:
        if self._left:
            self._left -= 1
            if not self._left:
                self.back.set()
            raise HeliostatError("the registry at http://far:5000 failed: no route to host")
        super().log(some)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.02)
    yield


@pytest.mark.usefixtures("quick")
def test_a_run_does_not_wait_for_a_server_and_loses_nothing(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Away(uri, "away-1", refusals=3)
    tracker = Tracker(one, PARAMS)
    tracker.put(rows(1, 6))
    assert one.back.wait(60)
    tracker.put(rows(6, 11))
    tracker.end("FINISHED")
    run, points = logged(one)
    assert [step for step, _ in points] == list(range(1, 11))
    assert run.info.status == "FINISHED"
    said = capsys.readouterr()
    assert (said.out + said.err).count("no route to host") == 1


def test_errors_name_the_registry(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(HeliostatError, match="the registry at sqlite"):
        Tracking(f"sqlite:///{tmp_path}/file/mlflow.db", "lost", "lost-1").begin({})
