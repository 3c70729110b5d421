"""Partitions straight to training rows, for a corpus too large to store prepared.

`prepare` then looks at a sample of the partitions only: it fits the encoder and writes the held-out
rows. Training streams every partition through the steps that `prepare` would have taken, but for
one: copies are found inside of a partition, not across the corpus.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.config import RunConfig
from cluster.errors import SourceError
from pipelines.data import contamination, documents, duplicates
from pipelines.data.choice import is_heldout
from pipelines.data.contamination import Evaluations
from pipelines.data.corpus import Corpus, as_numpy
from pipelines.data.sources import Reject, SourceFile
from pipelines.families.base import Encoder, Row

SAMPLE = 4
"""Times `data.tokenizer_bytes`: raw bytes that `prepare` looks at."""
ROW_BITS = 20
MOST_ROWS = 1 << ROW_BITS
"""Of one partition: eight billion tokens at 8,192 to a row."""
MOST_PASSES = 1 << 63 - 2 * ROW_BITS
"""Of all partitions in an epoch: what is left of a row's number."""
_DRAW = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One pass over a partition in one epoch."""

    epoch: int
    partition: int
    """Of n partitions, number n + p is the second pass over p, and so on."""


@dataclass(frozen=True)
class Place:
    """Where a streamed row stands: a number of its own in an epoch, and its partition is done when
    all `rows` of it were trained on."""

    partition: int
    rows: int
    row: int

    @property
    def id(self) -> int:
        return (self.partition << 2 * ROW_BITS) | (self.rows - 1) << ROW_BITS | self.row

    @staticmethod
    def of(number: int) -> "Place":
        low = MOST_ROWS - 1
        return Place(number >> 2 * ROW_BITS, (number >> ROW_BITS & low) + 1, number & low)


def sampled(parts: Sequence[list[SourceFile]], config: RunConfig) -> list[list[SourceFile]]:
    """Partitions that `prepare` looks at, in order: about `SAMPLE * data.tokenizer_bytes`."""
    assert config.data.kind == "text"
    order = np.random.default_rng([config.seed, len(parts)]).permutation(len(parts))
    chosen, room = [], SAMPLE * config.data.tokenizer_bytes
    for number in order.tolist():
        if room <= 0:
            break
        chosen.append(number)
        room -= sum(file.size for file in parts[number])
    return [parts[number] for number in sorted(chosen)]


def plan(
    everything: Sequence[Sequence[SourceFile]],
    looked_at: Sequence[Sequence[SourceFile]],
    kept: pa.Table,
    encoder: Encoder,
) -> dict[str, Any]:
    """What training needs to know of the stream: `partitions`, `bytes` of the files, and about how
    many `rows` they give in an epoch.

    Args:
        kept: training documents of the partitions that were looked at; column `bytes`.
    """
    facts = encoder.facts()
    total, seen = (sum(f.size for part in parts for f in part) for parts in (everything, looked_at))
    share = sum(kept.column("bytes").to_pylist()) / max(seen, 1)
    rows = total * share / facts["bytes_per_token"] / facts["sequence_length"]
    return {"stream": {"partitions": len(everything), "bytes": total, "rows": round(rows)}}


def weights(parts: Sequence[Sequence[SourceFile]], mix: Mapping[str, float]) -> list[float]:
    """How often an epoch passes over each partition, by its source.

    Args:
        mix: weight by source as the recipe names it; 1 for those that are not named.

    Raises:
        SourceError: if an epoch's rows could not be numbered.
    """
    named = {source.rstrip("/") or source: weight for source, weight in mix.items()}
    found = [named.get(files[0].source, 1.0) for files in parts]
    passes = len(found) * (int(max(found, default=0)) + 1)
    if passes > MOST_PASSES:
        raise SourceError(
            f"{len(found)} partitions with the weights of train.mix are {passes} passes in an "
            f"epoch, more than {MOST_PASSES}: raise data.partition_bytes"
        )
    return found


def epochs(weights: Sequence[float], seed: int, first: int = 0) -> Iterator[Piece]:
    """Every partition of epoch after epoch, as often as it weighs, in an order that follows from
    seed and epoch.

    Args:
        weights: of each partition, not all 0.
    """
    epoch = first
    while True:
        taken = _taken(np.asarray(weights, dtype=np.float64), seed, epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(taken))
        yield from (Piece(epoch, partition) for partition in taken[order].tolist())
        epoch += 1


def _taken(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Passes of an epoch. Of a weight's fraction, epochs take turns: each partition comes as often
    as any other of its weight, however few there are."""
    passes = []
    for weight in np.unique(weights):
        own = np.flatnonzero(weights == weight)
        whole, part = int(weight), float(weight % 1)
        passes += [own + turn * len(weights) for turn in range(whole)]
        begin, end = (int(part * len(own) * times) for times in (epoch, epoch + 1))
        drawn = np.random.default_rng([seed, _DRAW]).permutation(own)
        passes.append(drawn[np.arange(begin, end) % len(own)] + whole * len(weights))
    return np.sort(np.concatenate(passes))


def finished(epoch: np.ndarray, ids: np.ndarray) -> set[Piece]:
    """Partitions all of whose rows were trained on.

    Args:
        epoch, ids: of every row that was; a row that was seen twice counts once.
    """
    pairs = np.unique(np.stack([epoch, ids]), axis=1)
    keys, taken = np.unique(np.stack([pairs[0], pairs[1] >> ROW_BITS]), axis=1, return_counts=True)
    done = set()
    for number, key, count in zip(keys[0].tolist(), keys[1].tolist(), taken.tolist(), strict=True):
        place = Place.of(key << ROW_BITS)
        if count == place.rows:
            done.add(Piece(number, place.partition))
    return done


def rows(
    files: Sequence[SourceFile],
    piece: Piece,
    config: RunConfig,
    encoder: Encoder,
    against: Evaluations | None = None,
) -> pa.Table:
    """Training rows of a partition in shuffled order, with `epoch` and `id`; a partition may give
    none.

    Args:
        against: evaluation sets of `data.decontaminate`.
    """
    data = config.data
    found = documents.read(files, data, piece.partition)
    _tell(piece, found.leavings.rejects)
    table = found.table
    if against is not None and data.kind == "text":
        table = contamination.screen(table, against, data.decontaminate.action).table
    digests = table.column("digest").to_pylist()
    kept = [not is_heldout(digest, config.seed, data.heldout_fraction) for digest in digests]
    table = duplicates.unique(table.filter(pa.array(kept, pa.bool_())))
    if not table.num_rows:
        return pa.table({})
    encoded = encoder.encode(table)
    count = min(encoded.num_rows, MOST_ROWS)
    order = np.random.default_rng([config.seed, piece.epoch, piece.partition]).permutation(count)
    ids = [Place(piece.partition, count, row).id for row in order.tolist()]
    return (
        encoded.take(pa.array(order))
        .append_column("epoch", pa.array([piece.epoch] * count, pa.int64()))
        .append_column("id", pa.array(ids, pa.int64()))
        .replace_schema_metadata(None)
    )


def _tell(piece: Piece, rejects: Sequence[Reject]) -> None:
    """What cannot be read, in the log of the worker that met it, once: nobody collects it."""
    if piece.epoch or not rejects:
        return
    first, reasons = rejects[0], Counter(reject.reason for reject in rejects)
    counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    row = "" if first.row is None else f" row {first.row}"
    log.warning("partition %d: %s; the first is %s%s", piece.partition, counted, first.file, row)


def as_rows(table: pa.Table) -> list[Row]:
    columns = {name: as_numpy(table.column(name)) for name in table.column_names}
    return [
        {name: column[row] for name, column in columns.items()} for row in range(table.num_rows)
    ]


def stored_encoder(corpus: Corpus, config: RunConfig) -> Encoder:
    """The encoder that a corpus was fitted with."""
    from pipelines.data import existing_tokenizer
    from pipelines.data.tokenizer import TextEncoder

    assert config.data.kind == "text"
    with corpus.artifact.local("encoder/") as folder:
        found = existing_tokenizer.load(str(folder))
    return TextEncoder(
        found.serialized,
        config.data.sequence_length,
        corpus.facts["bytes_per_token"],
        named=found.named,
        layout=config.data.packing,
    )
