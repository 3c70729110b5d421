"""Pictures of a study, and which keys mattered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.plots import ACCENT, FAINT, INK, Draw
from tune.ledger import Attempt, shown
from tune.space import Free, Range, Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"done": ACCENT, "ended": FAINT, "failed": "#c0392b", "running": INK}
FEWEST = 4
"""Trials below which importance would be read out of nothing."""


def history(attempts: Sequence[Attempt], metric: str, mode: str) -> Draw:
    """Each trial's figure in the order in which they began, and the best so far."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        values = [attempt.figure(metric) for attempt in attempts]
        for state, colour in COLOURS.items():
            own = [(n, v) for n, v in enumerate(values, 1) if attempts[n - 1].state == state]
            if own:
                axes.scatter(
                    [n for n, _ in own], [v for _, v in own], s=24, color=colour, label=state
                )
        without = [n for n, v in enumerate(values, 1) if not math.isfinite(v)]
        above = axes.get_xaxis_transform()
        axes.scatter(
            without, [0.97] * len(without), color=COLOURS["failed"], marker="x", transform=above
        )
        worst = -math.inf if mode == "max" else math.inf
        filled = [value if math.isfinite(value) else worst for value in values]
        best = (np.minimum if mode == "min" else np.maximum).accumulate(filled)
        best = np.where(np.isfinite(best), best, np.nan)
        axes.step(range(1, len(best) + 1), best, color=ACCENT, lw=1.5, where="post")
        _titled(axes, "History", "trial", metric)
        axes.set_xlim(0.5, len(values) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)

    return draw


def learning_curves(attempts: Sequence[Attempt], metric: str, winner: str) -> Draw:
    """What every trial reported over its steps."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for attempt in attempts:
            rows = [r for r in attempt.rows if math.isfinite(r.get(metric, math.nan))]
            own = attempt.trial == winner
            axes.plot(
                [row["step"] for row in rows],
                [row[metric] for row in rows],
                color=ACCENT if own else COLOURS["ended"],
                lw=2.5 if own else 1,
                alpha=1 if own else 0.7,
                marker=".",
                zorder=2 if own else 1,
                label="the best" if own else None,
            )
        _titled(axes, "Learning curves", "step", metric)
        axes.legend(frameon=False)

    return draw


def spending(attempts: Sequence[Attempt]) -> Draw:
    """Seconds of training and of everything else, per trial."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        places = range(1, len(attempts) + 1)
        training = [attempt.train_seconds for attempt in attempts]
        rest = [max(0.0, a.seconds - a.train_seconds) for a in attempts]
        axes.bar(places, training, color=ACCENT, label="training")
        axes.bar(places, rest, bottom=training, color=FAINT, label="starting, measuring, saving")
        _titled(axes, "Spent per trial", "trial", "seconds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.25)  # room for the legend
        axes.legend(frameon=False)

    return draw


def parallel(space: Space, attempts: Sequence[Attempt], metric: str, mode: str) -> Draw:
    """One line per trial through its values; the better, the darker. Each axis has its own scale,
    whose ends stand beside it."""

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps

        axes = figure.subplots()
        found = [a for a in attempts if math.isfinite(a.figure(metric))]
        figures = np.array([a.figure(metric) for a in found])
        order = (figures if mode == "min" else -figures).argsort().argsort()
        keys = [dimension.key for dimension in space.free]
        for attempt, rank in zip(found, order, strict=True):
            heights = [_height(space, attempt, key) for key in keys]
            last = (order.max() - rank) / max(1, order.max())
            shade = colormaps["Blues"](0.25 + 0.75 * last)
            axes.plot([*heights, last], color=shade, lw=1.2, marker=".")
        for place, ends in enumerate([*map(_ends, space.free), ("worst", "best")]):
            axes.text(place, -0.03, ends[0], ha="center", va="top", color=INK, fontsize=8)
            axes.text(place, 1.03, ends[1], ha="center", va="bottom", color=INK, fontsize=8)
        axes.set_xticks(range(len(keys) + 1), [*keys, f"rank by {metric}"], rotation=20, ha="right")
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.set_title("Parallel coordinates", loc="left", color=INK)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.vlines(range(len(keys) + 1), 0, 1, color=FAINT, lw=0.5, zorder=0)

    return draw


def bars(weights: dict[str, float]) -> Draw:
    """Importance of each key."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = sorted(weights, key=lambda key: weights[key])
        axes.barh(names, [weights[name] for name in names], color=ACCENT)
        _titled(axes, "Importance (fANOVA)", "share of the variance", "")
        axes.set_xlim(0, 1)

    return draw


def importance(space: Space, attempts: Sequence[Attempt], metric: str) -> dict[str, float]:
    """Share of the metric's variance that each key explains by itself.

    By functional ANOVA over a random forest (Hutter, Hoos and Leyton-Brown, ICML 2014), as Optuna
    has it. Nothing where there are too few trials, or all came out the same; keys that only some
    trials have are left out.
    """
    import optuna

    found = [a for a in attempts if math.isfinite(a.figure(metric))]
    keys = [d.key for d in space.free if all(d.key in a.values for a in found)]
    if len(found) < FEWEST or not keys or len({a.figure(metric) for a in found}) == 1:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    kinds = {d.key: _distribution(d.domain) for d in space.free if d.key in keys}
    for attempt in found:
        values = {key: _category(attempt.values[key]) for key in keys}
        study.add_trial(
            optuna.trial.create_trial(
                params=values, distributions=kinds, value=attempt.figure(metric)
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=space.config.seed)
    try:
        return dict(evaluator.evaluate(study, params=keys))
    except (RuntimeError, ValueError):  # no variance within the trials that it kept
        return {}


def _distribution(domain: Any) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not isinstance(domain, Range):
        return CategoricalDistribution([_category(option) for option in domain.options])
    if domain.whole:
        return IntDistribution(int(domain.low), int(domain.high), domain.log, domain.step)
    return FloatDistribution(float(domain.low), float(domain.high), domain.log)


def _category(value: Any) -> Any:
    return str(value) if isinstance(value, list) else value


def _height(space: Space, attempt: Attempt, key: str) -> float:
    """Where a value lies on its axis, 0 to 1; NaN where the trial has none."""
    if key not in attempt.values:
        return math.nan
    domain = next(d.domain for d in space.free if d.key == key)
    value = attempt.values[key]
    if not isinstance(domain, Range):
        return domain.options.index(value) / max(1, len(domain.options) - 1)
    scale = math.log if domain.log else float
    low, high = scale(domain.low), scale(domain.high)
    return (scale(value) - low) / (high - low)


def _ends(one: Free) -> tuple[str, str]:
    """What lies at both ends of an axis."""
    if isinstance(one.domain, Range):
        return shown(one.domain.low), shown(one.domain.high)
    return shown(one.domain.options[0]), shown(one.domain.options[-1])


def _titled(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
