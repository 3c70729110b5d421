"""How pieces of work are dealt to tasks."""

import pytest

from pipelines.data.streaming import MOST_PIECES, portions


@pytest.mark.parametrize("slots", [1, 2, 7, 800])
@pytest.mark.parametrize(
    "sizes", [[], [0, 0, 0], [5], [1] * 300, list(range(200, 0, -1)), [10**9, *[1] * 99]]
)
def test_every_piece_is_dealt_once_in_order(sizes: list[int], slots: int) -> None:
    shares = portions(sizes, slots)
    assert [number for share in shares for number in share] == list(range(len(sizes)))
    assert all(1 <= len(share) <= MOST_PIECES for share in shares)


def test_no_task_holds_what_others_wait_for() -> None:
    sizes = [100, 90, *[10] * 60, *[1] * 40]
    left = sum(sizes)
    for share in portions(sizes, 4):
        took = sum(sizes[number] for number in share)
        assert len(share) == 1 or took <= left / 8
        left -= took


def test_many_while_much_is_left_and_one_by_one_in_the_end() -> None:
    shares = [len(share) for share in portions([1] * 64, 2)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == MOST_PIECES and shares[-4:] == [1, 1, 1, 1]
    assert len(shares) < 64 / 3
