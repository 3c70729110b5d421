"""What is far out in a column of numbers, by Tukey's fences over all rows of a corpus.

A pass of its own over the sources counts numbers by their first seven binary digits, so that counts
of any pieces add up to the same. The fences then stand as bounds in the step `columns`: quartile
minus, and quartile plus, so many times the distance between the quartiles (Tukey, "Exploratory Data
Analysis", 1977). A quartile is told to within one part in 128.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cluster.config import ImageData, TextData
from cluster.config.cleaning import Columns
from cluster.errors import SourceError
from pipelines.data import sources, streaming
from pipelines.data.cleaning_table import cell_of, number_of
from pipelines.data.documents import MAX_BYTES_PER_CHARACTER
from pipelines.data.sources import RawText, SourceFile

Counts = dict[str, Counter[int]]
"""By column: how many numbers begin with the same digits."""
Fences = dict[str, tuple[float, float]]
LEAST = 8
"""Fewer numbers have no quartiles worth the name."""
_SHIFT = 45
"""Binary digits of a double that are left out: all but sign, exponent and seven more."""
_SIGN = 1 << 63


def settle(
    data: TextData | ImageData, parts: Sequence[Sequence[SourceFile]], tasks: int
) -> tuple[TextData | ImageData, Fences]:
    """The recipe's data with bounds in the place of `outliers`; what they are.

    Raises:
        SourceError: if a column holds too few numbers.
    """
    wanted = _wanted(data)
    if not isinstance(data, TextData) or not wanted:
        return data, {}
    task = functools.partial(count, data=data)
    counts: Counts = {name: Counter() for name in wanted}
    for found in streaming.over_partitions(parts, task, tasks):
        for name, own in found.items():
            counts[name].update(own)
    limits = {name: fences(name, counts[name], reach) for name, reach in wanted.items()}
    steps = tuple(
        replace(step, settings=_bounded(step.settings, limits))
        if isinstance(step.settings, Columns)
        else step
        for step in data.cleaning
    )
    return data.model_copy(update={"cleaning": steps}), limits


def _wanted(data: TextData | ImageData) -> dict[str, float]:
    if not isinstance(data, TextData):
        return {}
    settings = [step.settings for step in data.cleaning if isinstance(step.settings, Columns)]
    return {name: reach for own in settings for name, reach in own.outliers.items()}


def _bounded(settings: Columns, limits: Fences) -> Columns:
    """What the recipe itself bounds stays as it says."""
    own = {name: limits[name] for name in settings.outliers}
    return settings.model_copy(update={"bounds": own | settings.bounds, "outliers": {}})


def count(files: Sequence[SourceFile], *, data: TextData) -> Counts:
    """In a worker: the numbers of a partition."""
    wanted = _wanted(data)
    settings = [step.settings for step in data.cleaning if isinstance(step.settings, Columns)]
    missing = {word.lower() for own in settings for word in own.missing}
    numbers: dict[str, list[float]] = {name: [] for name in wanted}
    for file in files:
        for raw in sources.read_texts(file, MAX_BYTES_PER_CHARACTER * data.max_characters):
            if isinstance(raw, RawText) and raw.beside is not None:
                _collect(raw.beside, missing, numbers)
    return {name: buckets(found) for name, found in numbers.items()}


def _collect(
    cells: Mapping[str, object], missing: set[str], numbers: dict[str, list[float]]
) -> None:
    for name, found in numbers.items():
        cell = cell_of(cells, name, missing)
        number = None if cell is None else number_of(cell)
        if number is not None:
            found.append(number)


def buckets(numbers: Sequence[float]) -> Counter[int]:
    """How many lie in each bucket; buckets are in order of the numbers in them."""
    bits = np.array(numbers, dtype=np.float64).view(np.int64).astype(object)
    # Negative numbers grow in their bits as they fall.
    in_order = [bit if bit >= 0 else -(bit + _SIGN) - 1 for bit in bits]
    return Counter(bit >> _SHIFT for bit in in_order)


def edge(bucket: int) -> float:
    """The smallest number of a bucket."""
    bits = bucket << _SHIFT
    raw = bits if bits >= 0 else -(bits + 1) - _SIGN
    return float(np.array([raw], dtype=np.int64).view(np.float64)[0])


def fences(name: str, counts: Counter[int], reach: float) -> tuple[float, float]:
    """
    Raises:
        SourceError: if there are too few numbers.
    """
    total = counts.total()
    if total < LEAST:
        raise SourceError(
            f"data.cleaning: columns.outliers names {name}, and the sources hold {total} numbers "
            f"there, fewer than {LEAST}: take it out, or give columns.bounds"
        )
    low, high = edge(_quartile(counts, total, 1)), edge(_quartile(counts, total, 3) + 1)
    return low - reach * (high - low), high + reach * (high - low)


def _quartile(counts: Counter[int], total: int, quarter: int) -> int:
    """The bucket that it lies in."""
    passed = 0
    for bucket in sorted(counts):
        passed += counts[bucket]
        if 4 * passed >= quarter * total:
            return bucket
    raise AssertionError("the last bucket passes any share")
