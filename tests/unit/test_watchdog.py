import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import progress
from cluster.storage import Store
from cluster.telemetry import Sign
from cluster.waiting import SILENT
from pipelines.training import watchdog

SLEEPER = """
import time
def wait_for_ever():
    print("here", flush=True)
    time.sleep(600)
wait_for_ever()
"""


def sleeper() -> tuple[subprocess.Popen, float]:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    return process, psutil.Process(process.pid).create_time()


def test_a_stopped_process_is_read_and_killed() -> None:
    process, born = sleeper()
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
    dump = watchdog.dump_and_kill(process.pid, born)
    assert dump is not None, "it was not found"
    assert "wait_for_ever" in dump and "stopped" in dump, dump
    assert process.wait(10) == -signal.SIGKILL


def test_another_process_of_the_same_number_is_left_alone() -> None:
    process, born = sleeper()
    try:
        assert watchdog.dump_and_kill(process.pid, born - 1000) is None
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert watchdog.dump_and_kill(process.pid, born) is None


def test_what_is_not_interrupted_ends_as_it_would() -> None:
    done: list[int] = []
    watchdog.stoppable(lambda: done.append(1), lambda: True, grace=5)
    assert done == [1]

    def fails() -> None:
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        watchdog.stoppable(fails, lambda: True, grace=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_waits(number: int) -> None:
    asked, done = threading.Event(), []

    def work() -> None:
        os.kill(os.getpid(), number)
        asked.wait(30)
        time.sleep(0.5)  # as a checkpoint takes
        done.append("committed")

    def ask() -> bool:
        asked.set()
        return True

    usual = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        watchdog.stoppable(work, ask, grace=30)
    assert done == ["committed"] and signal.getsignal(signal.SIGTERM) is usual


def test_nothing_waits_for_what_does_not_hear() -> None:
    never = threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        never.wait(60)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        watchdog.stoppable(work, lambda: False, grace=60)
    assert time.monotonic() - began < 30
    never.set()


def test_a_silent_rank_is_told_once_as_why_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(progress._state, "console", None)
    sign = Sign("a", 1, 2, 77, 0.0, "ab" * 14, 0, 5, "step", 5, 0.1, 0.1, 0.1)
    other = replace(sign, rank=0)
    eye = watchdog.Watchdog(None, Store(str(tmp_path)), "run", 25)
    for since in (9.0, 11.0, 12.0):
        eye._tell_silent([(sign, since, since), (other, 0.5, since)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pretrain: rank 1 (process 77 on node abababab) at step 5, step, silent")
    assert SILENT.fullmatch(line)
