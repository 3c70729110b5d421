"""What stands where something personal stood: `[EMAIL_1]`, plain text of ASCII.

The form is words, digits, underscore and brackets, which every tokenizer has and none of ours
reserves: a surrogate is split to tokens like any text and never becomes a control token.
"""

from collections import defaultdict
from collections.abc import Iterable

from cluster.config.privacy import Style
from pipelines.data.privacy.spans import canonical
from pipelines.data.privacy.view import SURROGATE


class Names:
    """Surrogates of one document: the same value of a type always has the same one."""

    def __init__(self, style: Style, text: str) -> None:
        self._style = style
        self._given: dict[tuple[str, str], str] = {}
        # A document may have been through this before: its numbers are taken.
        self._highest: defaultdict[str, int] = defaultdict(int)
        if style == "numbered" and "[" in text:
            self._take(SURROGATE.findall(text))

    def of(self, kind: str, value: str) -> str:
        """The surrogate for a value, as it is read in the view."""
        if self._style == "plain":
            return f"[{kind.upper()}]"
        key = kind, canonical(value)
        if key not in self._given:
            self._highest[kind] += 1
            self._given[key] = f"[{kind.upper()}_{self._highest[kind]}]"
        return self._given[key]

    def _take(self, found: Iterable[tuple[str, str]]) -> None:
        for kind, number in found:
            name = kind.lower()
            self._highest[name] = max(self._highest[name], int(number or 0))
