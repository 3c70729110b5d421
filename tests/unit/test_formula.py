"""Expressions over config keys."""

import contextlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from tune import formula

KNOWN = {"model.layers": 4, "train.schedule": "linear", "train.augment.mask": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4 * model.layers + 1", 17),
        ("model.layers // 3 - -2", 3),
        ("max(model.layers, 8) % 5", 3),
        ("round(train.augment.mask * 3)", 2),
        ("train.schedule == linear", True),
        ("train.schedule in [cosine, 'linear']", True),
        ("model.layers > 2 and not train.schedule == cosine", True),
        ("1 < model.layers < 4 or false", False),
        ("train.schedule == '定日镜'", False),
    ],
)
def test_values(text: str, value: object) -> None:
    assert formula.parse(text).value(KNOWN) == value


def test_keys_in_order_of_appearance() -> None:
    found = formula.parse("model.layers * 2 + train.augment.mask - model.layers")
    assert found.keys == ("model.layers", "train.augment.mask")
    assert pickle.loads(pickle.dumps(found)).value(KNOWN) == found.value(KNOWN)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "model.layers.__class__()",
        "(lambda: 1)()",
        "[x for x in [1]]",
        "model.layers if 1 else 2",
        "2 ** 99",
        "f'{1}'",
        "a := 1",
        "",
        "1 +",
        "min(1, key=2)",
        "(" * 240 + "1" + ")" * 240 + " ** 2",
        "1" * 600,
    ],
)
def test_nothing_else_has_a_meaning(text: str) -> None:
    with pytest.raises(ConfigError, match="tune.space"):
        formula.parse(text)


@pytest.mark.parametrize("text", ["1 / (model.layers - 4)", "model.layers + linear"])
def test_what_cannot_be_computed_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be computed"):
        formula.parse(text).value(KNOWN)


@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        formula.parse(text)
