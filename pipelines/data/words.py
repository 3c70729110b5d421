"""Words, and what stands for them in scripts that put no spaces between them.

Published thresholds are of English words. Chinese words have about two characters (1.5 to 2 in
running text), so two characters of such a script count as one word; and a full-width character
takes the room of two, so it counts twice in the length of a line.
"""

import re
from dataclasses import dataclass

# Han, kana; Thai, Lao, Tibetan, Burmese, Khmer.
UNSPACED = (
    "\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9d\U00020000-\U0003ffff\u0e01-\u0eff\u0f40-\u0fbc\u1000-\u109f\u1780-\u17d3"
)
# Punctuation that stands between them without a space.
_MARKS = (
    "\u2018-\u201f\u2026\u3000-\u3003\u3008-\u3020\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
)
_WORD = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}{_MARKS}]+")
_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True)
class Words:
    """The words of a text; of scripts without spaces, the characters."""

    all: list[str]
    unspaced: int
    """How many of them are single characters of such a script."""

    @property
    def count(self) -> float:
        return len(self.all) - self.unspaced / 2

    @property
    def mostly_unspaced(self) -> bool:
        return self.unspaced > len(self.all) / 2

    def span(self, words: int) -> int:
        """Elements of `all` that are about as long as so many words."""
        return 2 * words if self.mostly_unspaced else words


def words(text: str) -> Words:
    if text.isascii():
        return Words(text.split(), 0)
    return Words(_WORD.findall(text), len(_UNSPACED.findall(text)))


def width(line: str) -> int:
    """Length of a line in characters of half width."""
    return len(line) if line.isascii() else len(line) + len(_UNSPACED.findall(line))
