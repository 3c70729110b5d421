"""Sources: what is found, how it is cut to partitions, and what becomes of bad files."""

import gzip
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from cluster.errors import SourceError
from pipelines.data import sources
from pipelines.data.sources import RawText, Reject, SourceFile, remote

CHINESE = "春眠不觉晓,处处闻啼鸟。\nمرحبا Ελλάδα 🌾 naïve\n"


def read(path: Path, max_bytes: int = 1000) -> list[RawText | Reject]:
    found = sources.listing([str(path)], "text")
    return [item for file in found.files for item in sources.read_texts(file, max_bytes)]


def file(name: str, size: int) -> SourceFile:
    return SourceFile(name, f"/{name}", "", size, 0, name)


def test_folder_is_read_in_order_of_path_with_what_is_left_out_counted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "唐诗.txt").write_text(CHINESE, encoding="utf-8")
    (tmp_path / "a.md").write_text("prose")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("not a document")
    found = sources.listing([f"{tmp_path}/"], "text")
    assert [f.path for f in found.files] == [f"{tmp_path}/a.md", f"{tmp_path}/b/唐诗.txt"]
    assert found.ignored == {".png": 1, "hidden": 1}
    assert [item.text for item in read(tmp_path) if isinstance(item, RawText)] == ["prose", CHINESE]


def test_glob_file_and_uri_name_the_same_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    globbed = sources.listing([f"{tmp_path}/*.txt"], "text")
    assert [f.inside for f in globbed.files] == ["a.txt", "b.txt"]
    uri = sources.listing([f"file://{tmp_path}"], "text")
    assert [f.inside for f in uri.files] == ["a.txt", "b.txt", "c.md"]
    (tmp_path / "诗 二").mkdir()
    (tmp_path / "诗 二" / "d.txt").write_text("d")
    (chinese,) = sources.listing([f"file://{tmp_path}/诗 二/*.txt"], "text").files
    assert chinese.inside == "d.txt"
    single = sources.listing([f"{tmp_path}/a.txt"] * 2, "text")
    assert [f.path for f in single.files] == [f"{tmp_path}/a.txt"]


def test_remote_listing_goes_through_the_filesystem(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    base, local = str(tmp_path), fs.LocalFileSystem()
    everything = remote.list_filesystem("s3://bucket/x", "s3://bucket/x", local, base)
    assert [f.inside for f in everything.files] == ["b.txt", "deep/a.txt"]
    matching = remote.list_filesystem("s3://bucket/x/d*.txt", "s3://bucket/x", local, base)
    assert [f.path for f in matching.files] == ["s3://bucket/x/d*.txt/deep/a.txt"]
    with pytest.raises(SourceError, match="nothing at"):
        remote.list_filesystem("s3://bucket/y", "s3://bucket/y", local, f"{base}/absent")


def test_remote_file_is_read_through_its_root(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(CHINESE.encode()))
    size = (tmp_path / "a.txt.gz").stat().st_size
    remote = SourceFile("r", str(tmp_path / "a.txt.gz"), f"file://{tmp_path}", size, 1, "a.txt.gz")
    assert list(sources.read_texts(remote, 1000)) == [RawText(None, CHINESE, (0, 71))]
    (changed,) = sources.read_texts(replace(remote, size=size + 1), 1000)
    assert isinstance(changed, Reject) and "changed after it was listed" in changed.reason
    whole = pytest.raises(sources.Unreadable, match="changed while it was read")
    with whole, sources.open_binary(remote) as stream:
        stream.read(1)
        (tmp_path / "a.txt.gz").write_bytes(b"shorter")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("/nowhere/*.txt", "no file matches"),
        ("nonsense://bucket/key", "cannot be listed"),
        ("builtin:nothing", "the builtin ones are"),
        ("builtin:digits", "holds image documents"),
    ],
)
def test_source_that_is_not_there_is_refused(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        sources.listing([source], "text")


def test_folder_without_any_text_is_refused_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no text files"):
        sources.listing([str(tmp_path)], "text")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"only 1 \.png"):
        sources.listing([str(tmp_path)], "text")


def test_partitions_follow_from_the_listing_alone() -> None:
    files = [file(name, size) for name, size in zip("abcdef", [4, 5, 20, 1, 9, 0], strict=True)]
    parts = sources.partition(list(reversed(files)), 10)
    assert [[f.path for f in part] for part in parts] == [["a", "b"], ["c"], ["d", "e", "f"]]


def test_partition_holds_one_source_and_a_large_file_of_records_is_cut() -> None:
    def of(source: str, name: str, size: int) -> SourceFile:
        return SourceFile(f"{source}/{name}", f"/{name}", "", size, 0, name, source)

    files = [of("s", "a.txt", 4), of("t", "b.txt", 4), of("t", "c.jsonl", 25), of("t", "d.txt", 30)]
    parts = sources.partition([*files, of("t", "e.jsonl.gz", 25)], 10)
    assert [[(f.inside, f.span) for f in part] for part in parts] == [
        [("a.txt", None)],
        [("b.txt", None)],
        [("c.jsonl", (0, 8))],
        [("c.jsonl", (8, 16))],
        [("c.jsonl", (16, 25))],
        [("d.txt", None)],
        [("e.jsonl.gz", None)],
    ]


@pytest.mark.parametrize(
    ("megabytes", "most", "units"),
    [(1, 8, 1), (20, 8, 20), (100, 8, 64), (6400, 8, 800), (6400, 1, 6400)],
)
def test_a_small_corpus_is_cut_finer(megabytes: int, most: int, units: int) -> None:
    whole = SourceFile("a.jsonl", "/a.jsonl", "", megabytes << 20, 0, "a.jsonl")
    parts = sources.partition([whole], most << 20)
    assert len(parts) == units
    spans = [part[0].span or (0, whole.size) for part in parts]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_what_is_installed_is_a_corpus() -> None:
    docs = sources.listing(["builtin:package-docs"], "text")
    names = {Path(file.inside).name for file in docs.files}
    assert "METADATA" in names and not any(name.endswith((".py", ".so")) for name in names)
    (topics,) = sources.listing(["builtin:python-reference"], "text").files
    assert topics.size > 100_000


def test_summary_sees_sizes_and_times_but_not_where_a_builtin_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")

    def summary() -> dict[str, object]:
        return sources.summary([str(tmp_path)], sources.listing([str(tmp_path)], "text"))

    first = summary()
    assert first == summary()
    os.utime(path, ns=(1, 1))
    touched = summary()
    path.write_text("other")
    os.utime(path, ns=(1, 1))
    assert len({json.dumps(s) for s in (first, touched, summary())}) == 3
    builtin = sources.listing(["builtin:python-stdlib"], "text")
    assert len(builtin.files) > 100
    assert not any("site-packages" in f.inside for f in builtin.files)
    assert not any(f.inside.startswith("test/") for f in builtin.files)
    assert (
        "python"
        in sources.summary(["builtin:python-stdlib"], builtin)["builtin:python-stdlib"]["version"]
    )


def test_fifo_and_links_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    found = sources.listing([str(tmp_path)], "text")
    assert [f.inside for f in found.files] == ["good.txt"]
    reasons = {Path(r.file).name: r.reason for r in found.rejects}
    assert reasons.keys() == {"pipe.txt", "dangling.txt", "circle"}
    assert reasons["pipe.txt"] == "not a regular file"


def test_a_link_out_of_its_source_is_refused_and_others_are_followed(tmp_path: Path) -> None:
    (pile := tmp_path / "pile" / "书").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("of this machine")
    (tmp_path / "pile-2").mkdir()
    (tmp_path / "pile-2" / "b.txt").write_text("beside, and begins with the same name")
    (pile / "a.txt").write_text("good")
    (pile / "inside.txt").symlink_to(pile / "a.txt")
    (pile / "absolute.txt").symlink_to(tmp_path / "secret.txt")
    (pile / "relative.txt").symlink_to("../../pile-2/b.txt")
    (pile / "chain.txt").symlink_to(pile / "absolute.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "pile")
    out = {"absolute.txt", "relative.txt", "chain.txt"}
    for source in ("pile", "linked", "pile/书/*.txt", "linked/**/*.txt", "linked/*/*.txt"):
        found = sources.listing([f"{tmp_path}/{source}"], "text")
        assert [Path(f.inside).name for f in found.files] == ["a.txt", "inside.txt"], source
        assert {Path(reject.file).name for reject in found.rejects} == out
        assert all("leads out of its source: name its target" in r.reason for r in found.rejects)
    # What the cure says: the target, or a folder that holds both.
    assert len(sources.listing([f"{pile}/absolute.txt"], "text").files) == 1
    assert len(sources.listing([str(tmp_path)], "text").files) == 7


def test_a_pattern_does_not_leave_its_folder_through_a_linked_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("of this machine")
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "way").symlink_to(tmp_path / "elsewhere")
    found = sources.listing([f"{tmp_path}/pile/*/*.txt"], "text")
    assert not found.files and len(found.rejects) == 1
    assert len(sources.listing([f"{tmp_path}/pile/way/*.txt"], "text").files) == 1


def test_name_that_is_not_utf8_is_quarantined(tmp_path: Path) -> None:
    (tmp_path / "ok.txt").write_text("ok")
    with open(os.fsencode(tmp_path) + b"/bad-\xff.txt", "w") as stream:
        stream.write("x")
    found = sources.listing([str(tmp_path)], "text")
    assert [f.inside for f in found.files] == ["ok.txt"]
    assert [r.reason for r in found.rejects] == ["its name is not UTF-8"]
    found.rejects[0].file.encode()
