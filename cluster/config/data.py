"""`data`: where documents come from and how they become training rows."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config.base import OPERATIONAL, Fraction, Operational, Positive, Section
from cluster.config.cleaning import DEFAULT_STEPS, Steps
from cluster.config.dedup import DecontaminateSection, DedupSection
from cluster.config.privacy import PrivacySection
from cluster.config.tokenizer import TokenizerSection
from cluster.errors import ConfigError

Sources = Annotated[tuple[str, ...], Field(min_length=1)]
OTHERS = "*"
"""In `data.columns`: every source that is not named there."""


class DataSection(Section):
    sources: Sources
    """Files, folders, patterns or URIs; `NAME.urls` is a text file of URIs, one per line;
    `builtin:NAME` a corpus that every installation has."""
    columns: dict[str, dict[Literal["text", "image", "label"], str]] = {}
    """What tables call their columns, by source: `{SOURCE: {text: content}}`; `*` is for the
    sources that are not named. A table is a jsonl, csv, tsv, parquet, arrow or feather file."""
    heldout_fraction: Annotated[Fraction, Field(gt=0, lt=1)] = 0.02
    """Share of documents kept out of training, chosen by a hash of the content."""
    partition_bytes: Positive = 8 * 2**20
    """Most raw bytes that one task reads and packs; a corpus of fewer than 64 times as many is cut
    finer. Output bytes depend on it, never on the workers."""
    row_group_rows: Positive = 256
    """Rows per Parquet row group: the unit that training permutes and fetches."""

    encrypt: bool = False
    """Encrypt shards and lineage with the key that the environment variable HELIOSTAT_CORPUS_KEY
    holds on every node."""

    @model_validator(mode="after")
    def _columns_name_sources(self) -> "DataSection":
        _check_sources("data.columns", set(self.columns) - {OTHERS}, self.sources)
        return self


class TextData(DataSection):
    """Documents of text, packed to rows of tokens."""

    kind: Literal["text"] = "text"
    """Follows from `family`; need not be given."""
    lines: tuple[str, ...] = ()
    """Sources of whose text files each line is a document; of others, each file is one."""
    min_characters: Annotated[int, Field(ge=0)] = 32
    """Shorter documents are dropped."""
    max_characters: Positive = 2_000_000
    """Longer documents are dropped."""
    cleaning: Steps = DEFAULT_STEPS
    """Steps that text passes, in order; what is empty, too short or too long afterwards goes."""
    privacy: PrivacySection = PrivacySection()
    """How personal data is taken out."""
    dedup: DedupSection = DedupSection()
    decontaminate: DecontaminateSection = DecontaminateSection()
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 2048
    """Entries of a tokenizer that is trained: at least 256 bytes and one end-of-text token."""
    tokenizer_bytes: Positive = 8 * 2**20
    """Bytes of cleaned text that the tokenizer is trained on, taken from every source, language
    and script; rare ones are taken more of than their share."""
    tokenizer: TokenizerSection = TokenizerSection()
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] = 256
    """Predictions per row: a row stores this many tokens and one more."""
    packing: Literal["split", "best_fit"] = "split"
    """`split` cuts one stream of all documents to rows: nothing is padded, most rows begin inside
    of a document. `best_fit` keeps each document in one row where it fits: less is cut, some is
    padded."""

    @property
    def asks_all_rows(self) -> bool:
        """Whether a step of cleaning looks at the corpus as a whole."""
        return any(getattr(step.settings, "outliers", None) for step in self.cleaning)

    @model_validator(mode="after")
    def _bytes_fit(self) -> "TextData":
        least = 257 + len(self.tokenizer.special_tokens)
        if self.vocab_size < least:
            raise ConfigError(
                f"data.vocab_size {self.vocab_size} is less than the {least} that 256 bytes, "
                "end-of-text and data.tokenizer.special_tokens take"
            )
        return self

    @model_validator(mode="after")
    def _lines_name_sources(self) -> "TextData":
        _check_sources("data.lines", self.lines, self.sources)
        return self


class ImageData(DataSection):
    """Labelled images, one to a row."""

    kind: Literal["image"] = "image"
    """Follows from `family`; need not be given."""
    image_size: Annotated[int, Field(ge=4, le=4096)] = 32
    """Side in pixels that the model sees; images are resized to it."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Augmentation: largest shift of a training image, as a share of its side."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Augmentation: largest rotation of a training image, in degrees."""


def _check_sources(key: str, named: Iterable[str], sources: tuple[str, ...]) -> None:
    for name in sorted(set(named) - set(sources)):
        raise ConfigError(f"{key} names {name}, which is none of data.sources: write it as there")


Data = Annotated[TextData | ImageData, Field(discriminator="kind")]


class PrepareSection(Section):
    """`prepare`: how the work is spread; nothing here changes a byte of the corpus."""

    tasks: Annotated[int, OPERATIONAL, Field(ge=0, le=10_000)] = 0
    """Most partitions worked on at once; 0 lets Ray Data use what the cluster has."""
    labels: Annotated[dict[str, str], OPERATIONAL] = {}
    """Ray labels of the nodes that Ray Data may work on, such as {role: data}; it then keeps off
    the nodes that train, also where `train.input` is `stream`."""


__all__ = ["Data", "DataSection", "ImageData", "Operational", "PrepareSection", "TextData"]
