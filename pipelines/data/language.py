"""What a text is written in: py3langid, whose tables of some 100 languages come with it.

It was taken for its size: 4.5 MB of tables on numpy alone, against 96 MB for lingua. It reads about
1.5 MB/s, so only the beginning of a document is judged. Source of the method: Lui and Baldwin
2012, "langid.py: An Off-the-shelf Language Identification Tool".
"""

import functools
import re
from typing import TYPE_CHECKING

from cluster.config.cleaning import Language
from cluster.errors import ConfigError
from pipelines.data.cleaning import Document, Drop, Rule
from pipelines.data.sources import CODE_EXTENSIONS

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

CHINESE = {"zh", "yue", "wuu", "nan", "hak"}
"""ISO 639-3 counts them to the macrolanguage zho; a few characters do not tell them apart."""
# Digits, marks and addresses have no language, and pull every answer towards none.
_NO_LANGUAGE = re.compile(r"https?://\S+|[\d\W_]+")
MIN_LETTERS = 12
"""Shorter text is `und`, undetermined."""


def language(settings: Language) -> Rule:
    """
    Raises:
        ConfigError: if there is no such language.
    """
    known = set(_identifier().labels)
    for code in settings.keep:
        if code not in known:
            raise ConfigError(
                f"data.cleaning: language.keep: no language {code!r}; "
                f"there are {', '.join(sorted(known))}"
            )

    def rule(document: Document) -> str | Drop:
        if document.extension in CODE_EXTENSIONS and not settings.code:
            return document.text
        found, confidence = identify(document.text[: settings.max_characters])
        if found not in settings.keep:
            return Drop("language.keep", f"{found} ({confidence:.2f})")
        if confidence < settings.min_confidence:
            return Drop("language.min_confidence", f"{found} ({confidence:.2f})")
        return document.text

    return rule


def identify(text: str) -> tuple[str, float]:
    """ISO 639-1 code of a text, and how sure it is, from 0 to 1; `und` where there are no words."""
    letters = _NO_LANGUAGE.sub(" ", text)
    if len(letters.encode()) < MIN_LETTERS:
        return "und", 0.0
    ranked = _identifier().rank(letters)
    best, confidence = ranked[0]
    if best in CHINESE:
        return "zh", sum(share for code, share in ranked if code in CHINESE)
    return best, confidence


@functools.cache
def _identifier() -> "LanguageIdentifier":
    """Opens its tables in about a second, once per process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
