"""One place for the figures of a running job: workers put rows, the driver follows them.

`ray.train.report` is a barrier that is paced by its controller's polling; this is neither.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, float]
"""Figures of one step; `step` is the key, so that a replayed step replaces its first run."""


class Records:
    """Rows by step, idempotent, in the order in which they last changed."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, Row]] = {}
        self._changes = 0

    def put(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._changes += 1
            self._rows[int(row["step"])] = (self._changes, row)

    def since(self, change: int) -> tuple[int, list[Row]]:
        """Rows that changed after a change number, by step, and the number to ask with next."""
        fresh = [row for number, row in self._rows.values() if number > change]
        return self._changes, sorted(fresh, key=lambda row: row["step"])


def start_board(options: Mapping[str, Any] | None = None) -> Any:
    """A Ray actor that holds `Records`; workers call `put.remote`, the driver `since.remote`."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=0)(Records).options(**(options or {})).remote()
