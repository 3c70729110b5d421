"""What happened to a run: every restart, skipped step, fallback and refusal, one file per event.

    <root>/runs/<run>/journal/<nanoseconds>-<event>.json

One file per event needs no append, so the journal works on any filesystem and survives a kill at
any moment. `heliostat journal RUN` prints it.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pyarrow import fs

from cluster.storage import Store


@dataclass(frozen=True)
class Event:
    nanoseconds: int
    name: str
    fields: dict[str, Any]

    def json(self) -> str:
        """One line of JSON; `at` is Unix time in nanoseconds."""
        tree = {"at": self.nanoseconds, "event": self.name, **self.fields}
        return json.dumps(tree, ensure_ascii=False)

    def line(self) -> str:
        """`2026-11-22 01:02:03  skipped_step  step=17 loss=nan`."""
        when = datetime.fromtimestamp(self.nanoseconds / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
        fields = " ".join(f"{key}={_shown(value)}" for key, value in self.fields.items())
        return f"{when}  {self.name:<18} {fields}".rstrip()


@dataclass(frozen=True)
class Journal:
    store: Store
    run: str

    @property
    def folder(self) -> str:
        return f"{self.store.base}/runs/{self.run}/journal"

    def write(self, name: str, **fields: Any) -> None:
        """Record an event; durable when it returns.

        Args:
            name: a word or two with underscores, such as `worker_lost`.
            fields: plain JSON values.
        """
        nanoseconds = time.time_ns()
        tree = {"event": name, "at": nanoseconds, **{k: _json(v) for k, v in fields.items()}}
        content = json.dumps(tree, ensure_ascii=False)
        path = f"{self.folder}/{nanoseconds:020d}-{name}.json"
        self.store.write(path, lambda stream: stream.write(content.encode()))

    def events(self) -> Iterator[Event]:
        """In order of time."""
        selector = fs.FileSelector(self.folder, allow_not_found=True)
        for info in sorted(self.store.filesystem.get_file_info(selector), key=lambda i: i.path):
            raw = self.store.read(info.path)
            if raw is None or not info.path.endswith(".json"):
                continue
            fields = json.loads(raw)
            yield Event(fields.pop("at"), fields.pop("event"), fields)


def newest_run(store: Store, name: str) -> str | None:
    """The run of a recipe's name that began last; None where none has a journal."""
    own = re.compile(re.escape(name) + r"-[0-9a-f]{10}")
    begun = {run: next(Journal(store, run).events(), None) for run in runs(store)}
    times = {run: first.nanoseconds for run, first in begun.items() if first and own.fullmatch(run)}
    return max(times, key=lambda run: times[run], default=None)


def runs(store: Store) -> list[str]:
    """Runs that have a journal, oldest first."""
    selector = fs.FileSelector(f"{store.base}/runs", allow_not_found=True)
    found = sorted(store.filesystem.get_file_info(selector), key=lambda info: info.mtime_ns or 0)
    return [info.base_name for info in found if info.type == fs.FileType.Directory]


def _json(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
