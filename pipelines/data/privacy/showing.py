"""The beginning of a text as it came, for a person to see: with types where values were."""

import html
import re
import unicodedata
from urllib.parse import unquote

from pipelines.data.privacy.scrub import Scrubbed, Scrubber
from pipelines.data.privacy.spans import Span

_BEHIND = 600
"""Characters that are looked at behind the last one that is shown, so that no value is cut."""
_CUT = re.compile(r"[!-~]+\Z")
"""What may be the beginning of a longer key or address."""
_TAG = re.compile(r"<[^<>]*>")
_LEAST = 4
"""Letters and digits of a value that are looked for; `CC` would be found anywhere."""


def beginning(
    raw: str, cleaned: str, scrubbed: Scrubbed, scrubber: Scrubber, size: int
) -> str | None:
    """About `size` characters of a text as it came, personal values replaced by their types.

    Cleaning may bring values to light that no rule sees in the raw text, such as an address that a
    page spells in entities. Where one would be shown, the answer is None.

    Args:
        cleaned, scrubbed: the text after cleaning, and what was found in it.
        size: characters.
    """
    looked_at = raw[: size + _BEHIND]
    shown = _typed(looked_at, scrubber.scrub(looked_at).spans, size)
    spelled = unquote(html.unescape(shown))
    readable = _TAG.sub("", spelled)
    if any(text != shown and scrubber.scrub(text).spans for text in {spelled, readable}):
        return None
    letters = _letters(readable)
    values = {_letters(cleaned[span.start : span.end]) for span in scrubbed.spans}
    return None if any(len(v) >= _LEAST and v in letters for v in values) else shown


def _typed(text: str, spans: tuple[Span, ...], size: int) -> str:
    pieces, cursor = [], 0
    for span in spans:
        if span.start >= size:
            break
        pieces += [text[cursor : span.start], f"[{span.type.upper()}]"]
        cursor = span.end
    last = text[cursor:size]
    return "".join([*pieces, _CUT.sub("", last) if len(text) > size else last])


def _letters(text: str) -> str:
    """Letters and digits alone, in one spelling."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, plain))
