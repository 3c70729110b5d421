"""The order of the training data, and the reader that follows it.

Order of an epoch: permute row groups by (seed, epoch), cut the permutation into windows of
`shuffle_window` groups, shuffle the rows inside each window. A reader therefore fetches only the
row groups of its window, and a position is one number: samples consumed since the start. The order
does not know the world size, so a run that was killed at N workers continues at M with the same
batches.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from pipelines.data.corpus import Columns, RowGroups

T = TypeVar("T")
AHEAD = 4
"""Batches prepared before they are asked for."""


@dataclass(frozen=True)
class Sample:
    """One training row of one epoch."""

    epoch: int
    id: int


class GlobalOrder:
    """Position -> sample. Pure: the same arguments give the same order, everywhere.

    Args:
        sizes: rows of each row group, in order of sample id.
        seed: of the run.
        window: row groups that are shuffled together.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.window_groups = seed, window
        self.samples = int(self.starts[-1])
        self._layout = lru_cache(maxsize=4)(self._compute_layout)
        self._window = lru_cache(maxsize=8)(self._compute_window)

    def at(self, position: int) -> Sample:
        epoch, offset = divmod(position, self.samples)
        _, ends = self._layout(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        begin = int(ends[number - 1]) if number else 0
        return Sample(epoch, int(self._window(epoch, number)[offset - begin]))

    def _compute_layout(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Row groups of each window of an epoch, and the positions at which the windows end."""
        groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        windows = [
            groups[start : start + self.window_groups]
            for start in range(0, len(groups), self.window_groups)
        ]
        return windows, np.cumsum([int(self.sizes[window].sum()) for window in windows])

    def _compute_window(self, epoch: int, number: int) -> np.ndarray:
        """Sample ids of one window in their shuffled order."""
        groups = self._layout(epoch)[0][number]
        ids = np.concatenate([np.arange(self.starts[g], self.starts[g + 1]) for g in groups])
        return np.random.default_rng([self.seed, epoch, number]).permutation(ids)


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
