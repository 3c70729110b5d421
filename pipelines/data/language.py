"""What a text is written in: py3langid, whose tables of some 100 languages come with it.

It was taken for its size: 4.5 MB of tables on numpy alone, against 96 MB for lingua. One text at a
time it reads about 2 MB/s, so only the beginning of a document is judged; many texts are walked
through its automaton side by side, four times as fast. Source of the method: Lui and Baldwin 2012,
"langid.py: An Off-the-shelf Language Identification Tool".
"""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

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
"""Bytes; shorter text is `und`, undetermined."""
UNDETERMINED, CODE = "und", "code"
"""Text that no language is told of (ISO 639-2), and files of source code, which are not asked."""
LOOKED_AT = 500
"""Characters from the start of a text that `languages` judges."""
MIN_CONFIDENCE = 0.5
"""What is less sure than this is `und` for `languages`: a table or a list of names is in none."""
_BESIDE = 1024
"""Texts that are walked side by side; 1.5 MB of letters at most."""


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
        return UNDETERMINED, 0.0
    ranked = _identifier().rank(letters)
    best, confidence = ranked[0]
    if best in CHINESE:
        return "zh", sum(share for code, share in ranked if code in CHINESE)
    return best, confidence


def languages(texts: Sequence[str]) -> list[str]:
    """The language of each text, by its beginning; `und` where that is not sure.

    What is said of a text does not depend on the others.
    """
    found: list[str] = []
    for start in range(0, len(texts), _BESIDE):
        found += _languages([text[:LOOKED_AT] for text in texts[start : start + _BESIDE]])
    return found


def _languages(texts: Sequence[str]) -> list[str]:
    identifier = _identifier()
    spelled = [identifier._encode(_NO_LANGUAGE.sub(" ", text)) for text in texts]
    scores = _scores(spelled)
    # As py3langid does it: the root of the length keeps confidence alike in short and long texts.
    lengths = np.array([len(letters) for letters in spelled])
    scores /= np.sqrt(np.maximum(lengths, 1))[:, None]
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    codes, column_of = _codes()
    merged = np.zeros((len(texts), len(codes)))
    np.add.at(merged.T, column_of, shares.T)
    sure = (merged.max(axis=1) >= MIN_CONFIDENCE) & (lengths >= MIN_LETTERS)
    best = merged.argmax(axis=1)
    return [
        codes[number] if known else UNDETERMINED
        for number, known in zip(best.tolist(), sure.tolist(), strict=True)
    ]


def _scores(spelled: Sequence[bytes]) -> np.ndarray:
    """float64[texts, columns of the table]: naive Bayes, before it is made a probability."""
    from scipy.sparse import csr_array

    identifier = _identifier()
    texts, features = _walked(spelled)
    met = np.bincount(features, minlength=len(identifier.nb_ptc)) > 0
    used, column = np.flatnonzero(met), np.cumsum(met) - 1
    pairs, counts = np.unique(texts * len(used) + column[features], return_counts=True)
    at = np.divmod(pairs, max(len(used), 1))
    shape = (len(spelled), len(used))
    seen = csr_array((np.log1p(counts), at), shape=shape)
    table = identifier.nb_ptc[used].astype(np.float64)
    return np.asarray(seen @ table) + identifier.nb_pc


def _walked(spelled: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Which text met which feature, an entry each time: all texts take a step of the automaton at
    once, the longest in front, so that those that go on are always the first ones."""
    moves, rows, features = _automaton()
    lengths = np.array([len(letters) for letters in spelled], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    letters = np.zeros((int(lengths.max(initial=0)), len(spelled)), dtype=np.uint8)
    for place, number in enumerate(order.tolist()):
        letters[: lengths[number], place] = np.frombuffer(spelled[number], dtype=np.uint8)
    going = np.searchsorted(-lengths[order], -np.arange(1, len(letters) + 1), side="right")
    met = np.full(letters.shape, -1, dtype=np.int32)
    state = np.zeros(len(spelled), dtype=np.int64)
    for step, (line, count) in enumerate(zip(letters, going.tolist(), strict=True)):
        state = moves[rows[state[:count]] + line[:count]]
        met[step, :count] = features[state]
    steps, places = np.nonzero(met >= 0)
    return order[places], met[steps, places].astype(np.int64)


@functools.cache
def _automaton() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Next state by row and byte, where the row of a state begins, and the feature that a state
    stands for or -1."""
    identifier = _identifier()
    moves = np.frombuffer(identifier.tk_nextmove, dtype=f"u{identifier.tk_nextmove.itemsize}")
    rows = np.array(identifier.tk_row, dtype=np.int64) << 8
    return moves, rows, np.array(identifier.tk_output, dtype=np.int32)


@functools.cache
def _codes() -> tuple[list[str], np.ndarray]:
    """Languages, and to which of them each column of the table counts."""
    columns = ["zh" if code in CHINESE else code for code in _identifier().nb_classes]
    codes = list(dict.fromkeys(columns))
    return codes, np.array([codes.index(code) for code in columns])


@functools.cache
def _identifier() -> "LanguageIdentifier":
    """Opens its tables in half a second, once per process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
