"""Tokens per second of our engine, in process, against `generate` and llama.cpp.

The same random weights everywhere, the same prompts, greedy, one process for each engine, taking
turns; every ratio is between turns that followed each other. Rates are of a whole job, prompts
included. On a machine that is not quiet take `--threads 1 --clock cpu`: processor time does not
count what others took, and one thread never spins waiting for another.

    python benchmarks/engine.py [--sizes 10m,90m] [--rounds 3] [--precisions fp32,bf16,int8]
                                [--threads 2] [--clock wall]

llama.cpp takes part where `xllamacpp` and `gguf` can be imported (see requirements.txt); PEERS may
name a folder that holds them.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import VOCABULARY, write, write_gguf

HERE = Path(__file__).parent
CLIENTS = (1, 8, 32)
PROMPT = 32
NEW = {"10m": 64, "90m": 32}


class Side:
    def __init__(self, kind: str, precision: str, folder: Path, threads: int) -> None:
        self.name = f"{kind} {precision}"
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PEERS")])]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engines.py"), kind, precision, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def said(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self._process.stdin.flush()
        return self.said()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    size: str, precisions: list[str], rounds: int, threads: int, kinds: list[str], clock: str
) -> dict[str, float]:
    rng, new = random.Random(0), NEW[size]
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as name:
        folder = Path(name)
        write(folder, size)
        pairs = [("generate", "fp32")] if "generate" in kinds else []
        pairs += [(k, p) for p in precisions for k in ("ours", "llama.cpp") if k in kinds]
        for kind, precision in pairs:
            if kind == "llama.cpp":
                write_gguf(folder, folder / f"{precision}.gguf", precision)
        sides: list[Side] = []
        try:
            for kind, precision in pairs:
                sides.append(Side(kind, precision, folder, threads))
                # One after the other: loading is timed too.
                print(f"{size} {sides[-1].name}: ready {sides[-1].said()['ready']}", flush=True)
            for number in range(rounds):
                for clients in CLIENTS:
                    prompts = [
                        [rng.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in range(clients)
                    ]
                    firsts = set()
                    for side in sides if number % 2 else sides[::-1]:
                        turn = side.turn(prompts, new)
                        rate = clients * new / turn[clock]
                        rates.setdefault((side.name, clients), []).append(rate)
                        print(f"{size} {clients:>2} {side.name:<16} {rate:8.0f}", flush=True)
                        if side.name in ("ours fp32", "generate fp32"):
                            firsts.add(tuple(turn["first"]))
                    assert len(firsts) <= 1, "greedy output differs"
        finally:
            for side in sides:
                side.end()
    return figures(size, rates)


def figures(size: str, rates: dict[tuple[str, int], list[float]]) -> dict[str, float]:
    found = {}
    for (name, clients), ours in rates.items():
        found[f"{size}/{clients}/{name}"] = round(statistics.median(ours), 1)
        if not name.startswith("ours"):
            continue
        precision = name.split()[1]
        for peer in ("generate fp32", f"llama.cpp {precision}"):
            if (peer, clients) in rates:
                pairs = zip(ours, rates[peer, clients], strict=True)
                ratio = statistics.median(one / other for one, other in pairs)
                found[f"{size}/{clients}/{name} over {peer}"] = round(ratio, 3)
    for key in sorted(found, key=lambda k: (int(k.split("/")[1]), k)):
        print(f"{key:<52} {found[key]:>10}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="10m,90m")
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--kinds", default="generate,ours,llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    asked = parser.parse_args()
    sys.path += filter(None, [os.environ.get("PEERS")])
    found: dict[str, float] = {}
    for size in asked.sizes.split(","):
        precisions, kinds = asked.precisions.split(","), asked.kinds.split(",")
        found |= measure(size, precisions, asked.rounds, asked.threads, kinds, asked.clock)
    print(json.dumps({"figures": found}))


if __name__ == "__main__":
    main()
