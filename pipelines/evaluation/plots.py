"""Figures, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], None]
INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#2f6fde"
MOST_NUMBERS = 20
"""Classes up to which a confusion matrix shows its counts."""


def png(draw: Draw) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    raw = io.BytesIO()
    figure.savefig(raw, format="png")
    return raw.getvalue()


def curves(history: Sequence[Mapping[str, float]], heldout: float | None = None) -> Draw:
    """Training loss over steps, its running mean, and the learning rate behind them.

    Args:
        history: rows with `step`, `loss` (nats) and `learning_rate`.
        heldout: loss on held-out data, drawn as a level.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = [row for row in history if np.isfinite(row["loss"])]  # skipped steps have none
        steps = [row["step"] for row in rows]
        losses = np.array([row["loss"] for row in rows])
        rates = axes.twinx()
        rates.plot(steps, [row["learning_rate"] for row in rows], color=FAINT, lw=1, ls=":")
        rates.set_ylabel("learning rate (dotted)", color=FAINT)
        rates.tick_params(axis="y", colors=FAINT)
        rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        rates.set_ylim(bottom=0)
        axes.plot(steps, losses, color=ACCENT, alpha=0.3, lw=1, label="each logged step")
        axes.plot(steps, smoothed(losses), color=ACCENT, lw=2, label="running mean")
        if heldout is not None:
            axes.axhline(heldout, color=INK, lw=1, ls="--", label=f"held out: {heldout:.3f}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats")
        axes.set_title("Training loss", loc="left", color=INK)
        axes.set_zorder(rates.get_zorder() + 1)
        axes.set_frame_on(False)
        axes.legend(frameon=False)
        for drawn in (axes, rates):
            drawn.spines[["top"]].set_visible(False)

    return draw


PANELS: Mapping[str, str] = {
    "loss": "loss, nats",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "predictions_per_second": "predictions per second",
    "mfu": "MFU",
    "step_seconds": "seconds of a step",
    "data_wait": "share waiting for data",
    "goodput": "goodput",
    "peak_memory_bytes": "peak memory, GiB",
}
"""Figures of a training run that are drawn, where it has them."""


def training(history: Sequence[Mapping[str, float]]) -> Draw:
    """What a run looked like from the machine's side: a panel for each figure of its steps.

    Args:
        history: rows with `step` and keys of `PANELS`.
    """

    def draw(figure: Figure) -> None:
        shown = [key for key in PANELS if any(key in row for row in history)]
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure.set_size_inches(4.2 * columns, 2.5 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        for axes, key in zip(grid, shown, strict=False):
            points = [
                (row["step"], row[key]) for row in history if np.isfinite(row.get(key, np.nan))
            ]
            values = np.array([value for _, value in points])
            if key == "peak_memory_bytes":
                values = values / 2**30
            axes.plot([step for step, _ in points], values, color=ACCENT, lw=1)
            axes.set_title(PANELS[key], loc="left", color=INK, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            if key in ("data_wait", "goodput", "mfu"):
                axes.set_ylim(0, 1)
            elif key not in ("loss", "gradient_norm"):
                axes.set_ylim(bottom=0)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)

    return draw


def smoothed(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Mean over the `share` of the points around each one, fewer at the ends."""
    reach = round(share * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    starts, ends = np.maximum(0, places - reach), np.minimum(len(values), places + reach + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def confusion(matrix: np.ndarray, labels: Sequence[str]) -> Draw:
    """Rows are true classes, columns predicted ones; colour is the share of the row.

    Args:
        matrix: counts [classes, classes].
    """

    def draw(figure: Figure) -> None:
        side = min(14.0, 3.2 + 0.42 * len(labels))
        figure.set_size_inches(side + 1.2, side)
        axes = figure.subplots()
        share = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
        if len(labels) <= MOST_NUMBERS:
            _numbers(axes, matrix, share)
        names = labels if drawable(labels) else [str(place) for place in range(len(labels))]
        rotation = 90 if max(map(len, names), default=0) > 3 else 0
        axes.set_xticks(range(len(names)), names, rotation=rotation)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        right = int(np.trace(matrix))
        axes.set_title(f"{right} of {int(matrix.sum())} right", loc="left", color=INK)

    return draw


def _numbers(axes: object, matrix: np.ndarray, share: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if share[row, column] > 0.5 else INK
        count = int(matrix[row, column])
        axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)  # type: ignore[attr-defined]


def drawable(labels: Sequence[str]) -> bool:
    """Whether the font that ships with matplotlib has every character.

    It has no Chinese, for one; boxes in place of names would say less than the classes' numbers.
    """
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    known = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return all(ord(letter) in known for label in labels for letter in label)
