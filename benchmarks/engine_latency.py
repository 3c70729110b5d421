"""What one caller of our engine waits for, in process; everything as a ratio to the engine's own
plain step.

    stall     longest pause of 8 running answers while a prompt of 512 tokens joins, over their step
    first     time to the first token of a 32-token prompt beside 4 running answers, less the
              reading of it alone, over a step
    prefix    time to the first token of 512 + 8 tokens, cold over with the 512 read before
    sampling  choosing 8 tokens with temperature and top-p, share of a step of 8
    cold      first request after loading over a warm one
    agreement with `--trained FOLDER`: share of tokens of real text after which a lower precision
              finds the same token likeliest as fp32

    python benchmarks/engine_latency.py [--sizes 10m,90m] [--precision fp32] [--trained FOLDER]
"""

import argparse
import asyncio
import json
import random
import statistics
import sysconfig
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from models import VOCABULARY, write

from serving.engines import generation, sampling
from serving.engines.base import GenerationRequest, SamplingParameters, Tokens
from serving.engines.fast import FastRunner
from serving.engines.generation import GenerationEngine
from serving.engines.linear import Int8, Packed
from serving.engines.loading import Options, open_generation
from serving.engines.runner import Feed

RNG = random.Random(0)
STEPS: list[float] = []
"""When the engine's thread was through with each step."""
_deliver = generation._deliver


def _noted(events: Any) -> None:
    STEPS.append(time.perf_counter())
    _deliver(events)


generation._deliver = _noted


def prompt(length: int) -> tuple[int, ...]:
    return tuple(RNG.randrange(VOCABULARY) for _ in range(length))


async def stamps(engine: GenerationEngine, tokens: tuple[int, ...], new: int) -> list[float]:
    """When the request was made and when each of its tokens came."""
    seen = [time.perf_counter()]
    asked = GenerationRequest(str(RNG.random()), tokens, SamplingParameters(new, temperature=0))
    async for event in engine.submit(asked):
        if isinstance(event, Tokens):
            seen += [time.perf_counter()] * len(event.ids)
    return seen


async def beside(
    engine: GenerationEngine, running: int, tokens: tuple[int, ...], new: int
) -> tuple[float, float, float]:
    """(plain step, longest pause, time to first token) where a prompt joins running answers."""
    others = [asyncio.create_task(stamps(engine, prompt(16), new)) for _ in range(running)]
    await asyncio.sleep(0)
    while engine.stats().completion_tokens_total < running * 8:
        await asyncio.sleep(0.002)
    STEPS.clear()
    joined = await stamps(engine, tokens, 2)
    await asyncio.gather(*others)
    spent = [later - earlier for earlier, later in pairwise(STEPS)]
    return statistics.median(spent), max(spent), joined[1] - joined[0]


async def measure(engine: GenerationEngine) -> dict[str, float]:
    cold = await stamps(engine, prompt(32), 8)
    warm = [await stamps(engine, prompt(32), 8) for _ in range(5)]
    alone = statistics.median(one[1] - one[0] for one in warm)
    found = {"cold": (cold[1] - cold[0]) / alone}
    firsts, stalls = [], []
    for _ in range(5):
        engine._totals[2] = 0
        step, _, first = await beside(engine, 4, prompt(32), 48)
        firsts.append((first - alone) / step)
        engine._totals[2] = 0
        step, worst, _ = await beside(engine, 8, prompt(512), 64)
        stalls.append(worst / step)
    found |= {"first": statistics.median(firsts), "stall": statistics.median(stalls)}
    prefixes = []
    for _ in range(3):
        shared = prompt(512)
        times = [await stamps(engine, (*shared, *prompt(8)), 1) for _ in range(2)]
        prefixes.append((times[0][1] - times[0][0]) / (times[1][1] - times[1][0]))
    found["prefix"] = statistics.median(prefixes)
    engine._totals[2] = 0
    step, _, _ = await beside(engine, 7, prompt(8), 48)
    return found | {"step_ms": step * 1e3, "sampling": sampling_seconds() / step}


def sampling_seconds(rows: int = 8) -> float:
    """Logits as sharp as a trained model's: two nats."""
    import torch

    torch.manual_seed(0)
    logits = 4 * torch.randn(rows, VOCABULARY)
    drawings = [
        sampling.Drawing(SamplingParameters(1, temperature=0.8, top_p=0.95, seed=n))
        for n in range(rows)
    ]
    times = []
    for _ in range(50):
        began = time.perf_counter()
        sampling.choose(logits, drawings)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def agreement(folder: Path, precision: Any) -> float:
    """On windows of 128 tokens of the standard library's sources; speed is no matter here."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held = {"fp32": Packed, "bf16": Packed, "int8": Int8}
    exact, lower = (
        FastRunner(model, folder, slots=1, length=128, spare=0, kind=held[p], precision=p)
        for p in ("fp32", precision)
    )
    same = total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::8]:
        ids = exact.encode(path.read_text("utf-8", errors="replace")[:2000])[:128]
        rows = [r.forward([], [Feed(0, 0, ids, len(ids))]).argmax(-1) for r in (exact, lower)]
        same, total = same + int((rows[0] == rows[1]).sum()), total + len(ids)
    return same / total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="10m,90m")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    found: dict[str, float] = {}
    for size in filter(None, asked.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as name:
            write(Path(name), size)
            options: Any = {"precision": asked.precision, "threads": asked.threads}
            engine = open_generation(
                "model/bench@1",
                Path(name),
                Options(slots=32, max_waiting=8, context=640, **options),
                context_length=640,
            )
            figures = asyncio.run(measure(engine))
            engine.close()
        found |= {f"{size}/{asked.precision}/{key}": value for key, value in figures.items()}
    if asked.trained:
        for precision in ("bf16", "int8"):
            found[f"agreement/{precision}"] = agreement(asked.trained, precision)
    for key, value in found.items():
        print(f"{key:<32} {value:>10.3f}")
    print(json.dumps({"figures": {key: round(value, 4) for key, value in found.items()}}))


if __name__ == "__main__":
    main()
