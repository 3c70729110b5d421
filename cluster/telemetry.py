"""One place for the figures of a running job: workers put rows, the driver follows them.

`ray.train.report` is a barrier that is paced by its controller's polling; this is neither.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, float]
"""Figures of one step; `step` is the key, so that a replayed step replaces its first run."""
PREFIX = "heliostat_train_"
GAUGES: Mapping[str, str] = {
    "step": "Optimizer steps done",
    "loss": "Mean loss of the global batch, nats per prediction",
    "learning_rate": "Learning rate",
    "gradient_norm": "Norm of the gradient before clipping",
    "predictions_per_second": "Predictions (tokens, images) per second over all devices",
    "predictions_per_second_per_device": "Predictions (tokens, images) per second and device",
    "step_seconds": "Seconds of a step",
    "data_wait": "Share of a step that waits for data",
    "mfu": "Model FLOP/s utilisation: share of the devices' peak",
    "peak_memory_bytes": "Largest memory in use by a worker (rank 0)",
    "goodput": "Seconds of steps that count over seconds since the run began",
    "save_seconds": "Seconds that the last checkpoint held training up; 0 before the first",
    "skipped": "1 where the step was skipped because it was not finite",
    "slow_rank": "Rank whose own work takes far longer than that of the others, or -1",
}


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


@dataclass(frozen=True)
class Sign:
    """A sign of life of a training worker."""

    start_id: str
    """Of the start of the workers that it belongs to; one start after another under one command."""
    rank: int
    ranks: int
    pid: int
    born: float
    """Unix time at which the process began: a pid alone may be another's by now."""
    node: str
    start: int
    """Step that this start of the workers began from."""
    step: int
    """Steps done."""
    phase: str
    """What the worker is at: `start`, `data`, `step`, `save`."""
    batch: int
    """Number of the global batch that it is at, or comes to next."""
    step_seconds: float
    longest: float
    """Seconds of the longest step of this start."""
    own: float
    """Median seconds per step of the rank's own work over the last steps; 0 if not known yet."""

    @property
    def place(self) -> tuple[int, str]:
        return self.step, self.phase


class Board(Records):
    """Rows, and the last sign of life of each rank."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._start_id = ""
        self._signs: dict[int, tuple[Sign, float, float]] = {}
        self._stop = False

    def begin(self, start_id: str) -> None:
        """A new start of the workers, or the end of one: what is left of others is not heard."""
        self._start_id, self._signs = start_id, {}

    def sign(self, sign: Sign) -> bool:
        """Take a sign of life; tells whether the driver wants the run to stop."""
        if sign.start_id == self._start_id:
            now = self._clock()
            before = self._signs.get(sign.rank)
            same = before is not None and before[0].place == sign.place
            self._signs[sign.rank] = (sign, now, before[2] if before and same else now)
        return self._stop

    def signs(self) -> list[tuple[Sign, float, float]]:
        """Last sign of each rank, seconds since it came, seconds since it showed anything new."""
        now = self._clock()
        return [(sign, now - came, now - new) for sign, came, new in self._signs.values()]

    def stop(self) -> None:
        """Ask the workers to commit a checkpoint and end."""
        self._stop = True


class Gauges:
    """The newest row on Prometheus, labelled with the run and its name."""

    def __init__(self, run: str, name: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            key: Gauge(PREFIX + key, description=text, tag_keys=("run", "name"))
            for key, text in GAUGES.items()
        }
        self._tags = {"run": run, "name": name}

    def show(self, row: Mapping[str, float]) -> None:
        for key in row.keys() & self._gauges.keys():
            self._gauges[key].set(row[key], tags=self._tags)


def start_board(options: Mapping[str, Any] | None = None, kind: type[Board] = Board) -> Any:
    """A Ray actor that holds a `Board`; workers call `put.remote`, the driver `since.remote`.

    It lives on the driver's node: a run outlives the loss of any other.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(kind)
    return actor.options(**(options or {})).remote()
