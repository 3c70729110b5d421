from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.training.sampler import GlobalOrder, prefetched, share

SIZES = [16, 16, 16, 7, 16, 3, 16, 16]
TOTAL = sum(SIZES)


def ids(order: GlobalOrder, first: int, last: int) -> list[int]:
    return [order.at(position).id for position in range(first, last)]


def test_each_epoch_holds_every_sample_once() -> None:
    order = GlobalOrder(SIZES, seed=3, window=2)
    for epoch in range(3):
        seen = ids(order, epoch * TOTAL, (epoch + 1) * TOTAL)
        assert sorted(seen) == list(range(TOTAL))
        assert {order.at(p).epoch for p in range(epoch * TOTAL, (epoch + 1) * TOTAL)} == {epoch}


def test_epochs_and_seeds_differ_and_the_same_seed_repeats() -> None:
    order = GlobalOrder(SIZES, seed=3, window=2)
    assert ids(order, 0, TOTAL) != ids(order, TOTAL, 2 * TOTAL)
    assert ids(order, 0, TOTAL) != ids(GlobalOrder(SIZES, seed=4, window=2), 0, TOTAL)
    assert ids(order, 0, 300) == ids(GlobalOrder(SIZES, seed=3, window=2), 0, 300)


def test_a_position_needs_no_history() -> None:
    walked = GlobalOrder(SIZES, seed=3, window=2)
    for position in range(250):
        walked.at(position)
    assert GlobalOrder(SIZES, seed=3, window=2).at(249) == walked.at(249)


@pytest.mark.parametrize("weight", [0, 0.25, 0.5, 1, 1.7, 3])
def test_a_source_comes_as_often_as_its_weight_says(weight: float) -> None:
    weights = [1.0, weight, 1.0, weight, weight, 1.0, weight, weight]
    order = GlobalOrder(SIZES, 3, 2, weights)
    starts = np.cumsum([0, *SIZES])
    own = {i for g, w in enumerate(weights) if w == weight for i in range(*starts[g : g + 2])}
    own -= {i for i in own if weight == 1}
    others = set(range(TOTAL)) - own
    assert order.samples == len(others) + round(weight * len(own))
    drawn = []
    for epoch in range(4):
        first = epoch * order.samples
        seen = Counter(ids(order, first, first + order.samples))
        assert {seen[i] for i in others} == {1}
        assert {seen[i] for i in own} <= {int(weight), int(weight) + (weight % 1 > 0)}
        drawn.append({i for i in own if seen[i] > int(weight)})
    if weight % 1:
        assert drawn[0] != drawn[1] and len(set.union(*drawn)) > len(drawn[0])


def test_without_weights_the_order_is_as_with_equal_ones() -> None:
    assert ids(GlobalOrder(SIZES, 3, 2), 0, 300) == ids(
        GlobalOrder(SIZES, 3, 2, [1.0] * len(SIZES)), 0, 300
    )


def test_a_window_touches_only_its_row_groups() -> None:
    order = GlobalOrder([10] * 40, seed=0, window=4)
    for number in range(10):
        groups = {sample // 10 for sample in ids(order, number * 40, number * 40 + 40)}
        assert len(groups) == 4


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_world_size_never_changes_the_batch(workers: int) -> None:
    whole = list(share(5, 32, 0, 1))
    parts = [p for rank in range(workers) for p in share(5, 32, rank, workers)]
    assert parts == whole


def test_prefetched_keeps_order_and_starts_anywhere() -> None:
    assert list(prefetched(lambda n: n * n, 3, 20)) == [n * n for n in range(3, 20)]
    assert list(prefetched(lambda n: n, 5, 5)) == []


def test_prefetched_raises_what_the_maker_raised() -> None:
    def make(number: int) -> int:
        if number == 4:
            raise ValueError("row 4 is damaged")
        return number

    taken: list[int] = []
    with pytest.raises(ValueError, match="row 4 is damaged"):
        for number in prefetched(make, 0, 10):
            taken.append(number)
    assert taken == [0, 1, 2, 3]


def test_prefetched_stops_when_its_consumer_leaves() -> None:
    made = Counter[int]()

    def make(number: int) -> int:
        made[number] += 1
        return number

    source: Iterator[int] = prefetched(make, 0, 10_000)
    assert next(source) == 0
    source.close()  # type: ignore[attr-defined]
    assert len(made) < 20


def test_shuffling_is_not_the_identity() -> None:
    order = GlobalOrder([64] * 4, seed=0, window=2)
    first = np.array(ids(order, 0, 256))
    assert np.mean(np.diff(first) == 1) < 0.1
