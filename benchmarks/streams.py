"""What it costs to send each token of a stream at once: `serve.engine.stream_interval_ms` at some
values, each with a service of its own, one after the other and all of them again.

Streams of 64 tokens, greedy, of random weights, 1, 8 and 32 at a time; the client shares the cores.
`tokens` are tokens per second, `pause` the median milliseconds between the pieces that a reader
sees; ratios are to the same round's 20 ms.

    python benchmarks/streams.py [--size 10m] [--rounds 2] [--intervals 0,10,20,40]
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
from models import write
from serve import free_port, prompts_of
from servers import Server, Setting

CLIENTS = (1, 8, 32)
NEW = 64
SECONDS = 4.0
USUAL = 20


async def streams(server: Server, prompts: Any, count: int) -> tuple[float, list[float]]:
    """Tokens per second of so many readers, and the seconds between their pieces."""
    pauses: list[float] = []
    done, began = 0, time.monotonic()

    async def reader(session: aiohttp.ClientSession) -> None:
        nonlocal done
        while time.monotonic() < began + SECONDS:
            body = {**server.body(next(prompts), NEW), "stream": True}
            async with session.post(f"{server.url}/v1/completions", json=body) as answer:
                seen: list[float] = []
                async for line in answer.content:
                    if line.startswith(b"data:") and b'"text"' in line:
                        seen.append(time.monotonic())
            assert seen, server.name
            pauses.extend(after - before for before, after in zip(seen, seen[1:], strict=False))
            done += NEW

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        await asyncio.gather(*(reader(session) for _ in range(count)))
    return done / (time.monotonic() - began), pauses


def turn(folder: Path, size: str, interval: float) -> dict[str, float]:
    """One service from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="hb-", dir="/tmp") as root:
        overrides = (f"serve.engine.stream_interval_ms={interval:g}",)
        setting = Setting(folder, "fp32", 2, Path(root), overrides)
        server = Server("ours", setting, free_port(), Path(root) / "log")
        try:
            prompts = prompts_of(folder, random.Random(0))
            asyncio.run(streams(server, prompts, 8))  # warm
            found: dict[str, float] = {}
            for count in CLIENTS:
                tokens, pauses = asyncio.run(streams(server, prompts, count))
                found[f"{count} tokens"] = tokens
                found[f"{count} pause ms"] = 1e3 * statistics.median(pauses)
        finally:
            server.end()
    print(f"{size} {interval:g} ms", {k: round(v, 1) for k, v in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="10m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--intervals", default="0,10,20,40")
    asked = parser.parse_args()
    intervals = [float(one) for one in asked.intervals.split(",")]
    if USUAL not in intervals:
        parser.error(f"--intervals needs {USUAL}, to which the others are compared")
    seen: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="hb-", dir="/tmp") as root:
        folder = Path(root) / "model"
        write(folder, asked.size)
        for number in range(asked.rounds):
            order = intervals if number % 2 == 0 else intervals[::-1]
            turns = {interval: turn(folder, asked.size, interval) for interval in order}
            for interval, found in turns.items():
                for name, value in found.items():
                    seen[f"{interval:g} ms/{name}"].append(value)
                    if name.endswith("tokens") and interval != USUAL:
                        ratio = value / turns[USUAL][name]
                        seen[f"{interval:g} ms/{name} over {USUAL} ms"].append(ratio)
    figures = {name: round(statistics.median(values), 3) for name, values in seen.items()}
    for name, value in figures.items():
        print(f"{name:<40} {value:10.3f}")
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
