"""A text as the finders see it: one spelling of digits, spaces and dashes; nothing invisible.

Offsets of the view lead back to the text. What is slow in Python, looking at every character, is
done here once in NumPy; finders get the few places where looking closer can pay.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.data.privacy import probes

SURROGATE = re.compile(r"\[([A-Z][A-Z_]{1,30}?)(?:_(\d{1,9}))?\]")
"""What a surrogate looks like, of any type and style."""
WALL = "\0"
"""Stands for surrogates in a view: no rule reaches over it."""

Window = tuple[int, int]
_DELETE = np.uint32(0xFFFFFFFF)
_BMP = 0x10000
_MATH_DIGITS = 0x1D7CE, 0x1D7FF
_DIGITS, _SPREAD = 6, 22
"""Finders of numbers look where this many digits stand in this many characters; the sparsest
identifier that they know, a NINO with doubled separators, is denser."""
_LEFT, _RIGHT = 24, 28
"""Characters around such a place: letters of an IBAN, a sign, brackets."""
_BEFORE, _AFTER = 90, 130
"""Characters around a literal in which the longest address or date of birth has room."""
_KEY_LENGTH = 16
"""Shorter ones are not told from other values."""
_QUOTES = 4
"""Spaces, quotes and arrows between a sign and a value."""
_IS_KEY = np.array([chr(code).isalnum() or chr(code) in "+/_.~-" for code in range(128)])
_IS_QUOTE = np.array([chr(code) in " \t\n\"'`>=" for code in range(128)])


@dataclass(frozen=True)
class View:
    text: str
    codes: np.ndarray
    """Code points of the text."""
    offsets: np.ndarray | None
    """Of each character, where it stands in the original; None where nothing moved."""

    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What finders share about the view."""

    def original(self, start: int, end: int) -> Window:
        if self.offsets is None:
            return start, end
        return int(self.offsets[start]), int(self.offsets[end - 1]) + 1

    @functools.cached_property
    def numbers(self) -> list[Window]:
        """Windows in which digits stand close together."""
        return _dense(np.flatnonzero(self.codes - ord("0") <= 9), _DIGITS, _SPREAD)

    @functools.cached_property
    def colons(self) -> list[Window]:
        """Windows in which two colons stand close together, as in IPv6 and MAC addresses."""
        return _dense(np.flatnonzero(self.codes == ord(":")), 2, 6)

    @functools.cached_property
    def quads(self) -> list[Window]:
        """Windows in which three dots stand close together, as in IPv4 addresses."""
        return _dense(np.flatnonzero(self.codes == ord(".")), 3, 14)

    @functools.cached_property
    def hyphens(self) -> list[Window]:
        """Windows in which five hyphens stand close together, as in MAC addresses."""
        return _dense(np.flatnonzero(self.codes == ord("-")), 5, 14)

    @functools.cached_property
    def assigned(self) -> list[int]:
        """Where something like a key begins after a colon or an equals sign."""
        codes = np.append(self.codes, np.zeros(_KEY_LENGTH + _QUOTES, self.codes.dtype))
        places = np.flatnonzero((codes == ord(":")) | (codes == ord("="))) + 1
        for _ in range(_QUOTES):
            places = places + _kinds(codes[places], _IS_QUOTE)
        # The far end first: most values are short.
        for ahead in reversed(range(_KEY_LENGTH)):
            if not len(places):
                return []
            places = places[_kinds(codes[places + ahead], _IS_KEY)]
        return np.unique(places).tolist()

    @functools.cached_property
    def probes(self) -> dict[str, np.ndarray]:
        """Where finders' literals may begin, by the name of the group; see `probes`."""
        if self.codes.dtype == np.uint8:
            return probes.places(self.codes)
        raw = np.frombuffer(self.text.encode("utf-8", "surrogatepass"), np.uint8)
        found = probes.places(raw)
        if not found:
            return found
        characters = np.cumsum((raw & 0xC0) != 0x80) - 1
        return {name: characters[places] for name, places in found.items()}

    def around(self, probe: str) -> list[Window]:
        """Windows around the places of a group of literals."""
        places = self.probes.get(probe)
        return [] if places is None else _merged(places - _BEFORE, places + _AFTER)


def look(text: str) -> View:
    """The view of a text."""
    masked = SURROGATE.sub(lambda match: WALL * len(match[0]), text) if "[" in text else text
    if masked.isascii():
        return View(masked, np.frombuffer(masked.encode("ascii"), np.uint8), None)
    codes = np.frombuffer(masked.encode("utf-32-le", "surrogatepass"), np.uint32)
    plain = _plain()[np.minimum(codes, _BMP - 1)]
    plain = np.where(codes < _BMP, plain, _beyond(codes))
    if np.array_equal(plain, codes):
        return View(masked, codes, None)
    kept = plain != _DELETE
    offsets = None if kept.all() else np.flatnonzero(kept)
    plain = plain if offsets is None else plain[kept]
    return View(plain.tobytes().decode("utf-32-le", "surrogatepass"), plain, offsets)


def _kinds(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[np.minimum(codes, len(table) - 1)]


def _beyond(codes: np.ndarray) -> np.ndarray:
    """Characters past the basic plane: only the mathematical digits have a plain spelling."""
    first, last = _MATH_DIGITS
    digit = (codes - np.uint32(first)) % np.uint32(10) + np.uint32(ord("0"))
    return np.where((codes >= first) & (codes <= last), digit, codes)


@functools.cache
def _plain() -> np.ndarray:
    """The plain spelling of every character of the basic plane."""
    table = np.arange(_BMP, dtype=np.uint32)
    for code in range(0x80, _BMP):
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Nd":
            table[code] = ord("0") + unicodedata.decimal(character)
        elif category == "Zs":
            table[code] = ord(" ")
        elif category == "Pd":
            table[code] = ord("-")
        elif category == "Cf":
            table[code] = _DELETE
        elif 0xFF01 <= code <= 0xFF5E:
            table[code] = code - 0xFF01 + ord("!")
    table[[0x85, 0x2028, 0x2029]] = ord("\n")
    table[0x2212] = ord("-")
    table[0x2019] = ord("'")
    return table


def _dense(places: np.ndarray, count: int, spread: int) -> list[Window]:
    """Windows around every `count` neighbours of `places` that lie within `spread` characters."""
    if len(places) < count:
        return []
    first, last = places[: len(places) - count + 1], places[count - 1 :]
    near = last - first < spread
    return _merged(first[near] - _LEFT, last[near] + _RIGHT) if near.any() else []


def _merged(starts: np.ndarray, ends: np.ndarray) -> list[Window]:
    """Windows that touch become one; both arrays rise."""
    breaks = np.flatnonzero(starts[1:] > ends[:-1])
    begins = starts[np.concatenate(([0], breaks + 1))]
    finishes = ends[np.concatenate((breaks, [len(ends) - 1]))]
    return [(max(0, s), e) for s, e in zip(begins.tolist(), finishes.tolist(), strict=True)]
