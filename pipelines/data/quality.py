"""Published heuristics of what prose is, as rules with their thresholds as settings.

    Gopher    Rae et al. 2021, "Scaling Language Models", appendix A.1.1 and table A1
    C4        Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2
    FineWeb   Penedo et al. 2024, "The FineWeb Datasets", section 3.4

They were made for English. What they mean for scripts without spaces is said in `words`: two
characters are a word, n words are 2n characters, a character is two wide; sentences also end with
`。`; stop words are asked of the languages that are listed here and of no other script.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

from cluster.config.cleaning import (
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Repetition,
    SymbolRatio,
)
from pipelines.data.cleaning import Document, Drop, Rule
from pipelines.data.words import Words, width, words

# Gopher's eight for English; the most frequent function words of others, by their usual lists.
STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die und in den von zu das mit sich",
    "fr": "le la les de des et à un une que",
    "es": "el la los de que y en un por con",
    "it": "il la di che e un per con non del",
    "pt": "o a os de que e em um para com",
    "nl": "de het een en van in is dat te op",
    "zh": "的 了 是 在 不 和 有 我 这 這 一 人 为 為 他 与 之",
    "ja": "の に は を た が で て と し",
    "ko": "그 이 수 있는 것 및 등 한 할 있다",
    "ru": "и в не на что с по как это к",
}
_STOP = {language: frozenset(listed.split()) for language, listed in STOP_WORDS.items()}
# Scripts of those languages; of another one no stop words are asked.
_JUDGED = re.compile(r"[A-Za-zÀ-ɏ\u3041-\u30ff\u4e00-\u9fff\uac00-\ud7a3\u0400-\u04ff]")
END_MARKS = tuple(".!?\"'。！？…”’」』】）)：:;；")
SENTENCE_END = (".", "!", "?", '"', "'", "。", "！", "？", "”", "’", "」", "』")
_SENTENCES = re.compile(r"[.!?]+(?=[\s\"'”’)]|$)|[。！？]+")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_LETTER = re.compile(r"[^\W\d_]")
_SYMBOL = re.compile(r"[^\w\s]|_")
BULLETS = ("•", "-", "*", "·", "●", "▪", "‣", "–", "・")
ELLIPSES = ("...", "…")
POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
    "|使用条款|服务条款|隐私政策|隐私权政策|使用條款|隱私權政策"
)


def symbol_ratio(settings: SymbolRatio) -> Rule:
    """Symbols among all characters but space. Prose of English or Chinese has 3 to 15 %."""

    def rule(document: Document) -> str | Drop:
        text = document.text
        visible = len(text) - sum(map(str.isspace, text))
        share = len(_SYMBOL.findall(text)) / max(visible, 1)
        return text if share <= settings.max else Drop("symbol_ratio.max", f"{share:.2f}")

    return rule


def repetition(settings: Repetition) -> Rule:
    """What deflate leaves of a text: prose and code keep 20 to 50 %, in any language."""

    def rule(document: Document) -> str | Drop:
        raw = document.text.encode()
        if len(raw) < settings.min_bytes:
            return document.text
        ratio = len(zlib.compress(raw, 1)) / len(raw)
        if ratio < settings.min_ratio:
            return Drop("repetition.min_ratio", f"{ratio:.3f}")
        return document.text

    return rule


# ------------------------------------------------------------------ Gopher


def gopher_quality(settings: GopherQuality) -> Rule:
    """Rae et al. 2021, appendix A.1.1, "quality filtering"."""

    def rule(document: Document) -> str | Drop:
        found = words(document.text)
        fault = _words_fault(found, settings) or _lines_fault(document.text, found, settings)
        return _drop("gopher_quality", fault) or document.text

    return rule


Fault = tuple[str, float]
"""The setting that was not met, and what was measured."""


def _drop(step: str, fault: Fault | None) -> Drop | None:
    return fault and Drop(f"{step}.{fault[0]}", f"{fault[1]:.4g}")


def _words_fault(found: Words, settings: GopherQuality) -> Fault | None:
    lettered = [word for word in found.all if _LETTER.search(word)]
    spoken = [word for word in found.all if word[0].isalnum() or _LETTER.search(word)]
    count = len(spoken) - found.unspaced / 2
    if count < settings.min_words:
        return "min_words", count
    if count > settings.max_words:
        return "max_words", count
    if not found.mostly_unspaced and spoken:
        mean = sum(map(len, spoken)) / len(spoken)
        if mean < settings.min_mean_word:
            return "min_mean_word", mean
        if mean > settings.max_mean_word:
            return "max_mean_word", mean
    share = len(lettered) / max(len(found.all), 1)
    if share < settings.min_alphabetic_words:
        return "min_alphabetic_words", share
    stop = _stop_words(found)
    return ("min_stop_words", stop) if stop < settings.min_stop_words else None


def _stop_words(found: Words) -> float:
    """Different stop words of the language that has most; without end where no list applies."""
    distinct = {word.lower().strip(".,;:!?\"'()") for word in found.all}
    if not any(_JUDGED.match(word) for word in distinct):
        return float("inf")
    return max(len(listed & distinct) for listed in _STOP.values())


def _lines_fault(text: str, found: Words, settings: GopherQuality) -> Fault | None:
    count = max(found.count, 1)
    ellipses = text.count("...") + text.count("…")
    for symbols in (text.count("#"), ellipses):
        if symbols / count > settings.max_symbols_per_word:
            return "max_symbols_per_word", symbols / count
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
    if bullets > settings.max_bullet_lines:
        return "max_bullet_lines", bullets
    cut = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    return ("max_ellipsis_lines", cut) if cut > settings.max_ellipsis_lines else None


def gopher_repetition(settings: GopherRepetition) -> Rule:
    """Rae et al. 2021, table A1, "repetition removal"."""

    def rule(document: Document) -> str | Drop:
        text = document.text.strip()
        fault = _pieces_fault(text, settings) or _ngrams_fault(words(text), settings)
        return _drop("gopher_repetition", fault) or document.text

    return rule


def _pieces_fault(text: str, settings: GopherRepetition) -> Fault | None:
    for pattern, name in ((_PARAGRAPHS, "paragraph"), (_LINES, "line")):
        pieces = pattern.split(text)
        again, characters = repeated(pieces)
        share = again / len(pieces)
        if share > getattr(settings, f"max_duplicate_{name}s"):
            return f"max_duplicate_{name}s", share
        share = characters / max(len(text), 1)
        if share > getattr(settings, f"max_duplicate_{name}_characters"):
            return f"max_duplicate_{name}_characters", share
    return None


def _ngrams_fault(found: Words, settings: GopherRepetition) -> Fault | None:
    total = max(sum(map(len, found.all)), 1)
    for n, limit in zip((2, 3, 4), settings.max_top_ngram, strict=True):
        share = _most_frequent(found.all, found.span(n)) / total
        if share > limit:
            return "max_top_ngram", share
    for n, limit in zip(range(5, 11), settings.max_duplicate_ngrams, strict=True):
        share = _said_before(found.all, found.span(n)) / total
        if share > limit:
            return "max_duplicate_ngrams", share
    return None


def repeated(pieces: Iterable[str]) -> tuple[int, int]:
    """Pieces that were there before, and their characters."""
    seen: set[str] = set()
    again = characters = 0
    for piece in pieces:
        if piece in seen:
            again += 1
            characters += len(piece)
        seen.add(piece)
    return again, characters


def _ngrams(elements: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(elements[i:] for i in range(n)), strict=False)


def _most_frequent(elements: Sequence[str], n: int) -> int:
    """Characters of the most frequent n-gram, all occurrences together; 0 if none comes twice."""
    top = Counter(_ngrams(elements, n)).most_common(1)
    if not top or top[0][1] < 2:
        return 0
    return sum(map(len, top[0][0])) * top[0][1]


def _said_before(elements: Sequence[str], n: int) -> int:
    """Characters inside of n-grams that were there before; none counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters = start = 0
    ngrams = list(_ngrams(elements, n))
    while start < len(ngrams):
        if ngrams[start] in seen:
            characters += sum(map(len, ngrams[start]))
            start += n
        else:
            seen.add(ngrams[start])
            start += 1
    return characters


# ------------------------------------------------------------------ C4


def c4_quality(settings: C4Quality) -> Rule:
    """Raffel et al. 2020, section 2.2: keeps lines that are sentences. Without its word list."""

    def rule(document: Document) -> str | Drop:
        text = document.text
        if "lorem ipsum" in text.lower():
            return Drop("c4_quality.lorem_ipsum")
        if settings.curly_brackets and "{" in text:
            return Drop("c4_quality.curly_brackets")
        kept = [line for line in map(str.strip, text.split("\n")) if _is_prose(line, settings)]
        sentences = sum(max(1, len(_SENTENCES.findall(line))) for line in kept)
        if sentences < settings.min_sentences:
            return Drop("c4_quality.min_sentences", f"{sentences} sentences")
        return "\n".join(kept)

    return rule


def _is_prose(line: str, settings: C4Quality) -> bool:
    if not line or (settings.end_mark and not line.endswith(SENTENCE_END)):
        return False
    if settings.end_mark and line.endswith("..."):
        return False
    found = words(line)
    if found.count < settings.min_words_per_line:
        return False
    if not found.mostly_unspaced and max(map(len, found.all)) > settings.max_word:
        return False
    lower = line.lower()
    return "javascript" not in lower and not POLICY.search(lower)


# ------------------------------------------------------------------ FineWeb


def fineweb_quality(settings: FineWebQuality) -> Rule:
    """Penedo et al. 2024, section 3.4: lines that end, are long enough, and are not said twice."""

    def rule(document: Document) -> str | Drop:
        text = document.text
        lines = [line for line in text.split("\n") if line.strip()]
        fault = _fineweb_fault(text, lines, settings) if lines else ("min_end_marks", 0.0)
        return _drop("fineweb_quality", fault) or text

    return rule


def _fineweb_fault(text: str, lines: list[str], settings: FineWebQuality) -> Fault | None:
    ended = sum(line.rstrip().endswith(END_MARKS) for line in lines) / len(lines)
    if ended < settings.min_end_marks:
        return "min_end_marks", ended
    short = sum(width(line) <= settings.short_line for line in lines) / len(lines)
    if short > settings.max_short_lines:
        return "max_short_lines", short
    again = repeated(lines)[1] / max(len(text) - text.count("\n"), 1)
    if again > settings.max_duplicate_characters:
        return "max_duplicate_characters", again
    breaks = text.count("\n") / max(words(text).count, 1)
    return ("max_newlines_per_word", breaks) if breaks > settings.max_newlines_per_word else None
