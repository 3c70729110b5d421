"""Folds of the training rows, for cross-validation: each row is held out by exactly one of them.

Rows are dealt by their class where the corpus has one (column `label`), so that every fold has the
classes in the proportions of the whole (stratified; Kohavi, IJCAI 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.errors import UsageError
from pipelines.data.corpus import Corpus, RowGroups
from pipelines.training.sampler import GlobalOrder, Sample

LABEL = "label"
"""Column of a row's class, as families with classes name it."""


@dataclass(frozen=True)
class Fold:
    number: int
    of: int
    seed: int
    """Deals the rows; the same for all trials of a search, whatever their own seed."""


def dealt(classes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each row: every class is dealt out evenly, in an order that follows from the seed.

    Raises:
        UsageError: if a class has fewer rows than there are folds.
    """
    names, counts = np.unique(classes, return_counts=True)
    if len(names) and counts.min() < folds:
        raise UsageError(
            f"tune.folds {folds}: class {names[counts.argmin()]} has {counts.min()} training rows, "
            "too few for one in each fold: take fewer folds"
        )
    fold = np.empty(len(classes), dtype=np.int64)
    rng, first = np.random.default_rng([seed, folds]), 0
    for name, count in zip(names, counts, strict=True):
        rows = rng.permutation(np.flatnonzero(classes == name))
        # Each class goes on where the one before it stopped, so that the folds are of one size.
        fold[rows] = (first + np.arange(count)) % folds
        first += int(count)
    return fold


def classes_of(groups: RowGroups) -> np.ndarray:
    """Class of each row, in order of sample id; zeros where rows have none."""
    columns = [groups.read(number) for number in range(len(groups))]
    if not all(LABEL in column for column in columns):
        return np.zeros(groups.starts[-1], dtype=np.int64)
    return np.concatenate([np.asarray(column[LABEL]) for column in columns])


def rows_of(corpus: Corpus, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids to train on, and those that this fold holds out."""
    dealing = dealt(classes_of(corpus.row_groups("train")), fold.of, fold.seed)
    return np.flatnonzero(dealing != fold.number), np.flatnonzero(dealing == fold.number)


class Subset:
    """The order over some of the rows: like `GlobalOrder`, as if the others were not there."""

    def __init__(self, ids: np.ndarray, sizes: list[int], seed: int, window: int) -> None:
        starts = np.concatenate([[0], np.cumsum(sizes)])
        left = np.diff(np.searchsorted(ids, starts))
        self._ids = ids
        self._order = GlobalOrder([int(n) for n in left if n], seed, window)

    @property
    def samples(self) -> int:
        return self._order.samples

    def at(self, position: int) -> Sample:
        sample = self._order.at(position)
        return Sample(sample.epoch, int(self._ids[sample.id]))
