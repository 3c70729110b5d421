"""Training a tokenizer: BPE, WordPiece or Unigram over bytes.

All three see text as the 256 characters that stand for bytes (`pre_tokenizers.ByteLevel`), and each
has every one of them in its vocabulary: no text is unknown, and each comes back as it was. Id 0 is
end-of-text; further control tokens stand at the end.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.config.tokenizer import TokenizerSection

END_OF_TEXT = "<|endoftext|>"
UNIGRAM_ROUNDS = 3
WORD_BYTES = 96
"""Longer words are cut before wordpieces are looked for, which takes time by the square."""


def train(texts: Sequence[str], vocab_size: int, section: TokenizerSection) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries; the same texts give the same one."""
    room = vocab_size - len(section.special_tokens)
    tokenizer = _TRAINED[section.model](texts, room)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in section.special_tokens]
    )
    return tokenizer


def alphabet() -> list[str]:
    """The characters that stand for bytes, sorted."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    return _learnt(models.BPE(), trainers.BpeTrainer, texts, vocab_size)


def _unigram(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """`tokenizers` finds the pieces; how likely each one is, is counted anew here, because its own
    sums come out differently each time."""
    learner = _learnt(models.Unigram(), trainers.UnigramTrainer, texts, vocab_size)
    pieces = sorted(set(learner.get_vocab()) - {END_OF_TEXT})
    scores = dict.fromkeys(pieces, -1.0)
    for _ in range(UNIGRAM_ROUNDS):
        scores = _likelihoods(_of_pieces(scores), texts)
    return _of_pieces(scores)


def _of_pieces(scores: Mapping[str, float]) -> Tokenizer:
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer = _over_bytes(models.Unigram([(END_OF_TEXT, 0.0), *ranked], 0, False))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _likelihoods(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Logarithm of the share of each piece in the likeliest way to cut the texts; what is never
    used counts half, so that every byte stays possible."""
    counts: Counter[str] = Counter()
    for first in range(0, len(texts), 64):
        batch = tokenizer.encode_batch_fast(texts[first : first + 64], add_special_tokens=False)
        for encoding in batch:
            counts.update(encoding.tokens)
    pieces = set(tokenizer.get_vocab()) - {END_OF_TEXT}
    total = counts.total() + len(pieces) / 2
    return {piece: math.log((counts[piece] or 0.5) / total) for piece in pieces}


def _wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """BERT's `##` is left out: a piece that begins a word has the space before it already, and
    `##` could be text. `tokenizers` learns wordpieces as it learns BPE, but numbers `##` pieces at
    random."""
    vocabulary = _bpe(texts, vocab_size).get_vocab(with_added_tokens=False)
    model = models.WordPiece(
        vocab=vocabulary,
        unk_token=END_OF_TEXT,
        max_input_chars_per_word=WORD_BYTES,
        continuing_subword_prefix="",
    )
    tokenizer = _over_bytes(model)
    short = pre_tokenizers.Split(Regex(f".{{1,{WORD_BYTES}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, short])
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


_TRAINED = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}


def _learnt(
    model: models.Model, trainer: Callable[..., Any], texts: Sequence[str], vocab_size: int
) -> Tokenizer:
    """What `tokenizers` makes of the texts with a trainer of its own."""
    tokenizer = _over_bytes(model)
    settings = trainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, settings, length=len(texts))
    return tokenizer


def _over_bytes(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
