"""Tiny corpora, written straight into a store, for tests of the stages after `prepare`."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import RunConfig, TextData
from cluster.stages import BY_VERB, fingerprint, resolved
from cluster.storage import Artifact, FileEntry, Staging, Store

VOCABULARY = 97


def counting_corpus(config: RunConfig, rows: int = 200, *, ragged: bool = False) -> Artifact:
    """Rows of tokens that count upwards by one or two: soon learned, never boring.

    Args:
        ragged: end each row at a length of its own, so that rows predict unequally much.
    """
    assert isinstance(config.data, TextData)
    store = Store(config.storage.root)
    store.check_writable()
    staging = store.stage("corpus", config.name)
    splits, files = {}, []
    for split, count, seed in (("train", rows, 0), ("heldout", 20, 1)):
        entry, groups = _shard(staging, f"{split}/part-00000.parquet", count, config, seed, ragged)
        files.append(entry)
        source = config.data.sources[0]
        listed = [{"path": entry.path, "row_groups": groups, "source": source}]
        splits[split] = {"rows": count, "documents": count, "bytes": count * 100, "files": listed}
    files.append(_lineage(staging, rows))
    return staging.commit(
        files,
        fingerprint=fingerprint(BY_VERB["prepare"], config, None, {}),
        config=resolved(config),
        detail={"facts": {"vocab_size": VOCABULARY, "end_of_text": 0}, "splits": splits},
    )


def _shard(
    staging: Staging, path: str, rows: int, config: RunConfig, seed: int, ragged: bool
) -> tuple[FileEntry, list[int]]:
    assert isinstance(config.data, TextData)
    width, group = config.data.sequence_length + 1, 16
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 3, (rows, width))
    used = rng.integers(3, width + 1, rows) if ragged else np.full(rows, width)
    tokens = (np.cumsum(steps, axis=1) % VOCABULARY).astype(np.uint16)
    table = pa.table(
        {
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), width),
            "used": pa.array(used.astype(np.int32)),
            "segment_starts": pa.array([[0]] * rows, pa.list_(pa.int32())),
            "segment_documents": pa.array([[row] for row in range(rows)], pa.list_(pa.int64())),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    sizes = [min(group, rows - start) for start in range(0, rows, group)]
    return staging.write(path, buffer.getvalue()), sizes


def _lineage(staging: Staging, rows: int) -> FileEntry:
    """Each training row is a document of its own: `row-17.txt`."""
    table = pa.table(
        {
            "document": pa.array(range(rows), pa.int64()),
            "path": [f"row-{row}.txt" for row in range(rows)],
            "row": pa.array([None] * rows, pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return staging.write("documents/part-00000.parquet", buffer.getvalue())
