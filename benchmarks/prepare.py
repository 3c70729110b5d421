"""Raw text to rows of tokens: Heliostat beside a bare loop, datatrove and Hugging Face datasets.

The corpus is what this Python has installed, source and documentation, as JSON lines with copies
and near copies among them. Every side gets the same files, the same tokenizer and the same two
cores, one after the other in an order that each round turns round, each in a process of its own
that has imported what it needs before the clock starts.

    tokens   parse, tokenise, pack, write
    full     the same with cleaning and exact duplicates out, which every side does by its own means

`python benchmarks/prepare.py [--mb 104] [--rounds 1] [--sides bare,heliostat,...]`
`python benchmarks/prepare.py --memory 104,520,1040` prints peak memory at each size instead.
datatrove is found with `PYTHONPATH`, see requirements.txt; a side that is not installed is left
out, and said so.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from main_job import PeakMemory

HERE = Path(__file__).parent
SIDES = ("bare", "heliostat", "datatrove", "datasets", "ceiling")
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt")
SHARDS_PER_100_MB = 16
"""The same for both cores, and what `data.partition_bytes` takes one at a time."""
VOCABULARY = 8192
TOKENIZER_BYTES = 8_000_000


def installed_texts() -> Iterator[str]:
    """Source and documentation of this Python, in a mixed but fixed order."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = sorted({path for top in folders for path in top.rglob("*") if path.suffix in ENDINGS})
    random.Random(0).shuffle(files)
    for path in files:
        if path.is_file() and 200 < path.stat().st_size < 200_000:
            text = path.read_bytes().decode("utf-8", "replace")
            yield text


def build(folder: Path, megabytes: int) -> list[Path]:
    """JSON lines of about `megabytes`, 2 % of them copies and 5 % copies with a line changed."""
    count = max(2, round(megabytes * SHARDS_PER_100_MB / 100) // 2 * 2)
    paths = [folder / f"shard-{number:03d}.jsonl" for number in range(count)]
    chance, left, recent = random.Random(1), megabytes * 1_000_000, [""] * 50
    streams = [path.open("w", encoding="utf-8") for path in paths]
    sizes = [0] * count
    while left > 0:
        before = left
        for text in installed_texts():
            draw = chance.random()
            if draw < 0.07 and recent[0]:
                text = chance.choice(recent) + ("" if draw < 0.02 else f"\n# {draw}\n")
            recent[chance.randrange(50)] = text
            line = json.dumps({"text": text}, ensure_ascii=False)
            smallest = sizes.index(min(sizes))
            streams[smallest].write(line + "\n")
            sizes[smallest] += len(line)
            left -= len(text.encode())
            if left <= 0:
                break
        assert left < before, "no text is installed"
    for stream in streams:
        stream.close()
    return paths


def train_tokenizer(folder: Path, shards: list[Path]) -> None:
    """What every side tokenises with."""
    from cluster.config.tokenizer import TokenizerSection
    from pipelines.data import tokenizer, vocabulary

    texts, left = [], TOKENIZER_BYTES
    with shards[0].open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            left -= len(texts[-1])
            if left < 0:
                break
    trained = vocabulary.train(texts, VOCABULARY, TokenizerSection())
    tokenizer.TextEncoder(trained.to_str(), 1024, 1.0).save(folder)


def run_side(side: str, work: dict[str, Any], *, memory: bool = False) -> dict[str, float] | None:
    """Seconds of each chain, from a process of the side's own; None where it is not installed."""
    with tempfile.TemporaryDirectory(prefix=f"{side}-", dir=work["scratch"]) as out:
        command = [
            sys.executable,
            str(HERE / "preparing.py"),
            side,
            json.dumps(work | {"out": out}),
        ]
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # Ray's workers are nice by default and would wait for whatever else wakes up here,
            # where the processes of all other sides would not.
            "RAY_worker_niceness": "0",
        }
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        watch = PeakMemory(process.pid)
        if memory:
            watch.start()
        said, wrong = process.communicate()
        peak = watch.finish() if memory else 0
    if process.returncode == 7:
        print(f"{side}: not installed, left out: {wrong.strip().splitlines()[-1]}")
        return None
    if process.returncode:
        raise SystemExit(f"{wrong[-4000:]}\n{side} ended with {process.returncode}")
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found | ({"peak_bytes": peak} if memory else {})


def rounds(sides: list[str], work: dict[str, Any], count: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(count):
        # There and back, so that the sides that are compared stay next to each other.
        for side in sides[:: -1 if number % 2 else 1]:
            began, taken = time.monotonic(), stolen()
            measured = run_side(side, work) if side in found else None
            if measured is None:
                found.pop(side, None)
                continue
            found[side].append(measured)
            speeds = ", ".join(
                f"{chain} {work['megabytes'] / measured[chain]:.2f} MB/s"
                for chain in ("tokens", "full")
                if chain in measured
            )
            took = time.monotonic() - began
            share = (stolen() - taken) / (took * (os.cpu_count() or 1))
            print(
                f"round {number}: {side:<10} {speeds}   "
                f"({took:.0f} s in all, {share:.0%} of the cores taken by the host)",
                flush=True,
            )
    return found


def stolen() -> float:
    """Core seconds that a virtual machine's host gave to others so far, which no side can help."""
    ticks = int(Path("/proc/stat").read_text("ascii").split()[8])
    return ticks / os.sysconf("SC_CLK_TCK")


def figures(found: dict[str, list[dict[str, float]]], megabytes: float) -> dict[str, float]:
    """Speeds, and ratios of each side to the bare loop of the same round."""
    said: dict[str, float] = {}
    for side, measured in found.items():
        for chain in ("tokens", "full"):
            seconds = [one[chain] for one in measured if chain in one]
            if not seconds:
                continue
            said[f"{side}_{chain}_mb_per_second"] = megabytes / statistics.fmean(seconds)
            if side != "bare" and "bare" in found:
                bare = [one["tokens" if side == "ceiling" else chain] for one in found["bare"]]
                said[f"{side}_{chain}_of_bare"] = ratio(bare, seconds)
            if side in ("datatrove", "datasets") and "heliostat" in found:
                ours = [one[chain] for one in found["heliostat"]]
                said[f"heliostat_{chain}_over_{side}"] = ratio(seconds, ours)
    return said


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast `ours` is: the mean over rounds, each of which compares its own."""
    return statistics.geometric_mean(their / our for their, our in zip(theirs, ours, strict=True))


def peaks(sizes: list[int], scratch: Path) -> dict[str, float]:
    said: dict[str, float] = {}
    for megabytes in sizes:
        folder = scratch / f"corpus-{megabytes}"
        measured = run_side("heliostat", prepared_work(folder, scratch, megabytes), memory=True)
        assert measured is not None
        said[f"heliostat_peak_gib_at_{megabytes}_mb"] = measured["peak_bytes"] / 2**30
        print(f"{megabytes} MB: {measured['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    return said


def prepared_work(folder: Path, scratch: Path, megabytes: int) -> dict[str, Any]:
    folder.mkdir()
    shards = build(folder, megabytes)
    train_tokenizer(folder / "tokenizer", shards)
    size = sum(path.stat().st_size for path in shards)
    return {
        "shards": [str(path) for path in shards],
        "tokenizer": str(folder / "tokenizer"),
        "megabytes": size / 1e6,
        "scratch": str(scratch),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=104)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--memory", default="")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        if asked.memory:
            said = peaks([int(size) for size in asked.memory.split(",")], Path(folder))
        else:
            work = prepared_work(Path(folder) / "corpus", Path(folder), asked.mb)
            found = rounds(asked.sides.split(","), work, asked.rounds)
            said = figures(found, work["megabytes"])
            said["corpus_mb"] = work["megabytes"]
    for name, value in said.items():
        print(f"{name:<40} {value:>10.3f}")
    print(json.dumps({"figures": {name: round(value, 4) for name, value in said.items()}}))


if __name__ == "__main__":
    main()
