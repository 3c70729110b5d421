"""What each trial of a study did, one file per trial, written at each of its reports.

    <root>/runs/<study>/trials/<trial>.json

It outlives the driver: the budget, the pages and MLflow are all made from it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pyarrow import fs

from cluster.config import TuneSection
from cluster.storage import Store

State = Literal["running", "done", "ended", "failed"]
"""`ended`: by the scheduler or the budget; `failed`: diverged or died."""
Row = dict[str, float]


@dataclass(frozen=True)
class Attempt:
    """One trial."""

    trial: str
    role: str
    """`search`, or what is confirmed: `winner`, `recipe`; `lost` where the driver was killed before
    it had noted the trial, which it then began again under another name."""
    seed: int
    values: dict[str, Any]
    """The newest; with `pbt` they change on the way."""
    began: float
    """Unix time."""
    rows: list[Row] = field(default_factory=list)
    """Its reports in order of `step`."""
    turns: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Step from which on it had which values, where they changed."""
    state: State = "running"
    reason: str = ""
    seconds: float = 0.0
    """From its beginning to its last report."""

    @property
    def last(self) -> Row:
        return self.rows[-1] if self.rows else {}

    def figure(self, metric: str) -> float:
        """At its end; NaN where it has none."""
        return float("nan") if self.state == "failed" else self.last.get(metric, float("nan"))

    @property
    def tokens(self) -> float:
        """Predictions trained on, also those that another's weights then replaced."""
        return self._spent("tokens")

    @property
    def train_seconds(self) -> float:
        return self._spent("train_seconds")

    def _spent(self, key: str) -> float:
        """Sum of what each report adds to the one before. Every fold counts from nothing; a count
        that falls is that of another trial, whose weights were taken."""
        total, before, fold = 0.0, 0.0, 0.0
        for row in self.rows:
            count = row.get(key, before)
            if not math.isfinite(count):  # a trial that failed ends with the worst
                continue
            before, fold = before * (row.get("fold", fold) == fold), row.get("fold", fold)
            total, before = total + max(0.0, count - before), count
        return total

    def reported(self, result: Mapping[str, Any], values: Mapping[str, Any]) -> Attempt:
        """With another report. A step that is reported again replaces what it said before."""
        numbers = {
            key: float(value)
            for key, value in result.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        step = numbers["step"]
        rows = [row for row in self.rows if row["step"] < step]
        turns = self.turns
        if self.values != values:
            turns = [*(turns or [(0, self.values)]), (int(step), dict(values))]
        return replace(
            self,
            rows=[*rows, numbers],
            turns=turns,
            values=dict(values),
            seconds=time.time() - self.began,
            reason=str(result.get("reason", "")),
        )


@dataclass(frozen=True)
class Ledger:
    store: Store
    study: str

    @property
    def folder(self) -> str:
        return f"{self.store.base}/runs/{self.study}/trials"

    def write(self, attempt: Attempt) -> None:
        raw = json.dumps(plain_json(asdict(attempt)), ensure_ascii=False).encode()
        self.store.write(f"{self.folder}/{attempt.trial}.json", lambda out: out.write(raw))

    def read(self, trial: str) -> Attempt | None:
        raw = self.store.read(f"{self.folder}/{trial}.json")
        return None if raw is None else _attempt(raw)

    def attempts(self) -> list[Attempt]:
        """In the order in which they began."""
        selector = fs.FileSelector(self.folder, allow_not_found=True)
        paths = [info.path for info in self.store.filesystem.get_file_info(selector)]
        raws = [self.store.read(path) for path in paths if path.endswith(".json")]
        found = [_attempt(raw) for raw in raws if raw is not None]
        return sorted(found, key=lambda attempt: (attempt.began, attempt.trial))


def spent(settings: TuneSection, attempts: Sequence[Attempt], workers: int) -> dict[str, float]:
    """Of each budget that the recipe sets: how much is used, over how much there is."""
    began = min((a.began for a in attempts), default=0.0)
    used = {
        "seconds": max((a.began + a.seconds for a in attempts), default=0.0) - began,
        "tokens": sum(a.tokens for a in attempts),
        "money": sum(a.seconds for a in attempts) / 3600 * workers * settings.price_per_hour,
    }
    return {key: used[key] / getattr(settings, key) for key in used if getattr(settings, key)}


def best(attempts: Sequence[Attempt], metric: str, mode: str) -> Attempt | None:
    """The one with the best figure among those that came furthest; None where all failed.

    A loss is only worth as much as the steps that it took: one that was ended early is not
    compared with one that was not.
    """
    whole = [a for a in attempts if a.state == "done" and math.isfinite(a.figure(metric))]
    found = whole or [a for a in attempts if math.isfinite(a.figure(metric))]
    sign = 1 if mode == "min" else -1
    return min(found, key=lambda a: (sign * a.figure(metric), a.began), default=None)


def front(attempts: Sequence[Attempt], objectives: Mapping[str, str]) -> list[Attempt]:
    """Those that no other is better than in one objective without being worse in another."""
    signs = {metric: 1 if mode == "min" else -1 for metric, mode in objectives.items()}
    figures = {
        a.trial: [sign * a.figure(metric) for metric, sign in signs.items()]
        for a in attempts
        if a.state == "done" and all(math.isfinite(a.figure(metric)) for metric in signs)
    }

    def beaten(own: list[float]) -> bool:
        return any(
            other != own and all(o <= n for o, n in zip(other, own, strict=True))
            for other in figures.values()
        )

    return [a for a in attempts if a.trial in figures and not beaten(figures[a.trial])]


def shown(value: Any) -> str:
    """For a person."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempt(raw: bytes) -> Attempt:
    tree = json.loads(raw)
    tree["rows"] = [{k: float(v) for k, v in row.items()} for row in tree["rows"]]
    tree["turns"] = [(int(step), values) for step, values in tree["turns"]]
    return Attempt(**tree)


def plain_json(value: Any) -> Any:
    """JSON knows neither NaN nor infinity; as text, Python reads them again."""
    if isinstance(value, dict):
        return {key: plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
