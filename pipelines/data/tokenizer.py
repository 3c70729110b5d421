"""Byte-level BPE: any text to token ids and back, without an unknown token.

Id 0 is `<|endoftext|>`; the next 256 are the bytes. A document that spells `<|endoftext|>` out is
text like any other: it never becomes the control token, here or in the published tokenizer.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.data import packing

if TYPE_CHECKING:
    from cluster.config import RunConfig

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once; what `tokenizers` holds for it is about 30 times as large."""


@dataclass(frozen=True)
class TextEncoder:
    """Documents of text to packed rows of tokens. Plain data; see `families.base.Encoder`."""

    serialized: str
    """`tokenizer.json`."""
    sequence_length: int
    bytes_per_token: float
    """Measured on a sample of the training documents."""

    @property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.serialized)

    def facts(self) -> dict[str, Any]:
        return {
            "vocab_size": self.tokenizer.get_vocab_size(),
            "end_of_text": END_OF_TEXT_ID,
            "sequence_length": self.sequence_length,
            "bytes_per_token": self.bytes_per_token,
        }

    def encode(self, documents: pa.Table) -> pa.Table:
        texts = documents.column("text").to_pylist()
        tokens = list(encode_texts(self.tokenizer, texts))
        ids = documents.column("document").to_numpy()
        return packing.to_table(packing.pack(tokens, ids, self.sequence_length, END_OF_TEXT_ID))

    def save(self, folder: Path) -> None:
        """Write what `AutoTokenizer.from_pretrained` opens."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": self.sequence_length,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer.json").write_text(self.serialized, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def fit(config: "RunConfig", sample: pa.Table) -> TextEncoder:
    """Train a tokenizer on cleaned documents; the same documents give the same tokenizer.

    A small sample may hold fewer merges than `data.vocab_size` asks for; `facts` tells the truth.
    """
    data = config.data
    assert data.kind == "text"
    texts = sample.column("text").to_pylist()
    tokenizer = train(texts, data.vocab_size)
    serialized = tokenizer.to_str(pretty=False)
    density = _bytes_per_token(open_tokenizer(serialized), next(_batches(texts)))
    return TextEncoder(serialized, data.sequence_length, density)


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


@functools.lru_cache(maxsize=4)
def open_tokenizer(serialized: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.encode_special_tokens = True  # means: as the plain text that they are in a document
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Token ids of each text, in the smallest type that holds them."""
    dtype = packing.token_type(tokenizer.get_vocab_size())
    for batch in _batches(texts):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=dtype)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    room = BATCH_CHARACTERS
    for text in texts:
        batch.append(text)
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], BATCH_CHARACTERS
    if batch:
        yield batch


def _bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    tokens = sum(len(ids) for ids in encode_texts(tokenizer, texts))
    return sum(len(text.encode()) for text in texts) / tokens
