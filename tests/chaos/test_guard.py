"""What goes wrong inside a run, and outside of it: hangs, crash loops, preemption, Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.errors import TrainingError
from cluster.journal import Event, Journal, newest_run
from cluster.storage import Artifact, Store
from pipelines import pretrain
from tests.corpora import counting_corpus
from tests.hunting import TINY, losses, tiny, training_workers, weights_digest

ROOT = Path(__file__).parents[2]


def events(root: Path, name: str) -> list[Event]:
    store = Store(str(root))
    run = newest_run(store, name)
    assert run is not None
    return list(Journal(store, run).events())


@contextmanager
def after_commit(root: Path, name: str, act: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread once the run has its first checkpoint."""
    failures: list[Exception] = []

    def wait() -> None:
        deadline = time.monotonic() + 240
        while not (root / f"checkpoint/{name}@1/COMMIT").exists():
            if time.monotonic() > deadline:
                failures.append(TimeoutError("the run never reached a checkpoint"))
                return
            time.sleep(0.02)
        try:
            act()
        except (psutil.Error, IndexError) as error:
            failures.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield
    thread.join()
    assert not failures, failures[0]


@pytest.fixture
def undisturbed(root: Path, ray_session: object) -> Artifact:
    config = tiny(root, "name=quiet")
    counting_corpus(config)
    made = pretrain.run(config).artifact
    assert made is not None
    assert [e.name for e in events(root, "quiet")] == ["launch"], "false alarms in a clean run"
    return made


def test_a_stopped_rank_is_found_in_time_and_changes_nothing(
    root: Path, undisturbed: Artifact
) -> None:
    config = tiny(root, "name=hung")
    counting_corpus(config)
    stopped: list[tuple[int, float]] = []

    def stop() -> None:
        victim = training_workers()[0]
        victim.send_signal(signal.SIGSTOP)
        stopped.append((victim.pid, time.time()))

    with after_commit(root, "hung", stop):
        finished = pretrain.run(config).artifact
    assert finished is not None
    assert losses(finished) == losses(undisturbed)
    assert weights_digest(finished) == weights_digest(undisturbed)
    told = events(root, "hung")
    assert [e.name for e in told] == ["launch", "hung_rank", "worker_lost", "launch"]
    assert told[1].fields["pid"] == stopped[0][0]
    assert told[1].nanoseconds / 1e9 - stopped[0][1] < 32  # found in 30, read and written


def test_preemption_commits_and_changes_nothing(root: Path, undisturbed: Artifact) -> None:
    config = tiny(root, "name=told")
    counting_corpus(config)

    with after_commit(root, "told", lambda: training_workers()[1].terminate()):
        finished = pretrain.run(config).artifact
    assert finished is not None
    assert weights_digest(finished) == weights_digest(undisturbed)
    told = events(root, "told")
    assert [e.name for e in told] == ["launch", "preempted", "worker_lost", "launch"]
    assert told[3].fields["step"] == told[1].fields["step"] > 5, "no step was lost"


@pytest.mark.usefixtures("ray_session")
def test_a_crash_loop_ends_with_a_diagnosis(root: Path) -> None:
    """A token that the vocabulary does not have ends a worker whenever its row comes up."""
    config = tiny(root, "name=loop", "train.max_failures=20")
    made = counting_corpus(config)
    path = root / "corpus/loop@1/train/part-00000.parquet"
    table = pq.read_table(path)
    flat = table.column("tokens").combine_chunks().flatten().to_numpy().copy()
    flat[137 * 17 : 138 * 17] = 60_000  # of row 137
    width = table.schema.field("tokens").type.list_size
    column = type(table.column("tokens").combine_chunks()).from_arrays(flat, width)
    pq.write_table(table.set_column(0, "tokens", column), path, row_group_size=16)
    assert made.manifest.detail["splits"]["train"]["rows"] == 200

    with pytest.raises(TrainingError, match="3 times in a row in step") as stopped:
        pretrain.run(config)
    names = [e.name for e in events(root, "loop")]
    # On a busy machine a start may be lost before it came to the launch; that is no crash loop.
    assert names.count("launch") == 3 <= names.count("worker_lost")
    assert names.count("crash_loop") == 1
    assert "its batch is made of 8 documents" in str(stopped.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_commits_and_continues(root: Path, number: int) -> None:
    config = tiny(root, "name=cut", "train.steps=300")
    counting_corpus(config)
    arguments = [f"storage.root={root}", *TINY, "name=cut", "train.steps=300", "ray.cpus=4"]
    command = [sys.executable, "-m", "cluster.cli", "pretrain", "gpt-demo", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not (root / "checkpoint/cut@1/COMMIT").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "heliostat: stopped; the same command continues"

    stopped = Store(str(root)).latest("checkpoint", "cut")
    assert stopped is not None and not stopped.manifest.complete
    (asked,) = [e for e in events(root, "cut") if e.name == "asked_to_stop"]
    assert stopped.manifest.detail["step"] == asked.fields["step"]

    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400)
    finished = Store(str(root)).latest("checkpoint", "cut")
    assert finished is not None and finished.manifest.complete
    assert [step for step, _ in losses(finished)] == [float(n) for n in range(1, 301)]
    launches = [e.fields["step"] for e in events(root, "cut") if e.name == "launch"]
    assert launches == [0, asked.fields["step"]]
