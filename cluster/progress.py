"""What a person sees: a bar per stage on a terminal, plain lines elsewhere.

Everything goes through one console, so that `--json` can move it to stderr and keep stdout for the
one line of JSON.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PLAIN_EVERY_SECONDS = 10.0
_state: dict[str, Any] = {"stderr": False, "console": None}


def to_stderr() -> None:
    _state.update(stderr=True, console=None)


def console() -> Any:
    """The `rich` console in use; made on first need, because importing rich takes a moment."""
    if _state["console"] is None:
        from rich.console import Console

        _state["console"] = Console(stderr=_state["stderr"], highlight=False, soft_wrap=True)
    return _state["console"]


def say(text: str) -> None:
    """One line for a person; never parsed as markup."""
    console().print(text, markup=False, emoji=False)


@dataclass(frozen=True)
class Reading:
    """A plain line of a bar, read back from the log of a job."""

    label: str
    done: int
    total: int
    """0 where it is not known."""
    unit: str
    note: str
    """What follows the counts."""

    @property
    def goodput(self) -> str:
        """As a share in percent; empty where the line says none."""
        found = re.search(r"goodput (\d+%)", self.note)
        return found[1] if found else ""


_PLAIN = re.compile(
    r"(?P<label>[\w -]+): (?P<done>\d+)(/(?P<total>\d+))? (?P<unit>\S+),(?P<note>.*)"
)


def read(line: str) -> Reading | None:
    """What `Bar.update` printed elsewhere; None for any other line."""
    found = _PLAIN.fullmatch(line.strip())
    if found is None:
        return None
    label, unit, note = (found[name].strip() for name in ("label", "unit", "note"))
    return Reading(label, int(found["done"]), int(found["total"] or 0), unit, note)


class Bar:
    """Progress of one stage."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._began = self._printed = time.monotonic()
        self._first: int | None = None
        """Units already done when work began, so that rates leave start-up and resumed work out."""
        self._finished = False

    def update(self, done: int, note: str = "") -> None:
        """Set how much is done, in units, with a short note such as the current loss."""
        now = time.monotonic()
        self._note_first(done, now)
        finished = 0 < self.total <= done and not self._finished
        if now - self._printed >= PLAIN_EVERY_SECONDS or finished:
            self._printed, self._finished = now, finished or self._finished
            say(f"{self.label}: {self.describe(done, now)} {note}".rstrip())

    def _note_first(self, done: int, now: float) -> None:
        if self._first is None:
            self._first, self._began = done, now

    def describe(self, done: int, now: float) -> str:
        elapsed = now - self._began
        rate = (done - (self._first or 0)) / elapsed if elapsed > 0 else 0.0
        left = f", {(self.total - done) / rate:.0f} s left" if rate > 0 and self.total else ""
        of = f"/{self.total}" if self.total else ""
        return f"{done}{of} {self.unit}, {rate:.1f} {self.unit}/s{left}"


class _TerminalBar(Bar):
    def __init__(self, label: str, total: int, unit: str, progress: Any) -> None:
        super().__init__(label, total, unit)
        self._progress = progress
        self._task = progress.add_task(label, total=total or None, note="")

    def update(self, done: int, note: str = "") -> None:
        self._note_first(done, time.monotonic())
        rate = self.describe(done, time.monotonic()).split(", ", 1)[1]
        self._progress.update(self._task, completed=done, note=f"{rate}  {note}")


@contextmanager
def bar(label: str, total: int, unit: str) -> Iterator[Bar]:
    """A bar for one piece of work; `total` 0 where it is not known."""
    if not console().is_terminal:
        yield Bar(label, total, unit)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console(), transient=False) as progress:
        yield _TerminalBar(label, total, unit, progress)


def table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title)
    for name in header:
        drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console().print(drawn)


def write_json_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
