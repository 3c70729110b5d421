"""Words and runs of words as numbers, for many texts at once.

A text is never cut into Python strings: numpy finds the words of a block of characters, hashes each
once by differences of a running polynomial, and rolls n of them into one number. A word is a run of
letters, marks and digits in lower case; a character of a script without spaces is one by itself.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.data.words import UNSPACED

BLOCK = 1 << 17
"""Characters that are worked on at once: their arrays stay in the cache of a core."""
_PLANES = 0x30000
"""Characters above are private or rare; all of them count as the last one below."""
# Odd numbers without a pattern: the golden ratio's, and two from MurmurHash3's and xxHash's papers.
_BASE = 0x9E3779B97F4A7C15
_ROLL = 0xC2B2AE3D27D4EB4F
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class Tokens:
    """Words of some texts, one after the other."""

    hashes: np.ndarray
    """uint64, one per word."""
    starts: np.ndarray
    """int64: first character of each word, counted through all texts with one between them."""
    ends: np.ndarray
    """int64: one past the last character."""
    offsets: np.ndarray
    """int64, one more than texts: the words of text i are `offsets[i]` to `offsets[i + 1]`."""
    origins: np.ndarray
    """int64: first character of each text."""


def blocks(texts: Sequence[str]) -> Iterator[tuple[int, Tokens]]:
    """Texts of about `BLOCK` characters, with the number of the first of them."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= BLOCK:
            yield first, tokens(texts[first : number + 1])
            first, size = number + 1, 0
    if first < len(texts):
        yield first, tokens(texts[first:])


def tokens(texts: Sequence[str]) -> Tokens:
    joined = "\n".join([*texts, ""])
    if joined.isascii():
        codes = np.frombuffer(joined.encode(), np.uint8)
    else:
        wide = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        codes = np.minimum(wide, _PLANES - 1)
    kinds, folded = _tables()
    kind = kinds[codes]
    word = kind == _WORD
    begins, stops = kind != 0, kind != 0
    begins[1:] &= ~(word[1:] & word[:-1])
    stops[:-1] &= ~(word[:-1] & word[1:])
    starts, ends = np.flatnonzero(begins), np.flatnonzero(stops) + 1
    powers, inverses = _powers(_round_up(len(codes)))
    running = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(folded[codes] * powers[: len(codes)], out=running[1:])
    hashes = mix((running[ends] - running[starts]) * inverses[starts])
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    origins = np.cumsum(lengths + 1) - lengths - 1
    offsets = np.append(np.searchsorted(starts, origins), len(starts))
    return Tokens(hashes, starts, ends, offsets, origins)


def ngrams(found: Tokens, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of n words, and where each text's begin among them.

    A text of fewer words has one run, of all of them; a text of none has none.

    Returns:
        uint64 hashes; int64 offsets, one more than texts.
    """
    words = np.diff(found.offsets)
    rolled = roll(found.hashes, n)
    if not len(words) or words.min() >= n:
        counts = words - n + 1
    else:
        counts = np.where(words >= n, words - n + 1, np.minimum(words, 1))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    # Place among the runs, minus place among the words, is the same for all runs of a text.
    places = np.arange(offsets[-1]) + np.repeat(found.offsets[:-1] - offsets[:-1], counts)
    short = np.flatnonzero((words > 0) & (words < n))
    if not len(short):
        return rolled[places], offsets
    hashes = rolled[np.minimum(places, max(len(rolled) - 1, 0))] if len(rolled) else None
    hashes = np.zeros(offsets[-1], np.uint64) if hashes is None else hashes
    for text in short:
        own = found.hashes[found.offsets[text] : found.offsets[text + 1]]
        hashes[offsets[text]] = roll(own, len(own))[0]
    return hashes, offsets


def roll(hashes: np.ndarray, n: int) -> np.ndarray:
    """One number for each run of n; empty if there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    rolled = hashes[:count].copy()
    for step in range(1, n):
        rolled *= np.uint64(_ROLL)
        rolled += hashes[step : step + count]
    return mix(rolled)


def mix(numbers: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit given: the finalizer of SplitMix64 (Steele,
    Lea and Flood 2014). In place."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    return numbers


_WORD, _ALONE = 1, 2


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of each character: none, `_WORD` or `_ALONE`; and its lower case, from 1."""
    alone = re.compile(f"[{UNSPACED}]")
    kinds = np.zeros(_PLANES, np.uint8)
    folded = np.arange(1, _PLANES + 1, dtype=np.uint64)
    for code in range(_PLANES):
        character = chr(code)
        if unicodedata.category(character)[0] in "LNM" or character == "_":
            kinds[code] = _ALONE if alone.match(character) else _WORD
            lower = character.lower()
            folded[code] = ord(lower) + 1 if len(lower) == 1 else code + 1
    return kinds, folded


@functools.lru_cache(maxsize=4)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base, and of its inverse modulo 2**64."""
    inverse = pow(_BASE, -1, 1 << 64)
    tables = []
    for factor in (_BASE, inverse):
        table = np.full(size, factor, np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]


def _round_up(size: int) -> int:
    """To a power of two, so that few tables are made."""
    return max(2 * BLOCK, 1 << (size - 1).bit_length())
