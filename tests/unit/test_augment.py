"""Augmentation of rows of tokens: what may change, and what must not."""

import numpy as np
import pytest

from cluster.config.augment import AugmentSection
from cluster.errors import ConfigError
from pipelines.data.augment import TokenRow, augment
from pipelines.families import causal_lm
from pipelines.families.base import IGNORED
from tests import fakes

END, MASKED, BYTES = 0, 99, list(range(1, 11))
FACTS = {"vocab_size": 100, "end_of_text": END, "mask": MASKED, "bytes": BYTES}
USED = 3000


def row() -> TokenRow:
    """Three documents of tokens that all differ from their neighbours, and padding."""
    tokens = np.full(USED + 41, END, dtype=np.int64)
    tokens[:USED] = np.arange(USED) % 80 + 11
    starts = np.array([0, 1000, 2000])
    tokens[starts] = END
    tokens[USED - 1] = END
    return TokenRow(tokens, tokens, USED, starts)


def changed(**settings: float) -> TokenRow:
    return augment(row(), AugmentSection(**settings), FACTS, np.random.default_rng(3))


@pytest.mark.parametrize(
    ("setting", "pool"),
    [("mask", {MASKED}), ("replace", set(range(1, 99))), ("noise", set(BYTES))],
)
def test_what_the_model_reads_changes_and_what_it_predicts_stays(
    setting: str, pool: set[int]
) -> None:
    plain, found = row(), changed(**{setting: 0.3})
    assert (found.true == plain.true).all()
    hit = found.shown != plain.shown
    assert 0.27 * USED < hit.sum() < 0.33 * USED
    assert set(found.shown[hit].tolist()) <= pool
    assert (found.shown[plain.true == END] == END).all()


def test_deleted_tokens_leave_the_text_and_the_borders_move_along() -> None:
    plain, found = row(), changed(delete=0.2)
    kept = plain.used - found.used
    assert 0.17 * USED < kept < 0.23 * USED
    assert (found.true[found.used :] == END).all() and found.shown is not plain.shown
    assert (found.true[found.starts] == END).all() and len(found.starts) == 3
    assert (found.shown == found.true).all()
    everything = augment(row(), AugmentSection(delete=0.9), FACTS, np.random.default_rng(0))
    assert everything.used >= 2


def test_swapped_tokens_change_places_with_their_neighbours() -> None:
    plain, found = row(), changed(swap=0.2)
    assert sorted(found.true.tolist()) == sorted(plain.true.tolist())
    moved = np.flatnonzero(found.true != plain.true)
    pairs = moved.reshape(-1, 2)
    assert (pairs[:, 1] == pairs[:, 0] + 1).all() and 0.2 * USED < len(moved) < 0.4 * USED
    assert (found.true[pairs[:, 0]] == plain.true[pairs[:, 1]]).all()
    assert ((found.true == END) == (plain.true == END)).all()


def test_evaluation_sees_the_row_as_it_is_and_the_draw_follows_the_generator() -> None:
    config = fakes.config("gpt-demo", "train.augment.replace=0.5", "train.augment.delete=0.2")
    plain = row()
    stored = {"tokens": plain.true, "used": USED, "segment_starts": plain.starts}

    def example(seed: int | None) -> list[list[int]]:
        rng = None if seed is None else np.random.default_rng([1, 0, seed])
        found = causal_lm.FAMILY.example(config, FACTS, stored, rng)
        return [found["input_ids"].tolist(), found["labels"].tolist()]

    quiet = example(None)
    assert quiet[0] == plain.true[:-1].tolist()
    assert quiet[1][: USED - 1] == plain.true[1:USED].tolist()
    assert set(quiet[1][USED - 1 :]) == {IGNORED}
    assert example(5) == example(5) != example(6) != quiet


def test_a_token_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer.special_tokens='\[\"<|mask|>\"\]'"):
        fakes.config("gpt-demo", "train.augment.mask=0.1")
    with pytest.raises(ConfigError, match="is for text"):
        fakes.config("digits-cnn", "train.augment.swap=0.1")
    bare = {"vocab_size": 100, "end_of_text": END}
    for setting in ("mask", "noise"):
        settings = AugmentSection(**{setting: 0.5})
        with pytest.raises(ConfigError, match=f"train.augment.{setting} needs"):
            augment(row(), settings, bare, np.random.default_rng(0))
