"""A search against chance: ASHA with TPE and plain random search, with the same tokens to train on.

Both search the same space of a small language model over the same rows, two trials at a time on two
CPUs. Random search trains its trials to the end; the other may begin more, and ends most of them
early. What is compared is the best held-out loss, and the tokens until it was as good as random's
best. Overhead is what a trial of random search takes beside its training (workers, reports, waiting
for what is decided), less what a plain pretrain of the same config takes beside its own.

`python benchmarks/tune.py ROOT --seeds 1 2 3` adds what these seeds give to ROOT/seeds.json, so
that a few minutes at a time are enough; the last line is over all seeds that are there.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, in which `tune` would be this file, here and in the workers

from cluster import loading
from cluster.config import RunConfig
from cluster.session import session
from cluster.storage import Store
from pipelines import prepare, pretrain
from tune import search
from tune.ledger import Attempt, Ledger

STEPS, BATCH, LENGTH, TRIALS = 120, 8, 96, 8
EVERY, ROWS, AT_ONCE = STEPS // 10, 128, 2
BUDGET = TRIALS * STEPS * BATCH * LENGTH
"""Tokens; random search uses it up exactly."""
RECIPE = [
    "name=tuned",
    "data.vocab_size=2048",
    f"data.sequence_length={LENGTH}",
    "model.hidden_size=128",
    "model.intermediate_size=256",
    "train.workers=1",
    "train.zero_stage=1",
    f"train.steps={STEPS}",
    f"train.global_batch={BATCH}",
    "train.warmup_steps=12",
    "train.checkpoint_every=1000",
    # The first trial of both sides: a common default, so that there is something to be found.
    "train.learning_rate=0.0003",
    "model.initializer_range=0.02",
    "tune.confirm_seeds=0",
    "tune.steps=0",
    f"tune.heldout_rows={ROWS}",
    f"tune.report_every={EVERY}",
    f"tune.concurrent={AT_ONCE}",
    "tune.space.train.learning_rate=loguniform(1e-4, 3e-1)",
    "tune.space.train.weight_decay=uniform(0, 0.5)",
    "tune.space.train.beta2=choice[0.9, 0.95, 0.99, 0.999]",
    "tune.space.train.warmup_steps=randint(1, 60)",
    "tune.space.train.final_learning_rate=uniform(0, 1)",
    "tune.space.model.initializer_range=loguniform(0.005, 0.2)",
]
SIDES = {
    "random": ["tune.search=random", "tune.scheduler=none", f"tune.trials={TRIALS}"],
    "asha_tpe": [
        "tune.search=tpe",
        "tune.scheduler=asha",
        "tune.grace=0.1",
        "tune.trials=100",
        f"tune.tokens={BUDGET}",
    ],
}


def config_of(root: Path, side: str, seed: int) -> RunConfig:
    """The data are prepared with one seed; trials differ by theirs."""
    return loading.load(
        "gpt-demo",
        [f"storage.root={root}", *RECIPE, *SIDES[side], f"seed={seed}", f"ray.cpus={AT_ONCE}"],
    )


@dataclass(frozen=True)
class Side:
    attempts: list[Attempt]
    seconds: float
    """From the call to its end."""


def searched(config: RunConfig) -> Side:
    began = time.monotonic()
    made = search.run(config.model_copy(update={"fresh": True})).artifact
    seconds = time.monotonic() - began
    assert made is not None
    book = Ledger(Store(config.storage.root), made.manifest.detail["study"])
    return Side(book.attempts(), seconds)


def plain(root: Path, seed: int) -> float:
    """Seconds that a pretrain by itself takes beside its training, with as many looks at held-out
    rows."""
    config = loading.changed(
        config_of(root, "random", seed),
        {"fresh": True, "train.heldout_every": EVERY, "train.heldout_rows": ROWS},
    )
    began = time.monotonic()
    made = pretrain.run(config).artifact
    seconds = time.monotonic() - began
    assert made is not None
    return seconds - float(made.manifest.detail["seconds"])


def best(attempts: list[Attempt]) -> float:
    """Held-out loss of the best trial that trained to its end."""
    return min(a.figure("heldout_loss") for a in attempts if a.state == "done")


def tokens_until(attempts: list[Attempt], loss: float) -> float:
    """Trained on by all trials together until one of them reported such a loss; infinite if none
    did. Reports are taken in order of time, as far as their trials' spans tell."""
    reports: list[tuple[float, float, float]] = []
    for attempt in attempts:
        before = 0.0
        for number, row in enumerate(attempt.rows, start=1):
            at = attempt.began + attempt.seconds * number / len(attempt.rows)
            reports.append((at, row["tokens"] - before, row["heldout_loss"]))
            before = row["tokens"]
    used = 0.0
    for _, tokens, reached in sorted(reports):
        used += tokens
        if reached <= loss:
            return used
    return float("inf")


def measured(root: Path, seed: int) -> dict[str, Any]:
    """All sides of one seed; which of them is first changes from seed to seed."""
    beside = plain(root, seed)
    order = list(SIDES) if seed % 2 else list(SIDES)[::-1]
    sides = {side: searched(config_of(root, side, seed)) for side in order}
    goal = best(sides["random"].attempts)
    chance = sides["random"]
    busy = AT_ONCE * chance.seconds - sum(a.train_seconds for a in chance.attempts)
    found: dict[str, Any] = {
        "beside_plain": beside,
        "beside_trial": busy / len(chance.attempts),
    }
    for name, side in sides.items():
        found[name] = {
            "best": best(side.attempts),
            "trials": len(side.attempts),
            "ended": sum(a.state == "ended" for a in side.attempts),
            "tokens": sum(a.tokens for a in side.attempts),
            "tokens_to_random": tokens_until(side.attempts, goal),
            "seconds": side.seconds,
        }
        print(f"seed {seed} {name}: {found[name]}", flush=True)
    return found


def figures_of(seeds: dict[str, Any]) -> dict[str, float]:
    """Medians over the seeds; ratios of ours over random's. Where ours was never as good as
    random's best, all its tokens count as what it took."""
    ours = [s["asha_tpe"] for s in seeds.values()]
    chance = [s["random"] for s in seeds.values()]
    pairs = list(zip(ours, chance, strict=True))
    return {
        "seeds": float(len(seeds)),
        "asha_tpe_best": statistics.median(o["best"] for o in ours),
        "random_best": statistics.median(c["best"] for c in chance),
        "best_difference_worst": max(o["best"] - c["best"] for o, c in pairs),
        "best_difference": statistics.median(o["best"] - c["best"] for o, c in pairs),
        "tokens_ratio": statistics.median(o["tokens"] / c["tokens"] for o, c in pairs),
        "tokens_to_random_ratio": statistics.median(
            min(o["tokens_to_random"], o["tokens"]) / c["tokens_to_random"] for o, c in pairs
        ),
        "reached_random": float(sum(math.isfinite(o["tokens_to_random"]) for o in ours)),
        "asha_tpe_trials": statistics.median(o["trials"] for o in ours),
        "beside_training_plain_seconds": statistics.median(
            s["beside_plain"] for s in seeds.values()
        ),
        "beside_training_trial_seconds": statistics.median(
            s["beside_trial"] for s in seeds.values()
        ),
        "overhead_seconds_per_trial": statistics.median(
            s["beside_trial"] - s["beside_plain"] for s in seeds.values()
        ),
        "random_seconds": statistics.median(c["seconds"] for c in chance),
        "asha_tpe_seconds": statistics.median(o["seconds"] for o in ours),
    }


def main(root: Path, seeds: list[int]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    book = root / "seeds.json"
    known: dict[str, Any] = json.loads(book.read_text()) if book.exists() else {}
    first = config_of(root, "random", 1)
    with session(first):
        if Store(str(root)).latest("corpus", first.name) is None:
            prepare.run(first)
        for seed in seeds:
            known[str(seed)] = measured(root, seed)
            book.write_text(json.dumps(known, indent=1))
    figures = figures_of(known)
    for name, value in figures.items():
        print(f"{name:<28} {value:>12.4f}")
    print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    main(given.root, given.seeds)
