"""A search against chance: ASHA with TPE and plain random search, with the same tokens to train on.

Both search the same space of a small language model over the same rows, two trials at a time on two
CPUs. Random search trains its trials to the end; the other may begin more, and ends most of them
early. What is compared is the best held-out loss, and the tokens until it was as good as random's
best. `python benchmarks/tune.py ROOT SEED...` adds what these seeds give to ROOT/seeds.json, so
that a few minutes at a time are enough; the last line is over all seeds that are there.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from cluster import loading
from cluster.config import RunConfig
from cluster.session import session
from cluster.storage import Store
from pipelines import prepare
from tune import search
from tune.ledger import Attempt, Ledger

STEPS, BATCH, LENGTH, TRIALS = 150, 16, 128, 8
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
    "train.warmup_steps=15",
    "train.checkpoint_every=1000",
    "tune.confirm_seeds=0",
    "tune.steps=0",
    "tune.heldout_rows=128",
    "tune.report_every=15",
    "tune.concurrent=2",
    "tune.space.train.learning_rate=loguniform(1e-4, 3e-1)",
    "tune.space.train.weight_decay=uniform(0, 0.5)",
    "tune.space.train.beta2=choice[0.9, 0.95, 0.99, 0.999]",
    "tune.space.train.warmup_steps=randint(1, 75)",
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
        [f"storage.root={root}", *RECIPE, *SIDES[side], f"seed={seed}", "ray.cpus=2"],
    )


def searched(config: RunConfig) -> list[Attempt]:
    made = search.run(config.model_copy(update={"fresh": True})).artifact
    assert made is not None
    return Ledger(Store(config.storage.root), made.manifest.detail["study"]).attempts()


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
    """Both sides of one seed."""
    sides = {side: searched(config_of(root, side, seed)) for side in SIDES}
    goal = best(sides["random"])
    rest = [a.seconds - a.train_seconds for s in sides.values() for a in s if a.state == "done"]
    found: dict[str, Any] = {"overhead_seconds": statistics.median(rest)}
    for side, attempts in sides.items():
        found[side] = {
            "best": best(attempts),
            "trials": len(attempts),
            "tokens": sum(a.tokens for a in attempts),
            "tokens_to_random": tokens_until(attempts, goal),
            "seconds": max(a.began + a.seconds for a in attempts) - attempts[0].began,
        }
        print(f"seed {seed} {side}: {found[side]}", flush=True)
    return found


def figures_of(seeds: dict[str, Any]) -> dict[str, float]:
    """Medians over the seeds; ratios of ours over random's."""
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
            min(o["tokens_to_random"], 1e12) / c["tokens_to_random"] for o, c in pairs
        ),
        "asha_tpe_trials": statistics.median(o["trials"] for o in ours),
        "overhead_seconds_per_trial": statistics.median(
            s["overhead_seconds"] for s in seeds.values()
        ),
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
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
