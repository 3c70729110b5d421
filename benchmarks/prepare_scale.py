"""Whether `prepare` grows with the nodes, and whether its memory does not grow with the corpus.

`python benchmarks/prepare_scale.py nodes [MB [PAIRS]]`: one node of one CPU against two, on this
machine, in turn; a head without CPUs holds the driver. Seconds are those of the whole command, and
Ray's own processes share the same cores: the ratio is a lower bound.

`python benchmarks/prepare_scale.py memory [SMALL LARGE]`: peak memory of the driver and of all
workers while one JSON-lines file of SMALL, then of LARGE MB is prepared (100 and 400).

The corpus is the standard library's source, each copy of a file with a first line of its own.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SETTINGS = ["data.vocab_size=8192", "data.sequence_length=512", "data.heldout_fraction=0.01"]
EVERY = 0.1
"""Seconds between two looks at the memory."""
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]


def write_corpus(path: Path, megabytes: int) -> None:
    """One file of JSON lines."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [file.read_text("utf-8", "ignore") for file in sorted(folder.glob("*.py"))]
    texts += [file.read_text("utf-8", "ignore") for file in sorted(folder.glob("*/*.py"))[:400]]
    written, copy = 0, 0
    with path.open("w", encoding="utf-8") as stream:
        while written < megabytes << 20:
            for number, text in enumerate(texts):
                line = json.dumps({"text": f"# 第{copy}份 {number}\n{text}"}, ensure_ascii=False)
                written += stream.write(line + "\n")
                if written >= megabytes << 20:
                    break
            copy += 1


def prepare(corpus: Path, root: Path, *overrides: str) -> float:
    """Prepare in a process of its own; its seconds, the start of Python and Ray among them."""
    sources = f"data.sources=[{corpus}]"
    command = [sys.executable, "-m", "cluster.cli", "prepare", "gpt-demo", "--fresh", sources]
    command += [f"storage.root={root}", *SETTINGS, *overrides]
    begun = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stdout[-2000:] + result.stderr[-2000:])
    return time.monotonic() - begun


# ------------------------------------------------------------------ nodes


@dataclass
class Cluster:
    """A head without CPUs, and nodes of one each."""

    folder: Path
    port: int

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 63 + "2"}

    @contextmanager
    def node(self, *options: str) -> Iterator[None]:
        log = (self.folder / "ray.log").open("ab")
        command = [*RAY, "--object-store-memory=300000000", *options]
        process = subprocess.Popen(command, env=self.environment(), stdout=log, stderr=log)
        try:
            yield
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            for left in psutil.wait_procs([psutil.Process(process.pid), *family], timeout=20)[1]:
                left.kill()
            log.close()

    def head(self) -> Any:
        temporary = tempfile.mkdtemp(prefix="hn-", dir="/tmp")
        return self.node(
            "--head", "--num-cpus=0", f"--port={self.port}", f"--temp-dir={temporary}",
            "--include-dashboard=false", "--node-ip-address=127.0.0.1",
        )  # fmt: skip

    def worker(self) -> Any:
        return self.node(f"--address=127.0.0.1:{self.port}", "--num-cpus=1")


def nodes(megabytes: int, pairs: int) -> dict[str, float]:
    ratios = []
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, megabytes)
        cluster = Cluster(Path(folder), 23_711)
        os.environ.update(cluster.environment())
        address = f"ray.address=127.0.0.1:{cluster.port}"
        with cluster.head(), cluster.worker():
            time.sleep(8)
            for pair in range(pairs):
                one = prepare(corpus, Path(folder) / "one", address)
                with cluster.worker():
                    time.sleep(8)
                    two = prepare(corpus, Path(folder) / "two", address)
                ratios.append(one / two)
                print(
                    f"pair {pair}: one node {one:.1f} s, two nodes {two:.1f} s, {one / two:.2f} x"
                )
    return {"two_nodes_over_one": statistics.geometric_mean(ratios), "megabytes": megabytes}


# ------------------------------------------------------------------ memory


class Memory:
    """Peak of what processes hold for themselves: the driver, the largest worker, all together."""

    def __init__(self) -> None:
        self.driver = self.worker = self.together = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            driver, workers = 0, [0]
            for process in psutil.Process().children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::") or "cluster.cli" in title:
                        info = process.memory_info()
                        own = info.rss - info.shared
                        if title.startswith("ray::"):
                            workers.append(own)
                        else:
                            driver = max(driver, own)
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
            self.driver = max(self.driver, driver)
            self.worker = max(self.worker, *workers)
            self.together = max(self.together, driver + sum(workers))


def memory(small: int, large: int) -> dict[str, float]:
    peaks = []
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        for megabytes in (small, large):
            corpus = Path(folder) / f"{megabytes}.jsonl"
            write_corpus(corpus, megabytes)
            with Memory() as seen:
                seconds = prepare(corpus, Path(folder) / "root", "prepare.tasks=2")
            peaks.append(seen)
            print(
                f"{megabytes} MB in {seconds:.0f} s: driver {seen.driver >> 20} MiB, "
                f"largest worker {seen.worker >> 20} MiB, together {seen.together >> 20} MiB"
            )
            corpus.unlink()
    first, second = peaks
    return {
        "memory_large_over_small": second.together / first.together,
        "driver_large_over_small": second.driver / first.driver,
        "peak_mib": second.together / 2**20,
        "small_mb": small,
        "large_mb": large,
    }


def main(what: str, *numbers: str) -> None:
    given = [int(number) for number in numbers]
    if what == "nodes":
        figures = nodes(*(given or [60]), *([2] if len(given) < 2 else []))
    else:
        figures = memory(*(given or [100, 400]))
    print(json.dumps({"figures": {name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
