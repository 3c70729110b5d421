"""What a study comes to: the winner, how sure it is, and the recipe that trains it. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from cluster import loading
from cluster.config import RunConfig
from cluster.stages import flat, resolved
from tune.ledger import Attempt, front, plain_json


@dataclass(frozen=True)
class Outcome:
    winner: str
    """Id of the trial."""
    values: Mapping[str, Any]
    """What it has instead of the recipe's, by dotted key."""
    every: int
    """Steps between its looks at held-out rows."""
    figures: Mapping[str, float]
    headline: str
    text: str
    """For a person: Markdown."""

    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = plain_json(asdict(self))
        return tree


def summary(config: RunConfig, attempts: Sequence[Attempt], winner: Attempt, every: int) -> Outcome:
    """
    Args:
        attempts: of the search and of the confirmation.
        every: steps between reports.
    """
    metric, mode = config.tune.objective
    searched = [a for a in attempts if a.role == "search"]
    figures = {
        metric: winner.figure(metric),
        "trials": float(len(searched)),
        "ended_early": float(sum(a.state == "ended" for a in searched)),
        "failed": float(sum(a.state == "failed" for a in searched)),
        "tokens": sum(a.tokens for a in attempts),
        "train_seconds": sum(a.train_seconds for a in attempts),
        "seconds": _wall(attempts),
        **_confirmed(attempts, metric, mode),
    }
    if len(config.tune.objectives) > 1:
        figures["front"] = float(len(front(searched, config.tune.objectives)))
    headline = f"{metric} {winner.figure(metric):.4g} of {len(searched)} trials"
    if "gain" in figures:
        headline += f", gain {figures['gain']:.2g} against noise {figures['noise']:.2g}"
    return Outcome(
        winner.trial,
        winner.values,
        every,
        figures,
        headline,
        _text(config, winner, figures, metric),
    )


def _confirmed(attempts: Sequence[Attempt], metric: str, mode: str) -> dict[str, float]:
    """Means over the seeds of both sides, their difference, and how far seeds alone differ.

    The noise is the pooled standard deviation between runs that differ in nothing but the seed.
    """
    sides = {
        role: [a.figure(metric) for a in attempts if a.role == role and a.state == "done"]
        for role in ("winner", "recipe")
    }
    found = {f"{role}_confirmed": fmean(values) for role, values in sides.items() if values}
    several = [values for values in sides.values() if len(values) > 1]
    if several:
        squares = sum(stdev(values) ** 2 * (len(values) - 1) for values in several)
        found["noise"] = math.sqrt(squares / sum(len(values) - 1 for values in several))
    if len(found) > 1 and all(sides.values()):
        difference = found["recipe_confirmed"] - found["winner_confirmed"]
        found["gain"] = difference if mode == "min" else -difference
    return found


def _text(config: RunConfig, winner: Attempt, figures: Mapping[str, float], metric: str) -> str:
    """A few sentences that promise no more than was measured."""
    values = "\n".join(f"    {key}: {value}" for key, value in winner.values.items())
    lines = [
        f"{figures['trials']:.0f} trials, {figures['ended_early']:.0f} of them ended early, "
        f"{figures['failed']:.0f} failed. The best is {winner.trial}, {metric} "
        f"{figures[metric]:.4f} at step {winner.last.get('step', 0):.0f}:",
        values,
    ]
    if "gain" in figures:
        gain, noise = figures["gain"], figures.get("noise", float("nan"))
        verdict = "more" if gain > 2 * noise else "not clearly more"
        lines.append(
            f"From {config.tune.confirm_seeds + 1} seeds and on rows that nothing was chosen by: "
            f"{figures['winner_confirmed']:.4f}, the recipe as it is "
            f"{figures['recipe_confirmed']:.4f}. The gain of {gain:.4f} is {verdict} than the "
            f"{noise:.4f} that runs differ by from seed to seed."
        )
    elif "winner_confirmed" in figures:
        base = flat(resolved(config))
        same = all(base[key] == value for key, value in winner.values.items())
        lines.append(
            f"{'That is' if same else 'No run could be finished with'} the recipe as it is. From "
            f"{config.tune.confirm_seeds + 1} seeds and on rows that nothing was chosen by: "
            f"{figures['winner_confirmed']:.4f}, and runs differ by "
            f"{figures.get('noise', float('nan')):.4f} from seed to seed."
        )
    if config.tune.scheduler == "pbt":
        lines.append(
            "Its values changed on the way, so that the values above are its last ones: a run with "
            "them from the start is what was confirmed, not the trial itself."
        )
    return "\n".join(lines)


def best_recipe(config: RunConfig, found: Outcome) -> str:
    """A recipe that needs nothing beside it: the one that was tuned, and over it what was found.

    Loads like any other; `heliostat pretrain` with it repeats the winning trial step by step.
    """
    tree = config.model_dump(mode="json", exclude_unset=True, exclude={"tune", "fresh"})
    for section in ("data", "model"):
        tree.get(section, {}).pop("kind", None)
    dotted = {**found.values, "train.heldout_every": found.every}
    dotted["train.heldout_rows"] = config.tune.heldout_rows
    comment = f"# {found.headline}\n"
    return comment + loading.to_yaml({**tree, **dotted})


def plain(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """As JSON takes it."""
    tree: list[dict[str, Any]] = plain_json([asdict(attempt) for attempt in attempts])
    json.dumps(tree, allow_nan=False)
    return tree


def _wall(attempts: Sequence[Attempt]) -> float:
    began = min((a.began for a in attempts), default=0.0)
    return max((a.began + a.seconds for a in attempts), default=0.0) - began
