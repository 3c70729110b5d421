"""Rules that text passes on its way into a corpus.

A rule is a small pure function: it returns the text, rewritten or not, or a `Drop` that says why
the document has no place. Rules run in the order of `rules`; counting is the caller's work.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.config import TextData

# All of C0, DEL and C1 but tab and line feed; they print nothing and mean nothing in a text file.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NEWLINE = re.compile("\r\n?|\x85")


@dataclass(frozen=True)
class Drop:
    reason: str


Rule = Callable[[str], str | Drop]


def rules(data: TextData) -> tuple[Rule, ...]:
    """The rules of a recipe, in order."""
    return (
        unify_newlines,
        remove_controls,
        compose,
        not_empty,
        at_least(data.min_characters),
        at_most(data.max_characters),
    )


def clean(text: str, rules: Sequence[Rule]) -> str | Drop:
    """What remains of a text after all rules, or the first reason to drop it."""
    for rule in rules:
        result = rule(text)
        if isinstance(result, Drop):
            return result
        text = result
    return text


def unify_newlines(text: str) -> str | Drop:
    return _NEWLINE.sub("\n", text)


def remove_controls(text: str) -> str | Drop:
    return _CONTROL.sub("", text)


def compose(text: str) -> str | Drop:
    """Unicode NFC: one spelling for what looks the same. NFKC would lose full-width forms."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def not_empty(text: str) -> str | Drop:
    return text if text and not text.isspace() else Drop("empty")


def at_least(characters: int) -> Rule:
    def rule(text: str) -> str | Drop:
        return text if len(text) >= characters else Drop("too_short")

    return rule


def at_most(characters: int) -> Rule:
    def rule(text: str) -> str | Drop:
        return text if len(text) <= characters else Drop("too_long")

    return rule
