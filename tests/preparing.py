"""Runs of `prepare` that are killed, and what they had finished by then."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipelines.data import scratch


def records(version: Path, kind: str) -> dict[str, int]:
    """Inodes of the notes on finished work by name; a file that is written again has another."""
    found = {}
    for path in (version / scratch.FOLDER).glob(f"{kind}-*.json"):
        found[path.name] = path.stat().st_ino
    return found


def killed_driver(overrides: list[str], address: str, when: Callable[[], bool]) -> None:
    """Start `heliostat prepare gpt-demo` on a running Ray and end it with SIGKILL in time."""
    command = [sys.executable, "-m", "cluster.cli", "prepare", "gpt-demo", *overrides]
    driver = subprocess.Popen(
        [*command, f"ray.address={address}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while driver.poll() is None:
            if when():
                driver.send_signal(signal.SIGKILL)
                return
            time.sleep(0.002)
        output = driver.stdout.read().decode() if driver.stdout else ""
        raise AssertionError(f"ended by itself with {driver.returncode}: {output[-2000:]}")
    finally:
        driver.kill()
        driver.communicate()


class WorkerHunter:
    """Kills workers of this process's Ray in the middle of a task of Ray Data."""

    def __init__(self, kills: int) -> None:
        self._kills, self.killed = kills, list[int]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hunt, daemon=True)

    def __enter__(self) -> "WorkerHunter":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _hunt(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.002) and len(self.killed) < self._kills:
            for process in me.children(recursive=True):
                try:
                    busy = "MapBatches" in " ".join(process.cmdline())
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
                if busy and process.pid not in self.killed:
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed.append(process.pid)
                    break
