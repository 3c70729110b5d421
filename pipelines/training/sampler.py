"""The order of the training data, and the reader that follows it.

Order of an epoch: permute row groups by (seed, epoch), cut the permutation into windows of
`shuffle_window` groups, shuffle the rows inside each window. Where sources are mixed, a row group
of weight 2.5 is there twice, and another half of its source's rows a third time. A reader therefore
fetches only the row groups of its window, and a position is one number: samples consumed since the
start. The order does not know the world size, so a run that was killed at N workers continues at M
with the same batches.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from cluster.config import RunConfig
from pipelines.data.corpus import Columns, RowGroups

T = TypeVar("T")
_DRAW = 1 << 40
"""Beside the numbers of windows: draws the row groups of a fraction."""
AHEAD = 4
"""Batches prepared before they are asked for."""


@dataclass(frozen=True)
class Sample:
    """One training row of one epoch."""

    epoch: int
    id: int


@dataclass(frozen=True)
class Groups:
    """Row groups, and how many rows of each are taken: all, or some that are drawn."""

    numbers: np.ndarray
    rows: np.ndarray


class GlobalOrder:
    """Position -> sample. Pure: the same arguments give the same order, everywhere.

    Args:
        sizes: rows of each row group, in order of sample id.
        seed: of the run.
        window: row groups that are shuffled together.
        weights: how often an epoch passes over each row group; None for once.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, window: int, weights: Sequence[float] | None = None
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.window_groups = seed, window
        self._weights = np.ones(len(self.sizes)) if weights is None else np.asarray(weights)
        self.samples = int(self._taken(0).rows.sum())
        """Of an epoch; each has as many."""
        self._layout = lru_cache(maxsize=4)(self._compute_layout)
        self._window = lru_cache(maxsize=8)(self._compute_window)

    def at(self, position: int) -> Sample:
        epoch, offset = divmod(position, self.samples)
        _, ends = self._layout(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        begin = int(ends[number - 1]) if number else 0
        return Sample(epoch, int(self._window(epoch, number)[offset - begin]))

    def _compute_layout(self, epoch: int) -> tuple[list[Groups], np.ndarray]:
        """Row groups of each window of an epoch, and the positions at which the windows end."""
        taken = self._taken(epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(taken.numbers))
        cuts = range(self.window_groups, len(order), self.window_groups)
        windows = [Groups(taken.numbers[o], taken.rows[o]) for o in np.split(order, cuts)]
        return windows, np.cumsum([int(window.rows.sum()) for window in windows])

    def _taken(self, epoch: int) -> Groups:
        """What an epoch takes of the row groups: whole ones, and of one weight's fraction as many
        rows in every epoch."""
        numbers, rows = [], []
        for weight in np.unique(self._weights):
            own = np.flatnonzero(self._weights == weight)
            whole, part = int(weight), float(weight % 1)
            numbers += [own] * whole
            rows += [self.sizes[own]] * whole
            drawn = np.random.default_rng([self.seed, epoch, _DRAW]).permutation(own)
            ends = np.cumsum(self.sizes[drawn])
            room = round(part * int(self.sizes[own].sum())) - (ends - self.sizes[drawn])
            numbers.append(drawn[room > 0])
            rows.append(np.minimum(self.sizes[drawn], room)[room > 0])
        return Groups(np.concatenate(numbers), np.concatenate(rows))

    def _compute_window(self, epoch: int, number: int) -> np.ndarray:
        """Sample ids of one window in their shuffled order."""
        window = self._layout(epoch)[0][number]
        rng = np.random.default_rng([self.seed, epoch, number])
        return rng.permutation(
            np.concatenate(
                [self._ids(g, n, rng) for g, n in zip(window.numbers, window.rows, strict=True)]
            )
        )

    def _ids(self, group: int, rows: int, rng: np.random.Generator) -> np.ndarray:
        ids = np.arange(self.starts[group], self.starts[group + 1])
        return ids if rows == len(ids) else rng.permutation(ids)[:rows]


def order_of(groups: RowGroups, config: RunConfig) -> GlobalOrder:
    """The order that a run follows."""
    train = config.train
    weights = groups.weights(train.mix)
    return GlobalOrder(groups.sizes, config.seed, train.shuffle_window, weights)


class RowReader:
    """Rows by sample id, holding the row groups read last.

    Args:
        keep: row groups held; two windows, because a batch may span the border of two.
    """

    def __init__(self, groups: RowGroups, keep: int) -> None:
        self._groups, self._keep = groups, keep
        self._starts = np.asarray(groups.starts)
        self._held: OrderedDict[int, Columns] = OrderedDict()

    def row(self, sample: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        columns = self._held.get(number)
        if columns is None:
            columns = self._held[number] = self._groups.read(number)
            if len(self._held) > self._keep:
                self._held.popitem(last=False)
        else:
            self._held.move_to_end(number)
        index = sample - int(self._starts[number])
        return {name: column[index] for name, column in columns.items()}


def share(step: int, global_batch: int, rank: int, workers: int) -> range:
    """Positions that a rank trains on at a step: a contiguous part of the global batch."""
    rows = global_batch // workers
    begin = step * global_batch + rank * rows
    return range(begin, begin + rows)


def prefetched(make: Callable[[int], T], first: int, last: int) -> Iterator[T]:
    """`make(first) ... make(last - 1)` from a thread that stays `AHEAD` items in front."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    pending: deque[Future[T]] = deque()
    try:
        for number in range(first, last):
            pending.append(pool.submit(make, number))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
