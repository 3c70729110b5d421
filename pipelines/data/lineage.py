"""Which documents a training row came from."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ArtifactError
from pipelines.data.corpus import PLACE_BITS, Corpus, Split, part_name

COLUMNS = ("segment_documents", "document")
"""Where rows name their documents: text packs several, an image is one."""


def documents(corpus: Corpus, split: Split, samples: Iterable[int]) -> list[str]:
    """Places of the documents of some rows, each once: `path`, or `path:row` inside a file of many.

    A corpus without lineage gives `row N` for each.

    Raises:
        ArtifactError: if a file of the corpus cannot be read.
    """
    samples = sorted(set(samples))
    ids: set[int] = set()
    groups = corpus.row_groups(split)
    numbers = np.searchsorted(np.asarray(groups.starts), samples, side="right") - 1
    for number in sorted(set(numbers.tolist())):
        columns = groups.read(number)
        named = next((columns[name] for name in COLUMNS if name in columns), None)
        if named is None:
            return [f"row {sample}" for sample in samples]
        inside = [
            s - groups.starts[number] for s, n in zip(samples, numbers, strict=True) if n == number
        ]
        ids.update(int(i) for row in inside for i in np.atleast_1d(named[row]))
    return _places(corpus, ids)


def _places(corpus: Corpus, ids: set[int]) -> list[str]:
    """Lineage tables are one per part, and an id begins with its part's number."""
    found: list[str] = []
    for part in sorted({number >> PLACE_BITS for number in ids}):
        wanted = pa.array(sorted(i for i in ids if i >> PLACE_BITS == part), pa.int64())
        path = f"documents/{part_name(part)}"
        try:
            table = pq.read_table(
                corpus.artifact.file(path),
                columns=["document", "path", "row"],
                filesystem=corpus.artifact.store.filesystem,
                **corpus.sealing.reading(f"{corpus.artifact.id}/{path}"),
                filters=pa.compute.field("document").isin(wanted),
            )
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{corpus.artifact.id}: {path}: {error}") from None
        for entry in table.to_pylist():
            row = entry["row"]
            found.append(entry["path"] if row is None else f"{entry['path']}:{row}")
    return found
