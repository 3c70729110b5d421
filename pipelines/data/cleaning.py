"""Steps that text passes on its way into a corpus.

A step is a small function: it returns the text, rewritten or not, or a `Drop` that says why the
document has no place. Steps run in the order of the recipe; counting and sampling is the caller's
work, and no sample holds a word of a document: it says where to look.

    cleaning           the form of characters, lengths;  the table of all steps
    cleaning_html      pages to text, mojibake, boilerplate
    cleaning_code      source code;  cleaning_table  rows of tables
    quality            published heuristics;  language  what a text is written in
"""

import hashlib
import importlib
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config import TextData
from cluster.config.cleaning import Custom, Length, Step
from cluster.errors import ConfigError, SourceError
from pipelines.data.words import words

SAMPLES = 20
"""Documents per reason that are named in a corpus's list of rejected ones."""

# All of C0, DEL and C1 but tab and line feed; they print nothing and mean nothing in a text file.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NEWLINE = re.compile("\r\n?|\x85")


@dataclass(frozen=True)
class Document:
    """What a step is given."""

    text: str
    path: str = ""
    row: int | None = None
    """Line or row of its file; None for the whole file."""
    extension: str = ""
    """Of the file, such as `.py`."""
    cells: Mapping[str, Any] | None = None
    """The other columns of its row, where it is a row of a table."""

    @property
    def place(self) -> str:
        return self.path if self.row is None else f"{self.path}:{self.row}"


@dataclass(frozen=True)
class Drop:
    reason: str
    """The step, or the step and its setting: `gopher_quality.min_words`."""
    measured: str = field(default="", compare=False)
    """What was found instead."""


@dataclass(frozen=True)
class Rejected:
    """A document that was dropped. Holds no content."""

    reason: str
    file: str
    row: int | None
    characters: int
    """Of the text as it was read."""
    measured: str


Rule = Callable[[Document], str | Drop]


def rules(data: TextData) -> tuple[Rule, ...]:
    """The steps of a recipe, in order.

    Raises:
        ConfigError: if a rule of the user's own cannot be imported.
    """
    ends = not_empty, at_least(data.min_characters), at_most(data.max_characters)
    return (*map(_rule, data.cleaning), *map(_on_text, ends))


def clean(document: Document, rules: Sequence[Rule]) -> str | Drop:
    """What remains of a text after all rules, or the first reason to drop it.

    Raises:
        SourceError: if a rule of the user's own fails.
    """
    for rule in rules:
        result = rule(document)
        if isinstance(result, Drop):
            return result
        if result is not document.text:
            document = Document(
                result, document.path, document.row, document.extension, document.cells
            )
    return document.text


def rejected(document: Document, drop: Drop) -> Rejected:
    return Rejected(drop.reason, document.path, document.row, len(document.text), drop.measured)


def sampled(found: Iterable[Rejected]) -> tuple[Rejected, ...]:
    """Up to `SAMPLES` of each reason: a choice that does not depend on who was there first."""
    by_reason: dict[str, list[Rejected]] = {}
    for one in set(found):
        by_reason.setdefault(one.reason, []).append(one)
    return tuple(
        one for reason in sorted(by_reason) for one in sorted(by_reason[reason], key=_lot)[:SAMPLES]
    )


def _lot(one: Rejected) -> bytes:
    place = f"{one.file}\0{one.row}".encode("utf-8", "backslashreplace")
    return hashlib.blake2b(place, digest_size=8).digest()


# ------------------------------------------------------------------ the table of steps


def _rule(step: Step) -> Rule:
    if step.name in _PLAIN:
        return _on_text(_PLAIN[step.name])
    if isinstance(step.settings, Length):
        return _length(step.settings)
    if isinstance(step.settings, Custom):
        return custom(step.settings.rule)
    module, name = _ELSEWHERE[step.name]
    # What a recipe does not use is not imported: language tables take a second.
    rule: Rule = getattr(importlib.import_module(module), name)(step.settings)
    return rule


def _on_text(rule: Callable[[str], str | Drop]) -> Rule:
    return lambda document: rule(document.text)


def unify_newlines(text: str) -> str | Drop:
    return _NEWLINE.sub("\n", text)


def remove_controls(text: str) -> str | Drop:
    return _CONTROL.sub("", text)


def compose(text: str) -> str | Drop:
    """Unicode NFC: one spelling for what looks the same. NFKC would lose full-width forms."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def not_empty(text: str) -> str | Drop:
    return text if text and not text.isspace() else Drop("empty")


def at_least(characters: int) -> Callable[[str], str | Drop]:
    def rule(text: str) -> str | Drop:
        if len(text) >= characters:
            return text
        return Drop("too_short", f"{len(text)} characters")

    return rule


def at_most(characters: int) -> Callable[[str], str | Drop]:
    def rule(text: str) -> str | Drop:
        if len(text) <= characters:
            return text
        return Drop("too_long", f"{len(text)} characters")

    return rule


def _length(settings: Length) -> Rule:
    def rule(document: Document) -> str | Drop:
        length = len(document.text)
        if length < settings.min:
            return Drop("length.min", f"{length} characters")
        if length > settings.max:
            return Drop("length.max", f"{length} characters")
        if settings.min_words and (count := words(document.text).count) < settings.min_words:
            return Drop("length.min_words", f"{count:g} words")
        return document.text

    return rule


_PLAIN = {
    "unify_newlines": unify_newlines,
    "remove_controls": remove_controls,
    "compose": compose,
}
_ELSEWHERE = {
    "html_to_text": ("pipelines.data.cleaning_html", "html_to_text"),
    "repair_mojibake": ("pipelines.data.cleaning_html", "repair_mojibake"),
    "boilerplate_lines": ("pipelines.data.cleaning_html", "boilerplate_lines"),
    "language": ("pipelines.data.language", "language"),
    "symbol_ratio": ("pipelines.data.quality", "symbol_ratio"),
    "repetition": ("pipelines.data.quality", "repetition"),
    "gopher_quality": ("pipelines.data.quality", "gopher_quality"),
    "gopher_repetition": ("pipelines.data.quality", "gopher_repetition"),
    "c4_quality": ("pipelines.data.quality", "c4_quality"),
    "fineweb_quality": ("pipelines.data.quality", "fineweb_quality"),
    "code": ("pipelines.data.cleaning_code", "code"),
    "columns": ("pipelines.data.cleaning_table", "columns"),
}
"""Step -> where the function is that makes a rule of its settings."""


# ------------------------------------------------------------------ the user's own rule


def custom(name: str) -> Rule:
    """A rule by import path, `package.module:function`.

    It is given a document's text and returns text, or None to keep it as it is, or a `Drop`.
    Workers import it by the same path: it lies in the working directory, or is installed there.

    Raises:
        ConfigError: if there is no such function.
    """
    function = _imported(name)

    def rule(document: Document) -> str | Drop:
        try:
            result = function(document.text)
        # Not ours: any kind of error is possible, and says nothing of where it happened. Its
        # message may quote the document, so it is not repeated.
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise SourceError(
                f"data.cleaning: custom {name} failed on {document.place}: "
                f"{type(error).__name__} at {os.path.basename(place.filename)}:{place.lineno}"
            ) from None
        if result is None:
            return document.text
        if isinstance(result, str | Drop):
            return result
        raise SourceError(
            f"data.cleaning: custom {name} returned {type(result).__name__} for {document.place}: "
            "return text, None to keep it, or Drop(reason)"
        )

    return rule


def _imported(name: str) -> Callable[[str], Any]:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigError(f"data.cleaning: custom {name} cannot be imported: {error}") from None
    except AttributeError:
        raise ConfigError(f"data.cleaning: {module} has no function {function}") from None
    if not callable(found):
        raise ConfigError(f"data.cleaning: custom {name} is a {type(found).__name__}, no function")
    result: Callable[[str], Any] = found
    return result
