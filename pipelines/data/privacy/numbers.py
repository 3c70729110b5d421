"""Numbers that are written in groups: where they may end, and how they are grouped."""

import re
from collections.abc import Iterator

from pipelines.data.privacy.view import View, Window

SEPARATOR = r"[ \t.\-]{0,3}(?:\n[ \t]{0,4})?"
"""Between two digits of one number, wherever its writer or a line break put it."""
START = r"(?<![A-Za-z0-9_])(?<!\d[.,\-])"
"""No number begins inside of a word, a longer number or its fraction."""
END = r"(?![A-Za-z0-9_])(?![.,]\d)"

_CLUSTER = re.compile(r"\d(?:[ \t.\-/()]{0,3}(?:\n[ \t(]{0,4})?\d)*", re.ASCII)
_LEAD, _TAIL = 18, 12
"""Characters: what stands in front of the digits of a French number of Corsica, with separators,
and the letters after those of a Mexican one."""
_DIGIT = re.compile(r"\d", re.ASCII)
_GROUP = re.compile(r"\w+", re.ASCII)


def digits(count: int | str, first: str = r"\d") -> str:
    """A pattern of digits with separators anywhere between them; `count` as in a quantifier."""
    rest = count - 1 if isinstance(count, int) else count
    return rf"{first}(?:{SEPARATOR}\d){{{rest}}}"


def only_digits(text: str) -> str:
    return "".join(_DIGIT.findall(text))


def windows(view: View, least: int) -> list[Window]:
    """Where at least so many digits stand together, with room for letters around them."""
    key = f"windows {least}"
    if key not in view.memory:
        view.memory[key] = _windows(view, least)
    return view.memory[key]


def _windows(view: View, least: int) -> list[Window]:
    found: list[Window] = []
    for start, end, count in clusters(view):
        if count < least:
            continue
        start, end = max(0, start - _LEAD), end + _TAIL
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def clusters(view: View) -> list[tuple[int, int, int]]:
    """Digits with nothing but separators between: first, one past the last, how many."""
    if "clusters" not in view.memory:
        matches = (m for pair in view.numbers for m in _CLUSTER.finditer(view.text, *pair))
        view.memory["clusters"] = [(*m.span(), len(_DIGIT.findall(m[0]))) for m in matches]
    return view.memory["clusters"]


def candidates(
    pattern: re.Pattern[str], text: str, windows: list[Window]
) -> Iterator[re.Match[str]]:
    """Every match in the windows, also those that begin inside of an earlier one."""
    for start, end in windows:
        while match := pattern.search(text, start, end):
            yield match
            start = match.start() + 1


def shortened(text: str) -> Iterator[str]:
    """A number, then without its last group, and so on."""
    ends = [match.end() for match in _GROUP.finditer(text)]
    return (text[:end] for end in reversed(ends))


def groupings(text: str) -> set[tuple[int, ...]]:
    """Sizes of the groups; a line break is read as a separator, and as nothing at all."""
    broken = re.sub(r"-?\n[ \t]*", "", text)
    return {tuple(len(group) for group in _GROUP.findall(t)) for t in (text, broken)}


def one_by_one(sizes: tuple[int, ...]) -> bool:
    """Whether the digits stand apart, each for itself."""
    return set(sizes) == {1}
