"""Which documents of an index go where: duplicates out, then training or held out. Pure."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.config import RunConfig
from cluster.errors import SourceError
from pipelines.data import cleaning, duplicates
from pipelines.data.cleaning import Rejected
from pipelines.data.contamination import Overlap
from pipelines.data.corpus import Split
from pipelines.data.partitions import Cleaned
from pipelines.data.sources import Reject

NOBODY = np.array([], dtype=np.int64)
"""Ids of no document."""
Placed = TypeVar("Placed", Rejected, Overlap)


@dataclass(frozen=True)
class Left:
    """What did not make it into the corpus, counted."""

    drops: Counter[str] = field(default_factory=Counter)
    """Documents that were read and are not wanted, by reason."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows and files that could not be read, by reason."""
    files: tuple[Reject, ...] = ()
    """The files among them; the rows lie in the scratch folder."""
    sample: tuple[Rejected, ...] = ()
    """Some of the documents that are not wanted."""
    personal: Counter[str] = field(default_factory=Counter)
    """Personal values that a surrogate stands for, by type."""


@dataclass(frozen=True)
class Chosen:
    """Which documents go where."""

    splits: Mapping[Split, pa.Table]
    """Index of each split (columns `documents.INDEX`), sorted by document id."""
    left: Left

    @property
    def labels(self) -> list[str]:
        """Labels of the training documents, sorted; empty for text."""
        return _labels(self.splits["train"])

    def only_heldout(self) -> "Chosen":
        """For a stream, whose training documents are read when they are trained on."""
        nothing = self.splits["train"].slice(0, 0)
        return replace(self, splits={**self.splits, "train": nothing})


def left_out(listed: Sequence[Reject], cleaned: Sequence[Cleaned]) -> Left:
    """Everything that was left out so far. Several partitions of one file may tell the same."""
    files = {*listed, *(reject for part in cleaned for reject in part.files)}
    drops = sum((part.drops for part in cleaned), Counter[str]())
    rows = sum((part.reasons for part in cleaned), Counter[str]())
    in_order = tuple(sorted(files, key=lambda reject: (reject.file, reject.reason)))
    sample: tuple[Rejected, ...] = ()
    lines_before = lines_before_each(cleaned)
    for part in cleaned:
        before = lines_before.get(part.partition, {})
        own = (from_first_line(one, before) for one in part.sample)
        sample = cleaning.sampled([*sample, *own])
    reasons = rows + Counter(reject.reason for reject in in_order)
    personal = sum((part.personal for part in cleaned), Counter[str]())
    return Left(drops, reasons, in_order, sample, personal)


def from_first_line(one: Placed, before: Mapping[str, int]) -> Placed:
    lines = before.get(one.file, 0)
    return replace(one, row=one.row + lines) if one.row is not None and lines else one


def lines_before_each(cleaned: Sequence[Cleaned]) -> dict[int, dict[str, int]]:
    """By partition: lines of its files that earlier partitions hold."""
    seen: Counter[str] = Counter()
    before: dict[int, dict[str, int]] = {}
    for part in cleaned:
        known = {path: seen[path] for path in part.lines if seen[path]}
        if known:
            before[part.partition] = known
        seen.update(part.lines)
    return before


def choose(config: RunConfig, index: pa.Table, left: Left, near: np.ndarray = NOBODY) -> Chosen:
    """Duplicates out, then each document to its split. Pure.

    Args:
        near: ids of documents that are nearly the same as another.

    Raises:
        SourceError: if nothing usable remains, or a split would be empty.
    """
    if not index.num_rows:
        raise SourceError(nothing_usable(config, left))
    fraction = config.data.heldout_fraction
    unique = duplicates.unique(index)
    drops = Counter(duplicate=index.num_rows - unique.num_rows)
    alone = unique.filter(pc.invert(pc.is_in(unique.column("document"), pa.array(near))))
    drops["near_duplicate"] = unique.num_rows - alone.num_rows
    unique = alone
    held = _held(unique, config.seed, fraction)
    train, heldout = unique.filter(pc.invert(held)), unique.filter(held)
    if labels := _labels(train):
        known = heldout.filter(pc.is_in(heldout.column("label"), pa.array(labels)))
        drops["label_not_in_training"] = heldout.num_rows - known.num_rows
        heldout = known
    if not train.num_rows or not heldout.num_rows:
        raise SourceError(_empty_split(fraction, unique.num_rows, heldout.num_rows))
    left = replace(left, drops=+(left.drops + drops))
    return Chosen({"train": train, "heldout": heldout}, left)


def _held(index: pa.Table, seed: int, fraction: float) -> pa.ChunkedArray:
    """Whether each document is held out; Python's objects exist for some of them at a time."""
    batches = (batch.column("digest") for batch in index.to_batches(max_chunksize=1 << 16))
    chunks = [
        pa.array([is_heldout(digest, seed, fraction) for digest in digests.to_pylist()])
        for digests in batches
    ]
    return pa.chunked_array(chunks, pa.bool_())


def is_heldout(digest: bytes, seed: int, fraction: float) -> bool:
    """By content, so that a document stays on its side when others come and go."""
    keyed = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(8)).digest()
    return int.from_bytes(keyed) < fraction * 2**64


def _labels(index: pa.Table) -> list[str]:
    return sorted(label for label in index.column("label").unique().to_pylist() if label)


def nothing_usable(config: RunConfig, left: Left) -> str:
    """What is wrong with sources of which no document remains, and the cure."""
    reasons = left.reasons + left.drops
    counted = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(4)) or "no documents"
    example = f"; such as {left.files[0].file}" if left.files else ""
    return (
        f"data.sources hold no usable {config.data.kind} ({counted}{example}): "
        "give others, or loosen the limits in data"
    )


def _empty_split(fraction: float, total: int, heldout: int) -> str:
    empty = "training" if heldout else "held-out"
    cure = "a smaller" if heldout else "a larger"
    return (
        f"data.heldout_fraction {fraction:g} of {total} different documents leaves no {empty} "
        f"document: give more documents or {cure} data.heldout_fraction"
    )
