"""What the main job takes on this machine: seconds per stage and peak memory, from nothing.

Runs `heliostat up` for the two recipes of the first day, each into an empty storage root, and
watches the memory of everything that it starts (proportional set size, so that shared pages count
once). Run it with `make bench`, or one recipe alone: `python benchmarks/main_job.py digits-cnn`.
"""

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

RECIPES = ("gpt-demo", "digits-cnn")
SAMPLE_SECONDS = 1.0


class PeakMemory(threading.Thread):
    """Largest sum of the proportional set sizes of a process and its descendants, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._ended, self.peak = psutil.Process(pid), threading.Event(), 0

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._sum())

    def finish(self) -> int:
        self._ended.set()
        self.join()
        return self.peak

    def _sum(self) -> int:
        try:
            family = [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        return sum(map(_proportional_bytes, family))


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def measure(recipe: str, root: Path) -> dict[str, float]:
    """Run a recipe from nothing; figures by name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cluster.cli", "up", recipe, "--json"]
    command += [f"storage.root={root}", f"serve.port={port}", "serve.wait=false"]
    began = time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = PeakMemory(run.pid)
    memory.start()
    output, _ = run.communicate()
    seconds, peak = time.monotonic() - began, memory.finish()
    if run.returncode:
        raise SystemExit(f"{recipe} ended with {run.returncode}")
    summary = json.loads(output.splitlines()[-1])
    figures = {"seconds": seconds, "peak_gib": peak / 2**30}
    for stage in summary["stages"]:
        figures[f"{stage['stage']}_seconds"] = stage["seconds"]
        figures |= {
            f"{stage['stage']}_{key}": value
            for key, value in stage["metrics"].items()
            if key in {"bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "accuracy"}
        }
    return {f"{recipe}.{key}": round(value, 3) for key, value in figures.items()}


def main(recipes: list[str]) -> None:
    figures: dict[str, float] = {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as root:
            figures |= measure(recipe, Path(root))
    for name, value in figures.items():
        print(f"{name:<40} {value:>10.3f}")
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main(sys.argv[1:] or list(RECIPES))
