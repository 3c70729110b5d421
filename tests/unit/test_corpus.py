"""Reading a corpus: sample ids count through files and row groups in order."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ArtifactError
from cluster.storage import Artifact, Store
from pipelines.data.corpus import Corpus, as_numpy

ROWS = [[5, 3], [4]]
"""Rows per row group, per file."""


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    staging = Store(str(tmp_path)).stage("corpus", "demo")
    files, entries, begin = [], [], 0
    for number, groups in enumerate(ROWS):
        table = rows(range(begin, begin + sum(groups)))
        begin += sum(groups)
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=groups[0])
        entries.append(staging.write(f"train/part-{number:05d}.parquet", sink.getvalue()))
        files.append({"path": entries[-1].path, "row_groups": groups})
    detail = {"facts": {"vocab_size": 9}, "splits": {"train": {"bytes": 77, "files": files}}}
    return staging.commit(entries, fingerprint="f", config={}, detail=detail)


def rows(numbers: range) -> pa.Table:
    flat = np.repeat(np.array(numbers, np.uint16), 3)
    return pa.table(
        {
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(flat), 3),
            "segment_documents": pa.array([list(range(n % 3 + 1)) for n in numbers]),
            "text": [f"第{n}行" for n in numbers],
        }
    )


def test_rows_come_in_order_of_sample_id(artifact: Artifact) -> None:
    corpus = Corpus(artifact)
    groups = corpus.row_groups("train")
    assert (groups.sizes, groups.starts) == ([5, 3, 4], [0, 5, 8, 12])
    read = list(corpus.rows("train"))
    assert [row["tokens"].tolist() for row in read] == [[n] * 3 for n in range(12)]
    assert [len(row["segment_documents"]) for row in read] == [n % 3 + 1 for n in range(12)]
    assert read[11]["text"] == "第11行"
    assert (corpus.bytes("train"), corpus.facts["vocab_size"]) == (77, 9)


def test_one_row_group_is_read_alone(artifact: Artifact) -> None:
    columns = Corpus(artifact).row_groups("train").read(1)
    assert columns["tokens"].tolist() == [[5] * 3, [6] * 3, [7] * 3]
    assert columns["tokens"].dtype == np.uint16


def test_lists_survive_slices() -> None:
    column = pa.chunked_array([pa.array([[1], [2, 3], [], [4]]).slice(1)])
    assert [piece.tolist() for piece in as_numpy(column)] == [[2, 3], [], [4]]


def test_damaged_or_missing_shard_is_named(artifact: Artifact) -> None:
    groups = Corpus(artifact).row_groups("train")
    Path(artifact.file("train/part-00001.parquet")).write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ArtifactError, match="part-00001"):
        groups.read(2)
    Path(artifact.file("train/part-00001.parquet")).unlink()
    with pytest.raises(ArtifactError, match="part-00001"):
        groups.read(2)


def test_shard_with_other_rows_than_the_manifest_says_is_refused(artifact: Artifact) -> None:
    pq.write_table(rows(range(2)), artifact.file("train/part-00001.parquet"))
    with pytest.raises(ArtifactError, match="has 2 rows in group 0, the manifest says 4"):
        Corpus(artifact).row_groups("train").read(2)
