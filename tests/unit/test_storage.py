"""Artifacts: what a reader sees through crashes, damage and rivals; the same on S3."""

import dataclasses
import hashlib
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import durable
from cluster.errors import ArtifactError, StorageError, StorageRootError
from cluster.manifest import COMMIT, LOCK, MANIFEST, SCHEMA_VERSION
from cluster.storage import Artifact, Manifest, Store
from tests.buckets import s3_server
from tests.fakes import commit

__all__ = ["s3_server"]

FILES = {"a.bin": b"alpha" * 100, "deep/er/b.bin": b"beta", "empty": b"", "中文.txt": "文".encode()}


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty root, on a disk and in a bucket."""
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    port = request.getfixturevalue("s3_server")
    bucket = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    opened = Store(
        f"s3://{bucket}/team/根 root?endpoint_override=127.0.0.1:{port}&scheme=http"
        "&region=us-east-1&allow_bucket_creation=true"
    )
    opened.check_writable()
    return opened


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def test_an_artifact_exists_from_commit_to_delete(store: Store) -> None:
    store.check_writable()
    assert store.latest("corpus", "demo") is None and store.versions("corpus", "demo") == []
    staging = store.stage("corpus", "demo")
    entries = [staging.write(path, content) for path, content in FILES.items()]
    assert store.versions("corpus", "demo") == [] and store.all("corpus") == []
    with pytest.raises(ArtifactError, match="corpus/demo@1 does not exist"):
        store.artifact("corpus", "demo", 1)

    made = staging.commit(entries, fingerprint="f", config={"seed": 1}, metrics={"loss": 0.5})
    found = store.artifact("corpus", "demo", 1)
    assert found.manifest == made.manifest
    assert [e.path for e in found.manifest.files] == sorted(FILES)
    assert {e.path: found.read_bytes(e.path) for e in found.manifest.files} == FILES
    found.verify()

    second = commit(store)
    assert [a.version for a in store.versions("corpus", "demo")] == [1, 2]
    assert store.latest("corpus", "demo") == second
    store.delete(second)
    assert store.latest("corpus", "demo") == found
    assert commit(store).version == 2


def test_local_gives_a_folder_of_verified_files(store: Store) -> None:
    artifact = commit(store, files=FILES)
    with artifact.local() as folder:
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert {p: (folder / p).read_bytes() for p in FILES} == FILES
        assert found - {MANIFEST, COMMIT} == set(FILES)
    with artifact.local("deep/") as folder:
        assert (folder / "er" / "b.bin").read_bytes() == b"beta"
    with pytest.raises(ArtifactError, match="no files below deeper/"), artifact.local("deeper/"):
        pass


def test_a_folder_is_copied_in(store: Store, tmp_path: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(content)
    staging = store.stage("model", "demo")
    artifact = staging.commit(staging.copy_tree(tmp_path / "in", "hf/"), fingerprint="f", config={})
    assert {e.path: artifact.read_bytes(e.path) for e in artifact.manifest.files} == {
        f"hf/{path}": content for path, content in FILES.items()
    }


def test_a_stream_is_hashed_on_its_way(store: Store) -> None:
    staging = store.stage("checkpoint", "demo")
    entry = staging.write_with("w.bin", lambda out: [out.write(b"ab"), out.write(b"c")])
    assert (entry.bytes, entry.sha256) == (3, hashlib.sha256(b"abc").hexdigest())
    assert staging.commit([entry], fingerprint="f", config={}).read_bytes("w.bin") == b"abc"


def test_what_an_interrupted_writer_left_is_swept(store: Store) -> None:
    store.stage("corpus", "demo").write("stale.bin", b"half")
    staging = store.stage("corpus", "demo")
    assert staging.version == 1
    staging.commit([staging.write("a.bin", b"x")], fingerprint="f", config={})
    assert store.read(f"{staging.path}/stale.bin") is None


def test_versions_count_committed_artifacts_only(store: Store) -> None:
    commit(store)
    abandoned = store.stage("corpus", "demo")
    abandoned.write("a.bin", b"x")
    abandoned.abandon()
    abandoned.abandon()
    assert [a.version for a in store.versions("corpus", "demo")] == [1]
    assert commit(store).version == 2
    assert commit(store, name="other").version == 1
    assert [a.id for a in store.all("corpus")] == [
        "corpus/demo@1",
        "corpus/demo@2",
        "corpus/other@1",
    ]


def test_a_name_is_not_taken_for_a_longer_one(store: Store) -> None:
    commit(store, name="demo-2")
    assert store.latest("corpus", "demo") is None


def overwrite(store: Store, path: str, content: bytes) -> None:
    with store.filesystem.open_output_stream(path) as stream:
        stream.write(content)


@pytest.mark.parametrize("file", [MANIFEST, COMMIT])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_without_a_valid_commit_it_does_not_exist(local: Store, file: str, damage: str) -> None:
    store = local
    first, second = commit(store), commit(store)
    path = f"{second.path}/{file}"
    raw = store.read(path) or b""
    if damage == "delete":
        store.filesystem.delete_file(path)
    else:
        wrong = {"truncate": raw[:-3], "flip": bytes([raw[0] ^ 1]) + raw[1:], "empty": b""}
        overwrite(store, path, wrong[damage])
    assert store.latest("corpus", "demo") == first
    assert [a.version for a in store.versions("corpus", "demo")] == [1]
    assert commit(store).version == 2


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (b"alphA" + b"alpha" * 99, "a.bin is damaged"),
        (b"alpha", "a.bin is damaged"),
        (b"", "a.bin is damaged"),
        (b"alpha" * 101, "a.bin is damaged"),
        (None, "a.bin is missing"),
    ],
)
def test_a_damaged_file_is_named(local: Store, damage: bytes | None, says: str) -> None:
    store = local
    artifact = commit(store, files=FILES)
    if damage is None:
        store.filesystem.delete_file(artifact.file("a.bin"))
    else:
        overwrite(store, artifact.file("a.bin"), damage)
    with pytest.raises(ArtifactError, match=f"corpus/demo@1: {says}"):
        artifact.verify()
    with pytest.raises(ArtifactError, match=says):
        artifact.read_bytes("a.bin")
    with pytest.raises(ArtifactError, match=says), artifact.local():
        pass
    # What is whole stays readable.
    assert artifact.read_bytes("deep/er/b.bin") == b"beta"
    with artifact.local("deep/") as folder:
        assert (folder / "er/b.bin").read_bytes() == b"beta"


def test_damage_in_a_bucket_is_seen(store: Store) -> None:
    artifact = commit(store, files={"a.bin": b"alpha", "b.bin": b"beta"})
    overwrite(store, artifact.file("a.bin"), b"alphb")
    store.filesystem.delete_file(artifact.file("b.bin"))
    with pytest.raises(ArtifactError, match="a.bin is damaged"), artifact.local():
        pass
    with pytest.raises(ArtifactError, match="b.bin is missing"):
        artifact.read_bytes("b.bin")
    store.filesystem.delete_file(f"{artifact.path}/{COMMIT}")
    assert store.latest("corpus", "demo") is None


def test_a_file_that_was_never_committed_is_not_read(store: Store) -> None:
    artifact = commit(store)
    overwrite(store, f"{artifact.path}/extra.bin", b"x")
    with pytest.raises(ArtifactError, match=r"has no file extra\.bin"):
        artifact.read_bytes("extra.bin")


OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "", ".", "./a", "a//b", "a/", "..", "a\0b"]
OURS = [MANIFEST, COMMIT, LOCK, f"./{COMMIT}", f"{COMMIT}/x"]


@pytest.mark.parametrize("path", OUTSIDE + OURS)
def test_paths_that_leave_the_artifact_are_refused(local: Store, path: str) -> None:
    staging = local.stage("corpus", "demo")
    with pytest.raises(ArtifactError, match="is not a path inside an artifact"):
        staging.write(path, b"x")
    artifact = staging.commit([staging.write("a", b"x")], fingerprint="f", config={})
    with pytest.raises(ArtifactError, match="is not a path inside an artifact"):
        artifact.file(path)


def forge(artifact: Artifact, **changes: Any) -> None:
    """Rewrite a manifest, with a COMMIT to match, as someone with access to storage could."""
    tree = json.loads(artifact.manifest.encode()) | changes
    raw = json.dumps(tree).encode()
    overwrite(artifact.store, f"{artifact.path}/{MANIFEST}", raw)
    overwrite(artifact.store, f"{artifact.path}/{COMMIT}", hashlib.sha256(raw).hexdigest().encode())


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", COMMIT])
def test_a_manifest_cannot_point_outside(local: Store, path: str) -> None:
    artifact = commit(local)
    forge(artifact, files=[{"path": path, "sha256": "0", "bytes": 1}])
    with pytest.raises(ArtifactError, match="is not a path inside an artifact"):
        local.artifact("corpus", "demo", 1)


def test_a_newer_format_says_so(local: Store) -> None:
    forge(commit(local), schema_version=SCHEMA_VERSION + 1, novelty=True)
    with pytest.raises(ArtifactError, match="update Heliostat"):
        local.latest("corpus", "demo")


@pytest.mark.parametrize("changes", [{"novelty": 1}, {"files": 5}, {"files": [{"path": "a"}]}])
def test_a_manifest_that_is_not_one_of_ours_says_so(local: Store, changes: dict[str, Any]) -> None:
    forge(commit(local), **changes)
    with pytest.raises(ArtifactError, match="not a manifest"):
        local.latest("corpus", "demo")


def test_a_renamed_directory_is_not_taken_for_another_artifact(local: Store) -> None:
    artifact = commit(local)
    Path(artifact.path).rename(Path(artifact.path).with_name("demo@2"))
    with pytest.raises(ArtifactError, match="copied or renamed by hand, it holds corpus/demo@1"):
        local.latest("corpus", "demo")


def test_a_manifest_survives_its_encoding(local: Store) -> None:
    made = commit(local, parents=[commit(local, name="先")], detail={"题": [1]}, complete=False)
    decoded = Manifest.decode(made.manifest.encode())
    assert decoded == made.manifest and decoded.parents == ("corpus/先@1",)


def test_delete_takes_the_commit_first(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that is cut short leaves an artifact that does not exist, not half a one."""
    artifact = commit(local)

    class Cut:
        def delete_file(self, path: str) -> None:
            Path(path).unlink()

        def delete_dir(self, path: str) -> None:
            raise OSError("connection lost")

    cut = Store(local.root)
    cut.__dict__["_opened"] = (Cut(), local.base)
    with pytest.raises(StorageError, match="cannot delete corpus/demo@1: connection lost"):
        cut.delete(artifact)
    assert Path(artifact.path).exists() and local.latest("corpus", "demo") is None
    with pytest.raises(StorageError, match="cannot delete"):
        local.delete(artifact)


HOLD = """
import sys
from cluster.storage import Store
store = Store(sys.argv[1])
staging = store.stage("corpus", "demo")
entry = staging.write("a.bin", b"theirs")
print("staged", flush=True)
sys.stdin.readline()
staging.commit([entry], fingerprint="f", config={})
print("committed", flush=True)
sys.stdin.readline()
"""


def test_a_second_live_writer_is_refused(local: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, local.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin and holder.stdout
    try:
        assert holder.stdout.readline() == "staged\n"
        with pytest.raises(StorageError, match=f"is being written by process .*:{holder.pid}"):
            local.stage("corpus", "demo")
        late = dataclasses.replace(commit(local, name="x"), store=local)  # another name is free
        assert late.version == 1
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "committed\n"
        # One that had counted versions before the commit must not sweep it away.
        from cluster.storage import Staging

        with pytest.raises(StorageError, match="just written by another run"):
            Staging(local, "corpus", "demo", 1).begin()
        assert local.stage("corpus", "demo").version == 2
    finally:
        holder.kill()
        holder.communicate()


def test_a_killed_writer_is_no_obstacle(local: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, local.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline() == "staged\n"
    holder.kill()
    holder.communicate()
    artifact = commit(local)
    assert artifact.version == 1 and artifact.read_bytes("a.bin") == b"content"


def test_a_failed_write_leaves_nothing(local: Store) -> None:
    staging = local.stage("corpus", "demo")

    def breaks(stream: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        staging.write_with("deep/a.bin", breaks)
    assert [p.name for p in Path(staging.path).rglob("*") if p.is_file()] == [LOCK]


def test_a_local_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with durable.durable(target) as stream:
        stream.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new" and list(target.parent.iterdir()) == [target]


def test_the_hash_counts_bytes_not_items() -> None:
    out = io.BytesIO()
    hashing = durable.Hashing(out)
    hashing.write(memoryview(b"abcdefgh").cast("I"))
    assert hashing.size == 8 == len(out.getvalue())


@pytest.mark.parametrize("root", ["/proc/heliostat", "FILE", "FILE/below", "a\0b"])
def test_a_root_that_cannot_be_written_is_named(tmp_path: Path, root: str) -> None:
    (tmp_path / "FILE").write_text("in the way")
    root = root.replace("FILE", str(tmp_path / "FILE"))
    with pytest.raises(StorageRootError, match="give another with storage.root=PATH"):
        Store(root).check_writable()


@pytest.mark.parametrize("root", ["ftp://host/path", "://"])
def test_a_root_that_is_no_filesystem_is_named(root: str) -> None:
    with pytest.raises(StorageRootError, match="storage.root"):
        Store(root).check_writable()


def test_a_bucket_that_does_not_exist_is_named(
    s3_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint may come from the environment, as the cloud's own tools take it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server}")
    with pytest.raises(StorageRootError, match="nosuchbucket"):
        Store("s3://nosuchbucket/root?region=us-east-1").check_writable()


def test_the_root_of_another_user_is_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert Store("~/heliostat").base == "/home/someone/heliostat"
    assert Store("~nobody-of-this-name/x").base.endswith("/~nobody-of-this-name/x")


def test_a_full_disk_commits_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.decode().strip()}")
    try:
        store = Store(str(small))
        before = commit(store)
        staging = store.stage("corpus", "demo")
        with pytest.raises(StorageError, match="No space left on device"):
            staging.write("big.bin", bytes(2 * 2**20))
        assert [p.name for p in Path(staging.path).iterdir()] == [LOCK]
        assert store.versions("corpus", "demo") == [before]
        before.verify()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_store_travels_as_its_address(store: Store, tmp_path: Path) -> None:
    artifact = commit(store, files={"a.bin": b"x"})
    raw = pickle.dumps(artifact)
    assert b"S3FileSystem" not in raw and b"LocalFileSystem" not in raw
    assert pickle.loads(raw).read_bytes("a.bin") == b"x"
    # The address of an artifact opens as a root of its own.
    assert Store(artifact.uri).read(f"{Store(artifact.uri).base}/a.bin") == b"x"
