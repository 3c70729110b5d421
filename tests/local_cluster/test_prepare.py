"""`prepare` on a real Ray: what comes out follows from files and recipe alone."""

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import chain
from cluster.config import RunConfig
from cluster.errors import SourceError, StorageError
from cluster.stages import BY_VERB
from cluster.storage import Artifact
from pipelines import families, prepare
from pipelines.data import scratch, streaming
from pipelines.data.corpus import Corpus
from pipelines.data.tokenizer import END_OF_TEXT, open_tokenizer
from tests import fakes, preparing

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

POEM = "第{n}首:床前明月光,疑是地上霜。\nline {n} of naïve prose, {n} times over. العربية\n"


def text_of(number: int) -> str:
    return POEM.format(n=number) * (1 + number % 4)


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 different documents, four copies, and one of each kind of trouble."""
    top = tmp_path_factory.mktemp("pile")
    (top / "诗").mkdir()
    for number in range(60):
        (top / "诗" / f"{number:03d}.txt").write_text(text_of(number), encoding="utf-8")
    for number in range(4):
        (top / f"copy-{number}.md").write_bytes(text_of(number).replace("\n", "\r\n").encode())
    lines = [json.dumps({"text": text_of(n)}) for n in range(60, 80)]
    lines.insert(5, "{broken")
    (top / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (top / "latin.txt").write_bytes("naïve".encode("latin-1") * 20)
    (top / "tiny.txt").write_text("短")
    (top / "picture.png").write_bytes(b"\x89PNG")
    return top


def overrides(pile: Path, root: Path) -> list[str]:
    sizes = ["data.vocab_size=500", "data.sequence_length=32", "data.partition_bytes=2000"]
    split = ["data.heldout_fraction=0.2", "data.row_group_rows=8"]
    return [f"storage.root={root}", f"data.sources=[{pile}]", *sizes, *split]


def recipe(pile: Path, root: Path, *more: str) -> RunConfig:
    return fakes.config("gpt-demo", *overrides(pile, root), *more)


def content(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def prepared(config: RunConfig) -> Artifact:
    artifact = prepare.run(config).artifact
    assert artifact is not None
    artifact.verify()
    return artifact


def left_over(root: Path) -> list[str]:
    return [path.name for path in (root / "corpus").glob("*")]


@pytest.fixture(scope="module")
def corpus(pile: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: object) -> Artifact:
    return prepared(recipe(pile, tmp_path_factory.mktemp("root"), "prepare.tasks=1"))


def decoded(corpus: Artifact, split: Any) -> list[str]:
    """The documents of a split, from its rows alone."""
    tokenizer = open_tokenizer(corpus.read_bytes("encoder/tokenizer.json").decode())
    texts: list[str] = []
    for entry in corpus.manifest.detail["splits"][split]["files"]:
        stream: list[int] = []
        for row in pq.read_table(corpus.file(entry["path"])).to_pylist():
            stream += row["tokens"][1 if stream else 0 : row["used"]]
        texts += tokenizer.decode(stream, skip_special_tokens=False).split(END_OF_TEXT)[1:-1]
    return texts


def test_every_document_is_in_one_split_once(corpus: Artifact) -> None:
    train, heldout = decoded(corpus, "train"), decoded(corpus, "heldout")
    assert sorted(train + heldout) == sorted(map(text_of, range(80)))
    detail = corpus.manifest.detail
    assert detail["splits"]["train"]["documents"] == len(train) > len(heldout) > 0
    assert Corpus(corpus).bytes("heldout") == sum(len(text.encode()) for text in heldout)
    assert corpus.manifest.metrics["documents"] == 80


def test_what_is_left_out_is_counted_and_named(corpus: Artifact, pile: Path) -> None:
    counts = corpus.read_json("report.json")["counts"]
    assert counts["dropped"] == {"duplicate": 4, "too_short": 1}
    assert counts["ignored"] == {".png": 1}
    assert counts["quarantined"] == {"not JSON": 1, "not UTF-8": 1}
    raw = corpus.read_bytes("quarantine.jsonl").decode()
    assert [(r["file"], r["row"]) for r in map(json.loads, raw.splitlines())] == [
        (f"{pile}/latin.txt", None),
        (f"{pile}/lines.jsonl.gz", 6),
    ]
    assert "broken" not in raw
    (rejected,) = map(json.loads, corpus.read_bytes("rejected.jsonl").decode().splitlines())
    assert (rejected["reason"], rejected["file"]) == ("too_short", f"{pile}/tiny.txt")
    assert "短" not in str(rejected)


def test_every_row_leads_back_to_its_files(corpus: Artifact) -> None:
    shards = [e.path for e in corpus.manifest.files if e.path.startswith("documents/")]
    origin = pa.concat_tables([pq.read_table(corpus.file(path)) for path in shards]).to_pylist()
    assert len(shards) > 3
    splits = {line["document"]: line["split"] for line in origin}
    for split in ("train", "heldout"):
        for row in Corpus(corpus).rows(split):  # type: ignore[arg-type]
            assert {splits[document] for document in row["segment_documents"]} == {split}
    # The copy came first by path, so the poem of the same content went.
    assert any(line["path"].endswith("copy-0.md") for line in origin)
    assert not any(line["path"].endswith("诗/000.txt") for line in origin)


def test_bytes_do_not_depend_on_the_workers(corpus: Artifact, pile: Path, root: Path) -> None:
    for tasks in (2, 4):
        again = prepared(recipe(pile, root / str(tasks), f"prepare.tasks={tasks}"))
        assert content(again) == content(corpus)
        assert again.manifest.fingerprint == corpus.manifest.fingerprint
        assert left_over(root / str(tasks)) == ["gpt-demo@1"]
        assert not (Path(again.path) / scratch.FOLDER).exists()


def test_killed_runs_go_on_from_what_was_finished(corpus: Artifact, pile: Path, root: Path) -> None:
    import ray

    config = recipe(pile, root, "prepare.tasks=1")
    address = ray.get_runtime_context().gcs_address
    version = root / "corpus" / "gpt-demo@1"
    seen: list[dict[str, int]] = []

    def finished(kind: str, count: int) -> bool:
        found = preparing.records(version, kind)
        seen.append(found)
        return len(found) >= count

    given = [*overrides(pile, root), "prepare.tasks=1"]
    preparing.killed_driver(given, address, lambda: finished("read", 3))
    read = seen[-1]
    assert not list(version.glob("COMMIT"))
    preparing.killed_driver(given, address, lambda: finished("encode", 2))
    assert read.items() <= preparing.records(version, "read").items(), "read again"
    shards = {path: path.stat().st_ino for path in version.glob("train/part-*.parquet")}
    encoded = preparing.records(version, "encode")
    with preparing.WorkerHunter(1) as hunter:
        made = prepared(config)
    assert hunter.killed
    assert content(made) == content(corpus)
    assert made.manifest.version == 1 and len(encoded) >= 2
    kept = [path for path, inode in shards.items() if path.stat().st_ino == inode]
    assert len(kept) >= len(encoded) - 1, f"encoded again; before it there were {sorted(shards)}"
    listed = {entry.path for entry in made.manifest.files} | {"manifest.json", "COMMIT"}
    found = {path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()}
    assert found == listed


def test_second_time_is_skipped_until_a_file_changes(pile: Path, root: Path) -> None:
    config = recipe(pile, root)
    prepared(config)
    stage = [BY_VERB["prepare"]]
    (row,) = chain.execute(stage, config)
    assert row.status == "skipped"
    extra = pile / "extra.txt"
    extra.write_text(text_of(500), encoding="utf-8")
    try:
        (row,) = chain.execute(stage, config)
    finally:
        extra.unlink()
    assert (row.status, row.artifact) == ("done", "corpus/gpt-demo@2")
    assert row.metrics["documents"] == 81


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"\xff\xfe\xfd" * 50, "b.txt": b"x"}, "no usable text"),
        (
            {"a.txt": b"", "b.jsonl": b"", "c.csv": b"text\n", "d.jsonl.gz": gzip.compress(b"")},
            "no usable text .*2 x empty: no line with anything on it; .*give others, or loosen",
        ),
        ({"a.txt": b"one single document of prose, long enough"}, "leaves no held-out document"),
    ],
)
def test_unusable_sources_leave_nothing_behind(
    tmp_path: Path, root: Path, files: dict[str, bytes], message: str
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    with pytest.raises(SourceError, match=message):
        prepare.run(recipe(folder, root, "data.heldout_fraction=0.000001"))
    assert left_over(root) == []


def test_error_in_a_worker_comes_out_as_itself(
    pile: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Local, so that they travel to the workers by value.
    class FullDisk:
        def encode(self, documents: Any) -> Any:
            raise StorageError("cannot write: no space left")

    class Family:
        def fit_encoder(self, config: Any, sample: Any, labels: Any) -> FullDisk:
            return FullDisk()

    monkeypatch.setattr(families, "load", lambda name: Family())
    with pytest.raises(StorageError, match="no space left") as caught:
        prepare.run(recipe(pile, root))
    assert type(caught.value) is StorageError
    assert left_over(root) == []


def test_images_go_the_same_way(root: Path) -> None:
    corpus = Corpus(prepared(fakes.config("digits-cnn", root=root)))
    assert corpus.facts["labels"] == list("0123456789")
    splits = corpus.artifact.manifest.detail["splits"]
    assert splits["train"]["documents"] + splits["heldout"]["documents"] == 1797
    assert 250 < splits["heldout"]["rows"] < 470
    row = next(corpus.rows("heldout"))
    assert row["pixels"].shape == (32 * 32,)
    assert 0 <= row["label"] <= 9


def test_the_next_task_waits_where_a_core_becomes_free(tmp_path: Path) -> None:
    """Else a core stands still until Ray Data sees that a task is done, and gives it the next.

    No task ends before Ray has been asked, so that more of them than cores means that some wait.
    """
    import ray

    go, told = tmp_path / "go", list[int]()
    cores = int(ray.cluster_resources()["CPU"])
    earlier = unfinished()

    def task(_: int) -> bool:
        while not go.exists():
            time.sleep(0.05)
        return True

    def release() -> None:
        ends = time.monotonic() + 30
        while time.monotonic() < ends and (not told or told[-1] <= cores):
            time.sleep(0.2)
            told.append(len(unfinished() - earlier))
        go.touch()

    watch = threading.Thread(target=release)
    watch.start()
    try:
        with streaming.set_up({}):
            assert all(streaming.over_partitions(range(4 * cores), task, 0))
    finally:
        go.touch()
        watch.join()
    assert told[-1] > cores


def unfinished() -> set[str]:
    """Tasks of Ray Data that this process has given to Ray. Ray itself picks them out: its list
    is cut at a number of tasks, and other tests and processes leave many."""
    import ray
    from ray.util.state import list_tasks

    name = f"MapBatches({streaming._run_block.__name__})"
    own = ("job_id", "=", ray.get_runtime_context().get_job_id())
    found = list_tasks(filters=[own, ("name", "=", name), ("state", "!=", "FINISHED")], limit=1000)
    return {one.task_id for one in found}
