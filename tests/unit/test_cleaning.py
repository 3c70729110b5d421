"""Cleaning rules, one by one and in order, on several scripts."""

import sys
from pathlib import Path

import pytest

from cluster.config import TextData
from cluster.errors import ConfigError, SourceError
from pipelines.data import cleaning
from pipelines.data.cleaning import Document, Drop, Rejected

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
    assert cleaning.clean(Document(before), RULES) == after


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
    assert cleaning.clean(Document(text), RULES) == Drop(reason)


def test_length_is_of_what_remains() -> None:
    assert cleaning.clean(Document("\x00" * 100 + "四个汉字"), RULES) == "四个汉字"
    assert cleaning.clean(Document("ab\x00\x00\x00"), RULES) == Drop("too_short")


def test_cleaning_twice_changes_nothing() -> None:
    once = cleaning.clean(Document("e\u0301\r\r\n\x85混合 text"), RULES)
    assert isinstance(once, str)
    assert cleaning.clean(Document(once), RULES) == once


def test_a_sample_of_the_rejected_is_small_and_the_same_in_any_order() -> None:
    found = [Rejected("too_short", f"{n}.txt", None, n, "") for n in range(100)]
    found += [Rejected("empty", "诗.jsonl", n, 0, "") for n in range(3)]
    sample = cleaning.sampled(found)
    assert cleaning.sampled(reversed(found)) == sample
    halves = cleaning.sampled([*cleaning.sampled(found[:60]), *cleaning.sampled(found[50:])])
    assert halves == sample
    assert [one.reason for one in sample] == ["empty"] * 3 + ["too_short"] * cleaning.SAMPLES
    assert [int(one.file[:-4]) for one in sample[3:]] != list(range(cleaning.SAMPLES))


RULE = """
from pipelines.data.cleaning import Drop

def no_poems(text):
    if "诗" in text:
        return Drop("poem")
    return text.upper() if text.startswith("shout") else None

def fails(text):
    return int(text)

def confused(text):
    return 7

NUMBER = 7
"""


@pytest.fixture
def rules_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory."""
    (tmp_path / "my_rules_of_mine.py").write_text(RULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rules_of_mine", raising=False)
    return "my_rules_of_mine"


def test_a_rule_of_the_users_own(rules_module: str) -> None:
    rule = cleaning.custom(f"{rules_module}:no_poems")
    assert rule(Document("静夜思：一首诗")) == Drop("poem")
    assert rule(Document("shout 你好")) == "SHOUT 你好"
    assert rule(Document("as it is")) == "as it is"


def test_a_failing_rule_is_named_with_the_place_and_without_the_text(rules_module: str) -> None:
    rule = cleaning.custom(f"{rules_module}:fails")
    with pytest.raises(SourceError) as caught:
        rule(Document("13800138000 秘密", "a/诗.jsonl", 12))
    said = str(caught.value)
    assert f"custom {rules_module}:fails failed on a/诗.jsonl:12: ValueError at my_rules" in said
    assert "秘密" not in said and "\n" not in said
    with pytest.raises(SourceError, match="returned int for b.txt: return text, None"):
        cleaning.custom(f"{rules_module}:confused")(Document("x", "b.txt"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module_here:f", "cannot be imported"),
        ("my_rules_of_mine:no_poem", "has no function no_poem"),
        ("my_rules_of_mine:NUMBER", "is a int, no function"),
    ],
)
def test_a_rule_that_is_not_there(rules_module: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cleaning.custom(name)
