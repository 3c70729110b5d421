"""Text to token ids and back, and documents to packed rows of them.

A tokenizer is trained on a sample (`vocabulary`) or taken from a folder. A document that spells out
`<|endoftext|>`, or any other control token, is text like any other: it never becomes the control
token, here or in the published tokenizer.
"""

import functools
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from cluster.config.augment import MASK
from cluster.errors import SourceError
from pipelines.data import existing_tokenizer, packing, scripts, vocabulary
from pipelines.data.vocabulary import END_OF_TEXT

if TYPE_CHECKING:
    from cluster.config import RunConfig

END_OF_TEXT_ID = 0
"""Of a tokenizer that was trained here."""
BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once; what `tokenizers` holds for it is about 30 times as large."""
MEASURED_CHARACTERS = 1 << 18
"""Text of each script and language that a tokenizer is measured on."""
ANY_TEXT = "naïve  Ａ床前明月光\r\n\t한국어 العربية 🌞\u200d\u0007end "
"""Comes back as it was from a tokenizer that loses nothing."""


@dataclass(frozen=True)
class TextEncoder:
    """Documents of text to packed rows of tokens. Plain data; see `families.base.Encoder`."""

    serialized: str
    """`tokenizer.json`."""
    sequence_length: int
    bytes_per_token: float
    """Measured on a sample of the training documents."""
    by_script: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Script to `bytes_per_token` and `tokens_per_word`, on the same sample."""
    by_language: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same by language, where it is known."""
    named: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    )
    """Control tokens by what `transformers` calls them; `eos_token` ends a document."""
    layout: str = "split"
    """`data.packing`."""

    @property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.serialized)

    @property
    def end_of_text(self) -> int:
        number = self.tokenizer.token_to_id(self.named["eos_token"])
        assert number is not None
        return number

    def facts(self) -> dict[str, Any]:
        ids = {name: self.tokenizer.token_to_id(token) for name, token in self.named.items()}
        facts = {
            "vocab_size": vocab_size(self.tokenizer),
            "end_of_text": self.end_of_text,
            "sequence_length": self.sequence_length,
            "bytes_per_token": self.bytes_per_token,
            "by_script": {name: dict(found) for name, found in self.by_script.items()},
            "by_language": {name: dict(found) for name, found in self.by_language.items()},
            "lossless": lossless(self.tokenizer),
        }
        spelled = [self.tokenizer.token_to_id(byte) for byte in vocabulary.alphabet()]
        if "ByteLevel" in self.serialized and None not in spelled:
            facts["bytes"] = spelled
        return facts | ({"mask": ids["mask_token"]} if "mask_token" in ids else {})

    def encode(self, documents: pa.Table) -> pa.Table:
        texts = documents.column("text").to_pylist()
        tokens = list(encode_texts(self.tokenizer, texts))
        ids = documents.column("document").to_numpy()
        pack = packing.pack if self.layout == "split" else packing.pack_best_fit
        packed = pack(tokens, ids, self.sequence_length, self.end_of_text)
        sizes = documents.column("bytes").to_numpy() if "bytes" in documents.column_names else None
        rows = packing.to_table(packed, self._segment_bytes(packed, tokens, ids, sizes))
        if "script" not in documents.column_names:
            return rows
        counts = packed.counts | {"scripts": _per("script", documents, tokens)}
        if "language" in documents.column_names:
            counts["languages"] = _per("language", documents, tokens)
        return rows.replace_schema_metadata({"counts": json.dumps(counts)})

    def save(self, folder: Path) -> None:
        """Write what `AutoTokenizer.from_pretrained` opens."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            **self.named,
            "model_max_length": self.sequence_length,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer.json").write_text(self.serialized, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def _segment_bytes(
        self,
        packed: packing.Packed,
        tokens: Sequence[np.ndarray],
        ids: np.ndarray,
        sizes: np.ndarray | None,
    ) -> np.ndarray | None:
        """Byte of its document at which each segment begins; -1 where the tokens of a document do
        not add up to its bytes."""
        lengths = byte_lengths(self.serialized)
        if sizes is None:
            return None
        ends = np.cumsum(np.array([len(piece) for piece in tokens]))
        passed = np.concatenate([[0], np.cumsum(lengths[np.concatenate(tokens)])])
        begins = np.concatenate([[0], ends[:-1]])
        exact = passed[ends] - passed[begins] == sizes
        owner = np.searchsorted(ids, packed.segment_documents)
        place = np.maximum(packed.segment_places - 1, 0)
        offset = passed[begins[owner] + place] - passed[begins[owner]]
        return np.where(exact[owner], offset, -1)


def fit(config: "RunConfig", sample: pa.Table) -> TextEncoder:
    """The tokenizer of a recipe; the same sample gives the same one.

    A small sample may hold fewer pieces than `data.vocab_size` asks for; `facts` tells the truth.

    Args:
        sample: cleaned documents, `text` and, where it is known, `language`.

    Raises:
        SourceError: if `data.tokenizer.path` holds no tokenizer that can be used.
    """
    data = config.data
    assert data.kind == "text"
    texts = sample.column("text").to_pylist()
    section, named = data.tokenizer, {}
    if section.path:
        found = existing_tokenizer.load(section.path)
        serialized, named = found.serialized, {"named": found.named}
    else:
        trained = vocabulary.train(texts, data.vocab_size, section)
        serialized = trained.to_str(pretty=False)
        if MASK in section.special_tokens:
            ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
            named = {"named": ends | {"mask_token": MASK}}
    languages = (
        sample.column("language").to_pylist()
        if "language" in sample.column_names
        else [""] * len(texts)
    )
    tokenizer = open_tokenizer(serialized)
    density, by_script, by_language = _measured(tokenizer, texts, languages)
    return TextEncoder(
        serialized,
        data.sequence_length,
        density,
        by_script,
        by_language,
        layout=data.packing,
        **named,
    )


@functools.lru_cache(maxsize=4)
def open_tokenizer(serialized: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # means: as the plain text that they are in a document
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Token ids of each text, in the smallest type that holds them; no control token among them.

    Raises:
        SourceError: if the tokenizer makes control tokens of plain text.
    """
    size = vocab_size(tokenizer)
    dtype, control = packing.token_type(size), _control(tokenizer, size)
    for batch in _batches(texts):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            # Through `array`, which takes a list of numbers three times as fast as numpy does.
            ids = np.array(array("I", encoding.ids), dtype=dtype)
            yield _spelled_out(tokenizer, text, control, dtype) if control[ids].any() else ids


@functools.lru_cache(maxsize=4)
def vocab_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: some tokenizers leave ids out."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def lossless(tokenizer: Tokenizer) -> bool:
    """Whether text comes back as it was."""
    ids = tokenizer.encode(ANY_TEXT, add_special_tokens=False).ids
    decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
    return decoded == ANY_TEXT


@functools.lru_cache(maxsize=4)
def byte_lengths(serialized: str) -> np.ndarray:
    """int64 per token id: bytes of text that it stands for, if the vocabulary is one of bytes or
    falls back on them."""
    tokenizer = open_tokenizer(serialized)
    lengths = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    of_bytes = "ByteLevel" in str(json.loads(serialized).get("decoder"))
    known = frozenset(vocabulary.alphabet())
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if of_bytes:
            lengths[number] = sum(character in known for character in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            lengths[number] = 1
        else:
            lengths[number] = len(token.replace("\u2581", " ").encode())
    lengths[_control(tokenizer, len(lengths))] = 0
    return lengths


def _control(tokenizer: Tokenizer, size: int) -> np.ndarray:
    """bool[size]: which ids are control tokens."""
    control = np.zeros(size, dtype=bool)
    for number, token in tokenizer.get_added_tokens_decoder().items():
        control[number] = token.special
    return control


def _spelled_out(tokenizer: Tokenizer, text: str, control: np.ndarray, dtype: Any) -> np.ndarray:
    """Ids of a text that spells a control token which the model knows as a word of its own: cut
    after the first character of it, so that no piece is that word."""
    contents = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    pattern = re.compile("|".join(re.escape(c) for c in sorted(contents, key=len, reverse=True)))
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    ids = np.array([number for one in encoded for number in one.ids], dtype=dtype)
    if control[ids].any():
        raise SourceError(
            "data.tokenizer.path: the tokenizer makes control tokens, such as "
            f"{tokenizer.id_to_token(int(ids[control[ids]][0]))}, of plain text: take another"
        )
    return ids


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


def _per(name: str, documents: pa.Table, tokens: Sequence[np.ndarray]) -> dict[str, dict[str, int]]:
    """Value of a column, such as a script, to `documents`, `bytes` and `tokens`."""
    counted = documents.select([name, "bytes"]).append_column(
        "tokens", pa.array([len(ids) for ids in tokens], pa.int64())
    )
    sums = counted.group_by(name).aggregate(
        [("bytes", "count"), ("bytes", "sum"), ("tokens", "sum")]
    )
    return {
        row[name]: {
            "documents": row["bytes_count"],
            "bytes": row["bytes_sum"],
            "tokens": row["tokens_sum"],
        }
        for row in sums.sort_by(name).to_pylist()
    }


Figures = dict[str, dict[str, float]]


def _measured(
    tokenizer: Tokenizer, texts: Sequence[str], languages: Sequence[str]
) -> tuple[float, Figures, Figures]:
    """Bytes per token of all that is measured, and figures of each script and each language."""
    chosen: dict[tuple[str, str], list[str]] = {}
    room: Counter[tuple[str, str]] = Counter()
    for text, language in zip(texts, languages, strict=True):
        pair = scripts.script(text), language
        if (left := MEASURED_CHARACTERS - room[pair]) > 0:
            chosen.setdefault(pair, []).append(text[:left])
            room[pair] += len(text)
    counted = {pair: _sizes(tokenizer, chosen[pair]) for pair in sorted(chosen)}
    size, count, _ = sum(counted.values(), np.zeros(3, dtype=np.int64))
    by_script, by_language = (_figures(counted, place) for place in (0, 1))
    by_language.pop("", None)
    return float(size / max(count, 1)), by_script, by_language


def _sizes(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Bytes, tokens and words."""
    tokens = sum(len(ids) for ids in encode_texts(tokenizer, texts))
    return np.array(
        [sum(len(text.encode()) for text in texts), tokens, sum(map(scripts.words, texts))]
    )


def _figures(counted: Mapping[tuple[str, str], np.ndarray], place: int) -> Figures:
    """Of each script (place 0) or language (place 1) of the pairs."""
    sums: dict[str, np.ndarray] = {}
    for pair, sizes in counted.items():
        sums[pair[place]] = sums.get(pair[place], 0) + sizes
    return {
        name: {
            "bytes_per_token": float(size / max(count, 1)),
            "tokens_per_word": float(count / max(words, 1)),
        }
        for name, (size, count, words) in sorted(sums.items())
    }
