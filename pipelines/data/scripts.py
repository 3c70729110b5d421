"""In which script a text is written, and how many words it has: strata and denominators."""

import re
from collections import Counter

import numpy as np

LOOKED_AT = 2048
"""Characters from the start of a text that decide."""
LATIN, HAN, JAPANESE, OTHER = "Latin", "Han", "Japanese", "other"
KANA_SHARE = 0.05
"""Japanese has at least this share of kana among its letters; Chinese has none."""

# First and last code point of the blocks of letters (Unicode Character Database, Blocks.txt).
_BLOCKS = (
    (0x41, 0x5A, LATIN),
    (0x61, 0x7A, LATIN),
    (0xC0, 0x24F, LATIN),
    (0x370, 0x3FF, "Greek"),
    (0x400, 0x52F, "Cyrillic"),
    (0x530, 0x58F, "Armenian"),
    (0x590, 0x5FF, "Hebrew"),
    (0x600, 0x77F, "Arabic"),
    (0x900, 0x97F, "Devanagari"),
    (0x980, 0x9FF, "Bengali"),
    (0xB80, 0xBFF, "Tamil"),
    (0xE00, 0xE7F, "Thai"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Hangul"),
    (0x1E00, 0x1EFF, LATIN),
    (0x3040, 0x30FF, "kana"),
    (0x3400, 0x4DBF, HAN),
    (0x4E00, 0x9FFF, HAN),
    (0xAC00, 0xD7AF, "Hangul"),
    (0xF900, 0xFAFF, HAN),
    (0x20000, 0x323AF, HAN),
)
_STARTS = np.array([first for first, _, _ in _BLOCKS])
_ENDS = np.array([last for _, last, _ in _BLOCKS])
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def script(text: str) -> str:
    """The script of most letters at the start of a text, such as `Latin`, `Han` or `Japanese`."""
    if text.isascii():
        return LATIN
    codes = np.frombuffer(text[:LOOKED_AT].encode("utf-32-le"), dtype="<u4")
    block = np.maximum(np.searchsorted(_STARTS, codes, side="right") - 1, 0)
    inside = block[(codes >= _STARTS[block]) & (codes <= _ENDS[block])]
    letters: Counter[str] = Counter()
    for number, count in enumerate(np.bincount(inside, minlength=len(_BLOCKS)).tolist()):
        letters[_BLOCKS[number][2]] += count
    kana = letters.pop("kana")
    if kana > KANA_SHARE * (kana + letters[HAN]):
        letters[JAPANESE] = kana + letters.pop(HAN)
    name, count = max(letters.items(), key=lambda item: item[1])
    return name if count else OTHER


def words(text: str) -> int:
    """Words of scripts that put spaces between them, characters of those that do not."""
    return len(_WORD.findall(text))
