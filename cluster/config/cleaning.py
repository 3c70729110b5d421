"""`data.cleaning`: the steps that text passes on its way into a corpus, in order.

A step of the recipe is a name, or a name with settings: `- compose`, `- length: {min: 200}`. What a
step does is told in `pipelines/data/cleaning.py`; here are its settings, with their defaults.
Thresholds from the literature name their source where the rule is. Of a script without spaces
between words, two characters count as a word, and one as two characters of a line.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError

from cluster.config.base import Fraction, Section
from cluster.errors import ConfigError

KEY = "data.cleaning"
Count = Annotated[int, Field(ge=0, le=10**12)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Names = tuple[Name, ...]


class NoSettings(Section):
    """Of a step that has nothing to set."""


class HtmlToText(Section):
    everywhere: bool = False
    """Parse every document, not only files named .html and text that begins like a page."""


class BoilerplateLines(Section):
    max_characters: Count = 160
    """Longer lines are prose that speaks of such things; they stay."""
    phrases: Names = ()
    """More that a line of boilerplate holds, in lower case, beside those that are known."""


class Language(Section):
    keep: Annotated[Names, Field(min_length=1)]
    """ISO 639-1 codes, such as `en` and `zh`; `zh` includes Cantonese and the other Chinese."""
    min_confidence: Fraction = 0.2
    """Documents whose language is less sure are dropped; short ones seldom are sure."""
    max_characters: Annotated[int, Field(ge=50, le=10**7)] = 2000
    """Taken from the beginning, which is enough to tell."""
    code: bool = False
    """Judge source code too, which has no language of its own; else it stays."""


class Length(Section):
    min: Count = 0
    """Fewest characters."""
    max: Count = 10**12
    """Most characters."""
    min_words: Count = 0
    """Fewest words."""


class SymbolRatio(Section):
    max: Fraction = 0.4
    """Largest share of symbols and punctuation among the characters that are not space."""


class Repetition(Section):
    min_ratio: Fraction = 0.06
    """Smallest size after deflate, as a share of the size before: below, it says little often."""
    min_bytes: Count = 1000
    """Shorter documents are not judged."""


class GopherQuality(Section):
    min_words: Count = 50
    """Fewest words."""
    max_words: Count = 100_000
    """Most words."""
    min_mean_word: Annotated[float, Field(ge=0)] = 3.0
    """Shortest mean length of a word; not asked of text without spaces."""
    max_mean_word: Annotated[float, Field(ge=0)] = 10.0
    """Longest mean length of a word; not asked of text without spaces."""
    max_symbols_per_word: Annotated[float, Field(ge=0)] = 0.1
    """Most `#`, and most ellipses, per word."""
    max_bullet_lines: Fraction = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_lines: Fraction = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: Fraction = 0.8
    """Smallest share of words that hold a letter."""
    min_stop_words: Count = 2
    """Fewest different words of those that any prose holds; by script, 0 not to ask."""


class GopherRepetition(Section):
    max_duplicate_lines: Fraction = 0.3
    """Largest share of lines that were there before."""
    max_duplicate_paragraphs: Fraction = 0.3
    """Largest share of paragraphs that were there before."""
    max_duplicate_line_characters: Fraction = 0.2
    """Largest share of characters in lines that were there before."""
    max_duplicate_paragraph_characters: Fraction = 0.2
    """Largest share of characters in paragraphs that were there before."""
    max_top_ngram: tuple[Fraction, Fraction, Fraction] = (0.2, 0.18, 0.16)
    """Largest share of characters in the most frequent run of 2, 3 and 4 words."""
    max_duplicate_ngrams: tuple[Fraction, Fraction, Fraction, Fraction, Fraction, Fraction] = (
        *(0.15, 0.14, 0.13),
        *(0.12, 0.11, 0.10),
    )
    """Largest share of characters in runs of 5 to 10 words that were there before."""


class C4Quality(Section):
    min_words_per_line: Count = 3
    """Lines of fewer words go."""
    min_sentences: Count = 5
    """Documents of fewer sentences go."""
    max_word: Annotated[int, Field(ge=1)] = 1000
    """A line with a longer word goes; not asked of text without spaces."""
    end_mark: bool = True
    """Lines that do not end like a sentence go."""
    curly_brackets: bool = True
    """Documents with a curly bracket go."""


class FineWebQuality(Section):
    min_end_marks: Fraction = 0.12
    """Smallest share of lines that end like a sentence."""
    short_line: Count = 30
    """Characters of a short line."""
    max_short_lines: Fraction = 0.67
    """Largest share of short lines."""
    max_duplicate_characters: Fraction = 0.01
    """Largest share of characters in lines that were there before."""
    max_newlines_per_word: Annotated[float, Field(ge=0)] = 0.3
    """Most line breaks per word."""


class Code(Section):
    everywhere: bool = False
    """Judge every document, not only files named like source code."""
    generated: bool = False
    """Keep files that say that a program wrote them."""
    max_line: Annotated[int, Field(ge=1)] = 1000
    """Longest line: a longer one is minified code or data."""
    max_mean_line: Annotated[float, Field(gt=0)] = 100.0
    """Longest mean line."""
    min_alphanumeric: Fraction = 0.25
    """Smallest share of letters and digits among all characters."""
    max_data: Fraction = 0.5
    """Largest share of characters in runs of base64, hexadecimal or escaped bytes."""
    min_data_run: Annotated[int, Field(ge=16)] = 256
    """Characters from which such a run is data."""


class Columns(Section):
    """Rules for the other cells of a table's row; a document that is no row passes."""

    required: Names = ()
    """Columns that must be there and hold something."""
    missing: Names = ("", "na", "n/a", "nan", "null", "none", "-", "?", "无", "空")
    """What stands for nothing, in lower case."""
    types: dict[Name, Literal["integer", "number", "boolean", "date"]] = {}
    """Columns of `integer`, `number`, `boolean` or `date` (ISO 8601) cells; missing ones pass."""
    bounds: dict[Name, tuple[float, float]] = {}
    """Columns of numbers, with the smallest and largest that are no outliers."""
    outliers: dict[Name, Annotated[float, Field(gt=0, le=1000)]] = {}
    """Columns of numbers whose bounds follow from all rows: so many times the distance between the
    quartiles beyond them (Tukey 1977: 1.5 is outside, 3 is far out)."""


class Custom(Section):
    rule: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:function`; it is given the text, and returns text, None or `Drop`."""


STEPS: dict[str, type[Section]] = {
    "unify_newlines": NoSettings,
    "remove_controls": NoSettings,
    "compose": NoSettings,
    "html_to_text": HtmlToText,
    "repair_mojibake": NoSettings,
    "boilerplate_lines": BoilerplateLines,
    "language": Language,
    "length": Length,
    "symbol_ratio": SymbolRatio,
    "repetition": Repetition,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "c4_quality": C4Quality,
    "fineweb_quality": FineWebQuality,
    "code": Code,
    "columns": Columns,
    "custom": Custom,
}
SHORT = {"custom": "rule", "language": "keep"}
"""Steps that may be given the one setting that they need instead of a mapping."""


@dataclass(frozen=True)
class Step:
    """One step with all of its settings."""

    name: str
    settings: Section

    def __hash__(self) -> int:
        return hash((self.name, self.settings.model_dump_json()))


def parse(given: Any) -> Step:
    """
    Raises:
        ConfigError: naming the step or the setting, and the nearest one that there is.
    """
    if isinstance(given, Step):
        return given
    if isinstance(given, str):
        name, settings = given, None
    elif isinstance(given, dict) and len(given) == 1:
        name, settings = next(iter(given.items()))
    else:
        raise ConfigError(
            f"{KEY}: a step is a name or a name with settings, such as `length: {{min: 200}}`, "
            f"not {str(given)[:80]}"
        )
    if name not in STEPS:
        raise ConfigError(f"{KEY}: no step {name!r}{nearest(name, STEPS)}")
    if name in SHORT and isinstance(settings, str | list):
        settings = {SHORT[name]: settings}
    try:
        checked = STEPS[name].model_validate_json(json.dumps(settings or {}))
    except ValidationError as error:
        problems = (_explain(name, problem) for problem in error.errors())
        raise ConfigError("; ".join(problems)) from None
    return Step(name, checked)


def dump(step: Step) -> Any:
    """As a recipe says it."""
    settings = step.settings.model_dump(mode="json")
    return {step.name: settings} if settings else step.name


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else f"; there are {', '.join(known)}"


def _explain(step: str, problem: Any) -> str:
    setting = ".".join(str(part) for part in problem["loc"])
    key = f"{KEY}: {step}.{setting}" if setting else f"{KEY}: {step}"
    if problem["type"] == "extra_forbidden":
        known = STEPS[step].model_fields
        return f"{key} is no setting" + (nearest(setting, known) if known else "; it has none")
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r:.80}"


Steps = Annotated[
    tuple[Annotated[Step, PlainValidator(parse), PlainSerializer(dump)], ...], Field(max_length=64)
]
DEFAULT_STEPS = tuple(map(parse, ("unify_newlines", "remove_controls", "compose")))
