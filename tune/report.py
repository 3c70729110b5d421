"""One page about a study, for a person: plain HTML with its pictures inside, opens anywhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipelines.evaluation.plots import Draw, png
from tune import plots
from tune.ledger import Attempt, front, shown
from tune.outcome import Outcome
from tune.space import Space

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --faint: #667380; --line: #d9dfe5; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: #ffffff;
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { color: var(--faint); white-space: pre-line; }
img { max-width: 100%; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .6rem; text-align: left; font-weight: normal;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-size: .85rem; }
tr.best td { font-weight: 600; }
"""


def page(space: Space, attempts: Sequence[Attempt], found: Outcome) -> bytes:
    """The page of a study that is over."""
    config = space.config
    searched = [attempt for attempt in attempts if attempt.role == "search"]
    confirmed = [attempt for attempt in attempts if attempt.role in ("winner", "recipe")]
    body = [
        f"<h1>{escape(config.name)}</h1>",
        f"<p>{escape(found.text)}</p>",
        f'<div class="pictures">{"".join(map(_picture, _drawings(space, searched, found)))}</div>',
        _trials("Trials", space, searched, found.winner),
        _trials("Confirmation, on rows that nothing was chosen by", space, confirmed, ""),
    ]
    if len(config.tune.objectives) > 1:
        best = front(searched, config.tune.objectives)
        body.append(_trials("Compromises that no other beats in all", space, best, found.winner))
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(config.name)}: study</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return (head + "\n".join(filter(None, body)) + "\n</body>\n</html>\n").encode()


def _drawings(space: Space, searched: Sequence[Attempt], found: Outcome) -> list[tuple[str, Draw]]:
    metric, mode = space.config.tune.objective
    drawings = [
        ("history", plots.history(searched, metric, mode)),
        ("learning curves", plots.learning_curves(searched, metric, found.winner)),
        ("parallel coordinates", plots.parallel(space, searched, metric, mode)),
        ("spending", plots.spending(searched)),
    ]
    weights = plots.importance(space, searched, metric)
    return [*drawings, *([("importance", plots.bars(weights))] if weights else [])]


def _picture(drawing: tuple[str, Draw]) -> str:
    name, draw = drawing
    raw = base64.b64encode(png(draw)).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{raw}">'


def _trials(title: str, space: Space, attempts: Sequence[Attempt], winner: str) -> str:
    if not attempts:
        return ""
    objectives = space.config.tune.objectives
    keys = [dimension.key for dimension in space.dimensions]
    heads = ("trial", "role", "seed", "state", "step", *objectives, "predictions", "seconds", *keys)
    rows = "".join(_row(attempt, objectives, keys, winner) for attempt in attempts)
    return (
        f'<h2>{escape(title)}</h2>\n<div class="scroll"><table><tr>'
        + "".join(f"<th>{escape(head)}</th>" for head in heads)
        + f"</tr>{rows}</table></div>"
    )


def _row(attempt: Attempt, objectives: Mapping[str, str], keys: Sequence[str], winner: str) -> str:
    state = attempt.state + (f": {attempt.reason}" if attempt.reason else "")
    if len(attempt.turns) > 1:
        state += f", changed at {', '.join(str(step) for step, _ in attempt.turns[1:])}"
    cells: list[Any] = [attempt.trial, attempt.role, attempt.seed, state]
    cells.append(f"{attempt.last.get('step', 0):.0f}")
    cells += [_figure(attempt, metric) for metric in objectives]
    cells += [f"{attempt.tokens:,.0f}", f"{attempt.seconds:.1f}"]
    cells += [shown(attempt.values.get(key, "")) for key in keys]
    mark = ' class="best"' if attempt.trial == winner else ""
    return f"<tr{mark}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _figure(attempt: Attempt, metric: str) -> str:
    value = attempt.figure(metric)
    deviation = attempt.last.get("heldout_deviation")
    text = f"{value:.4f}" if math.isfinite(value) else "none"
    return f"{text} ± {deviation:.4f}" if deviation and metric == "heldout_loss" else text
