"""Random changes to a training row of tokens. Pure: all chance comes from the generator given."""

from dataclasses import dataclass

import numpy as np

from cluster.config.augment import AugmentSection
from cluster.errors import ConfigError
from pipelines.families.base import Facts


@dataclass(frozen=True)
class TokenRow:
    """A row as the model sees it."""

    shown: np.ndarray
    """int64 [sequence_length + 1]: what the model reads."""
    true: np.ndarray
    """The same row as it is to be predicted."""
    used: int
    """Tokens that are not padding."""
    starts: np.ndarray
    """Positions at which documents begin."""


def augment(
    row: TokenRow, settings: AugmentSection, facts: Facts, rng: np.random.Generator
) -> TokenRow:
    """
    Raises:
        ConfigError: if the tokenizer has no token that a setting needs.
    """
    row = _swapped(_shortened(row, settings.delete, facts, rng), settings.swap, facts, rng)
    shown = row.shown.copy()
    for share, pool in (
        (settings.mask, _mask(facts) if settings.mask else None),
        (settings.replace, _others(facts) if settings.replace else None),
        (settings.noise, _bytes(facts) if settings.noise else None),
    ):
        if pool is not None:
            hit = _drawn(row, share, facts, rng)
            shown[hit] = rng.choice(pool, size=len(hit))
    return TokenRow(shown, row.true, row.used, row.starts)


def _drawn(row: TokenRow, share: float, facts: Facts, rng: np.random.Generator) -> np.ndarray:
    """Positions of about a share of the tokens that may change."""
    inside = row.true[: row.used] != facts["end_of_text"]
    return np.flatnonzero(inside & (rng.random(row.used) < share))


def _shortened(row: TokenRow, share: float, facts: Facts, rng: np.random.Generator) -> TokenRow:
    gone = _drawn(row, share, facts, rng) if share else np.empty(0, dtype=np.int64)
    gone = gone[: max(0, row.used - 2)]  # something must remain to be predicted
    if not len(gone):
        return row
    kept = np.delete(row.true[: row.used], gone)
    tokens = np.full_like(row.true, facts["end_of_text"])
    tokens[: len(kept)] = kept
    starts = row.starts - np.searchsorted(gone, row.starts)
    return TokenRow(tokens, tokens, len(kept), np.unique(starts[starts < len(kept)]))


def _swapped(row: TokenRow, share: float, facts: Facts, rng: np.random.Generator) -> TokenRow:
    if not share:
        return row
    first = _drawn(row, share, facts, rng)
    first = first[first + 1 < row.used]
    first = first[row.true[first + 1] != facts["end_of_text"]]
    # A token moves once: of neighbours that were both drawn, the even one of each run stays.
    apart = np.ones(len(first), dtype=bool)
    for number in range(1, len(first)):
        apart[number] = not (apart[number - 1] and first[number] == first[number - 1] + 1)
    first = first[apart]
    tokens = row.true.copy()
    tokens[first], tokens[first + 1] = row.true[first + 1], row.true[first]
    return TokenRow(tokens, tokens, row.used, row.starts)


def _mask(facts: Facts) -> np.ndarray:
    if "mask" not in facts:
        raise ConfigError("train.augment.mask needs a tokenizer with a mask token, and it has none")
    return np.array([facts["mask"]])


def _others(facts: Facts) -> np.ndarray:
    tokens = np.arange(facts["vocab_size"])
    return tokens[(tokens != facts["end_of_text"]) & (tokens != facts.get("mask", -1))]


def _bytes(facts: Facts) -> np.ndarray:
    if not facts.get("bytes"):
        raise ConfigError("train.augment.noise needs a tokenizer with a token for each byte")
    return np.array(facts["bytes"])
