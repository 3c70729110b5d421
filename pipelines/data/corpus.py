"""A prepared corpus and how it is read.

    encoder/                  tokenizer or preprocessor files, as a published model carries them
    train/part-00000.parquet  rows of one partition, in row groups of `data.row_group_rows`
    heldout/part-00000.parquet
    documents/part-00000.parquet   lineage: document id, path, row (line of a .jsonl), start and
                              end (bytes of the record in the file), bytes, split; no content
    report.json               counts: files, documents, bytes, drops by reason
    report.html               the same for a person, with figures and a few documents
    quarantine.jsonl          what could not be read: file, row and reason, never content

With `data.encrypt` the Parquet files are encrypted (`sealing`); the tokenizer's vocabulary, the
counts and the paths of what could not be read are not.

A *sample id* is the number of a row in its split, counting through the files in order. Row groups
are the unit of fetching; `detail["splits"]` of the manifest says how many rows each one has.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ArtifactError
from cluster.storage import Artifact
from pipelines.data.sealing import Sealing, check_key

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Columns = dict[str, np.ndarray]
"""One row group: column -> array whose first axis is the row."""


PART_BITS, PLACE_BITS = 12, 20
"""Of a document's id, behind the number of its partition: its part there, and its place in it."""


def part_name(part: int) -> str:
    """File name of a part, by its number; all but the first of a partition carry their place."""
    partition, place = divmod(part, 1 << PART_BITS)
    return f"part-{partition:05d}{f'-{place:04d}' if place else ''}.parquet"


@dataclass(frozen=True)
class Corpus:
    artifact: Artifact

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: if it is encrypted and the key is missing or another one.
        """
        check_key(self.artifact.id, self._key_name)

    @property
    def _key_name(self) -> str | None:
        return self.artifact.manifest.detail.get("encryption_key")

    @property
    def sealing(self) -> Sealing:
        return Sealing(self._key_name is not None)

    @property
    def facts(self) -> dict[str, Any]:
        """What the encoder found out: `vocab_size`, `labels`, ..."""
        facts: dict[str, Any] = self.artifact.manifest.detail["facts"]
        return facts

    def bytes(self, split: Split) -> int:
        """Size of the split's documents before encoding."""
        return int(self.artifact.manifest.detail["splits"][split]["bytes"])

    def row_groups(self, split: Split) -> "RowGroups":
        return RowGroups(self.artifact, split, self.sealing)

    def rows(self, split: Split) -> Iterator[dict[str, Any]]:
        """Every row in order, as column -> value."""
        groups = self.row_groups(split)
        for number in range(len(groups)):
            columns = groups.read(number)
            for row in range(groups.sizes[number]):
                yield {name: column[row] for name, column in columns.items()}


@dataclass(frozen=True)
class RowGroups:
    """Random access by row group."""

    artifact: Artifact
    split: Split
    sealing: Sealing = Sealing()

    @cached_property
    def _places(self) -> list[tuple[str, int, int]]:
        """(file, row group within it, rows), in order of sample id."""
        files = self.artifact.manifest.detail["splits"][self.split]["files"]
        return [
            (file["path"], number, rows)
            for file in files
            for number, rows in enumerate(file["row_groups"])
        ]

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def sizes(self) -> list[int]:
        return [rows for _, _, rows in self._places]

    def weights(self, mix: Mapping[str, float]) -> list[float]:
        """How often an epoch passes over each row group, by the source that it came from."""
        weights = {source.rstrip("/") or source: weight for source, weight in mix.items()}
        files = self.artifact.manifest.detail["splits"][self.split]["files"]
        return [weights.get(file.get("source"), 1.0) for file in files for _ in file["row_groups"]]

    @cached_property
    def starts(self) -> list[int]:
        """First sample id of each row group, and the number of samples at the end."""
        return [0, *itertools.accumulate(self.sizes)]

    def read(self, number: int) -> Columns:
        """
        Raises:
            ArtifactError: if the shard cannot be read or has other rows than the manifest says.
        """
        path, group, rows = self._places[number]
        try:
            with pq.ParquetFile(
                self.artifact.file(path),
                filesystem=self.artifact.store.filesystem,
                **self.sealing.reading(f"{self.artifact.id}/{path}"),
            ) as file:
                table = file.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{self.artifact.id}: {path} cannot be read: {error}") from None
        if table.num_rows != rows:
            raise ArtifactError(
                f"{self.artifact.id}: {path} has {table.num_rows} rows in group {group}, "
                f"the manifest says {rows}"
            )
        return {name: as_numpy(table.column(name)) for name in table.column_names}


def as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """Fixed-size lists become [rows, size]; variable lists an object array of arrays."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        flat = array.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(array), array.type.list_size)
    if pa.types.is_list(array.type):
        values = array.flatten().to_numpy(zero_copy_only=False)
        offsets = array.offsets.to_numpy()
        pieces: Sequence[np.ndarray] = np.split(values, (offsets - offsets[0])[1:-1])
        out = np.empty(len(array), dtype=object)
        out[:] = pieces
        return out
    return array.to_numpy(zero_copy_only=False)
