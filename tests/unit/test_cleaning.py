"""Cleaning rules, one by one and in order, on several scripts."""

import pytest

from cluster.config import TextData
from pipelines.data import cleaning
from pipelines.data.cleaning import Drop

RULES = cleaning.rules(TextData(sources=("x",), min_characters=4, max_characters=40))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one\r\ntwo\rthree\x85", "one\ntwo\nthree\n"),
        ("a\x00b\x1b[0m\tc\x7f\x9f", "ab[0m\tc"),
        ("cafe\u0301 \u1112\u1161\u11ab", "caf\u00e9 \ud55c"),
        ("你好,世界 １２３", "你好,世界 １２３"),
        ("هذا \u200dنص 👩\u200d🔬", "هذا \u200dنص 👩\u200d🔬"),
    ],
)
def test_rewrites(before: str, after: str) -> None:
    assert cleaning.clean(before, RULES) == after


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\u3000 \t", "empty"),
        ("\x00\x01\x02", "empty"),
        ("你好吗", "too_short"),
        ("长" * 41, "too_long"),
    ],
)
def test_drops(text: str, reason: str) -> None:
    assert cleaning.clean(text, RULES) == Drop(reason)


def test_length_is_of_what_remains() -> None:
    assert cleaning.clean("\x00" * 100 + "四个汉字", RULES) == "四个汉字"
    assert cleaning.clean("ab\x00\x00\x00", RULES) == Drop("too_short")


def test_cleaning_twice_changes_nothing() -> None:
    once = cleaning.clean("e\u0301\r\r\n\x85混合 text", RULES)
    assert isinstance(once, str)
    assert cleaning.clean(once, RULES) == once
