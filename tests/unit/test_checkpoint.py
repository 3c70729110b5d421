"""Checkpoints through deaths, damage, full and slow storage, and rivals."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import lease
from cluster.errors import ArtifactError, StorageError, TrainingError
from cluster.holder import myself
from cluster.journal import Journal
from cluster.manifest import COMMIT, LOCK, MANIFEST
from cluster.storage import Artifact, Store
from pipelines import pretrain
from pipelines.training import checkpoint, ledger
from pipelines.training.checkpoint import newest
from pipelines.training.engine import World
from pipelines.training.sampler import Sample
from tests import fakes, gloo, saving
from tests.disks import small_disk
from tests.saving import NAME, RANKS, RUN


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power cut is played here, and thousands of syncs take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fallbacks(store: Store) -> list[dict[str, Any]]:
    return [e.fields for e in Journal(store, RUN).events() if e.name == "checkpoint_fallback"]


def test_a_death_at_a_boundary_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The chaos suite dies at every one."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.boundaries", str(tmp_path), "11"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert set(outcome["kinds"]) == {"open", "write", "sync", "rename", "remove"}
    assert outcome["found"].keys() == {"2", "3"}


# --- damage

FILES = [
    *(f"state/rank_{rank}.pt" for rank in range(RANKS)),
    *(f"ranks/{rank:05d}.json" for rank in range(RANKS)),
    "history.json",
    "ledger.json",
    MANIFEST,
    COMMIT,
]


def flip(file: Path, before: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def truncate(file: Path, before: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path, before: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path, before: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def lengthen(file: Path, before: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def delete(file: Path, before: Path) -> None:
    file.unlink()


def of_the_step_before(file: Path, before: Path) -> None:
    shutil.copyfile(before, file)


def unreadable(file: Path, before: Path) -> None:
    """Nothing that can be read is there; file modes do not keep root from reading."""
    file.unlink()
    file.mkdir()


DAMAGES = [flip, truncate, empty, zero, lengthen, delete, of_the_step_before, unreadable]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_seen_told_and_fallen_back_from(
    store: Store,
    file: str,
    damage: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = saving.save(store, 1), saving.save(store, 2)
    damage(Path(second.path) / file, Path(first.path) / file)
    for _ in range(2):
        assert newest(store, NAME, RUN) == first
    assert saving.check(first) == 1
    assert second.id in (told := capsys.readouterr().out)
    assert "falling back to the checkpoint before it" in told
    assert [fields["checkpoint"] for fields in fallbacks(store)] == [second.id]

    third = saving.save(store, 3)
    assert newest(store, NAME, RUN) == third and saving.check(third) == 3


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (2, 0)])
def test_files_of_two_ranks_are_not_taken_for_each_other(
    store: Store, one: int, other: int
) -> None:
    first, second = saving.save(store, 1), saving.save(store, 2)
    folder = Path(second.path) / "state"
    (folder / f"rank_{one}.pt").rename(folder / "aside")
    (folder / f"rank_{other}.pt").rename(folder / f"rank_{one}.pt")
    (folder / "aside").rename(folder / f"rank_{other}.pt")
    assert newest(store, NAME, RUN) == first


def test_a_whole_manifest_of_another_step_is_no_checkpoint(store: Store) -> None:
    first, second = saving.save(store, 1), saving.save(store, 2)
    for file in (MANIFEST, COMMIT):
        shutil.copyfile(Path(first.path) / file, Path(second.path) / file)
    assert newest(store, NAME, RUN) == first and checkpoint.last(store, NAME) == first
    assert checkpoint.of_run(store, NAME, RUN) == [first]
    # Whose it is cannot be told: it is neither swept away nor counted.
    assert saving.save(store, 3).version == 3


def damage_all(store: Store, file: str, damage: Callable[[Path, Path], None]) -> None:
    for artifact in store.versions("checkpoint", NAME):
        damage(Path(artifact.path) / file, Path())


@pytest.mark.parametrize("file", ["state/rank_1.pt", MANIFEST, COMMIT])
def test_a_run_without_a_whole_checkpoint_does_not_start_over_unasked(
    store: Store, file: str
) -> None:
    saving.save(store, 1)
    saving.save(store, 2)
    damage_all(store, file, flip)
    with pytest.raises(TrainingError, match=r"tiny@2: .*tiny@1: .* --fresh"):
        newest(store, NAME, RUN)
    # A new run, which --fresh begins, is not held up by what an old one left.
    assert newest(store, NAME, f"{NAME}-another") is None


def test_the_driver_sees_that_no_manifest_is_whole(tmp_path: Path) -> None:
    config = fakes.config("gpt-demo", f"name={NAME}", root=tmp_path)
    store = Store(str(tmp_path))
    saving.save(store, 1)
    damage_all(store, COMMIT, flip)
    with pytest.raises(TrainingError, match="--fresh"):
        pretrain.run(config)
    assert not (tmp_path / f"runs/{NAME}.lease").exists()


def test_an_unfinished_first_save_is_no_damage(store: Store) -> None:
    """Its process died between manifest and COMMIT: the run starts from the beginning."""
    saving.save(store, 1)
    damage_all(store, COMMIT, delete)
    assert newest(store, NAME, RUN) is None and checkpoint.last(store, NAME) is None


class Canary:
    """Pickled code: whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._path), "w"))


def test_a_file_that_no_manifest_lists_is_not_there_for_a_loader(
    store: Store, tmp_path: Path
) -> None:
    """DeepSpeed looks for files by pattern and unpickles what it finds."""
    made, canary = saving.save(store, 1), tmp_path / "canary"
    planted = Path(made.path) / "state/mp_rank_01_model_states.pt"
    planted.write_bytes(pickle.dumps(Canary(canary)))
    assert saving.check(made) == 1
    with made.local() as folder:
        assert not list(folder.rglob(planted.name))
    assert not canary.exists()
    pickle.loads(planted.read_bytes())
    assert canary.exists()


def test_a_corpus_that_changed_under_a_run_is_refused(store: Store) -> None:
    made = saving.save(store, 1)
    corpus = saving.lineage(store).parent
    checkpoint.check_parent(made, corpus)
    store.delete(corpus)
    other = fakes.commit(store, name=NAME, files={"a.bin": b"other content"})
    assert other.id == corpus.id
    with pytest.raises(ArtifactError, match="not the one that checkpoint/tiny@1 was trained on"):
        checkpoint.check_parent(made, other)


# --- what is kept


def test_the_newest_and_the_best_are_kept(store: Store) -> None:
    line = saving.lineage(store, keep=2, keep_best=1)
    losses = {1: 4.0, 2: 1.0, 3: 3.0, 4: 5.0, 5: 2.0}
    for step, loss in losses.items():
        staging = store.stage("checkpoint", NAME, run=RUN)
        staging.commit([], fingerprint="", config={}, detail={"run": RUN, "score": loss})
        checkpoint.retire(store, line)
        kept = {artifact.version for artifact in store.versions("checkpoint", NAME)}
        best = min(range(1, step + 1), key=losses.__getitem__)
        assert kept == {step, max(1, step - 1), best}


def test_the_score_is_of_the_steps_since_the_checkpoint_before() -> None:
    history = [{"step": float(n), "loss": float(n)} for n in range(1, 7)]
    assert checkpoint.score(history, 4) == 5.5
    history[1]["heldout_loss"] = 0.25
    assert checkpoint.score(history, 4) == 5.5 and checkpoint.score(history, 0) == 0.25
    assert checkpoint.score([{"step": 1.0, "loss": float("nan")}], 0) is None


def test_other_runs_keep_their_checkpoints(store: Store) -> None:
    mine = saving.save(store, 1)
    line = dataclasses.replace(saving.lineage(store, keep=1), run="another")
    saving.save(store, 2, line)
    saving.save(store, 3, line)
    assert mine in store.versions("checkpoint", NAME)


# --- ranks and storage


def test_nothing_commits_without_every_rank(store: Store) -> None:
    saved = saving.save(store, 1)
    staging = store.stage("checkpoint", NAME, run=RUN)
    for rank in (0, 1):
        saving.part(staging, rank, 2).write()
    with pytest.raises(StorageError, match="rank 2 did not write its part"):
        saving.part(staging, 0, 2).commit(timeout=0.2)
    assert newest(store, NAME, RUN) == saved


def test_parts_of_two_saves_are_not_mixed(store: Store) -> None:
    """A writer that was taken for dead and wakes up neither commits nor lends its part."""
    old = store.stage("checkpoint", NAME, run=RUN)
    new = store.stage("checkpoint", NAME, run=RUN)
    assert old.version == new.version and old.token != new.token
    for rank in range(RANKS):
        saving.part(new if rank else old, rank, 2).write()
    with pytest.raises(StorageError, match="the part of rank 0 is another save's"):
        saving.part(new, 0, 2).commit(timeout=1)
    saving.part(old, 1, 2).write()
    saving.part(old, 2, 2).write()
    with pytest.raises(StorageError, match="taken over by another writer"):
        saving.part(old, 0, 2).commit(timeout=1)
    assert newest(store, NAME, RUN) is None


def test_what_storage_gives_back_wrongly_is_not_committed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, usual = saving.save(store, 1), Store.write

    def rots(self: Store, path: str, produce: Any) -> Any:
        hashing = usual(self, path, produce)
        if path.endswith("rank_1.pt"):
            flip(Path(path), Path())
        return hashing

    monkeypatch.setattr(Store, "write", rots)
    with pytest.raises(StorageError, match=r"read back after writing: state/rank_1.pt is damaged"):
        saving.save(store, 2)
    assert newest(store, NAME, RUN) == saved


def test_weights_that_are_not_finite_are_not_committed(store: Store) -> None:
    saved = saving.save(store, 1)
    staging = store.stage("checkpoint", NAME, run=RUN)
    part = saving.part(staging, 1, 2)
    part.states["rank_1.pt"]["weights"][3] = float("inf")
    with pytest.raises(TrainingError, match="not finite"):
        part.write()
    assert newest(store, NAME, RUN) == saved


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small") as folder:
        yield folder


@pytest.mark.parametrize("work", [saving.on_a_full_disk, saving.on_a_read_only_disk])
def test_a_disk_that_takes_no_more_ends_the_run_by_name(
    small: Path, work: Callable[[World, str], list[str]]
) -> None:
    for errors in gloo.launch(2, work, str(small)):
        assert [re.findall("No space left|Read-only file", said) for said in errors] == [
            ["No space left"] if work is saving.on_a_full_disk else ["Read-only file"]
        ]


def test_one_ranks_storage_failure_is_every_ranks(tmp_path: Path) -> None:
    first, second = gloo.launch(2, saving.with_one_rank_failing, str(tmp_path))
    assert first == f"rank 1: {second}" and "cable pulled" in second
    assert saving.check(Store(str(tmp_path)).artifact("checkpoint", NAME, 1)) == 1


def test_a_slow_store_blocks_training_only_when_the_next_save_is_due(tmp_path: Path) -> None:
    for outcome in gloo.launch(2, saving.to_a_slow_store, str(tmp_path)):
        assert outcome == {"went on": True, "error": True, "waited": True}


# --- one run per name

HOLD = """
import sys
from cluster import lease
from cluster.storage import Store
with lease.held(Store(sys.argv[1]), "tiny"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(store: Store) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_of_a_name_is_refused(store: Store, holder: subprocess.Popen[str]) -> None:
    refused = pytest.raises(StorageError, match=f"being trained by process .*:{holder.pid}")
    with refused, lease.held(store, NAME):
        pytest.fail("held twice")
    with pytest.raises(StorageError, match="being trained"):
        pretrain.run(fakes.config("gpt-demo", f"name={NAME}", root=store.root))
    with lease.held(store, "another"):
        pass
    holder.communicate("\n")
    with lease.held(store, NAME):
        pass


def test_the_lease_of_a_killed_run_is_taken_over(
    store: Store, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    refused = pytest.raises(StorageError, match=str(os.getpid()))
    with lease.held(store, NAME), refused, lease.held(store, NAME):
        pytest.fail("held twice in one process")
    assert not Path(f"{store.base}/runs/{NAME}.lease").exists()


@pytest.mark.parametrize(("age", "refused"), [(5.0, True), (120.0, False)])
def test_another_host_lives_while_its_heart_beats(store: Store, age: float, refused: bool) -> None:
    path = Path(f"{store.base}/runs/{NAME}.lease")
    path.parent.mkdir(parents=True)
    left = {"holder": "elsewhere:17", "token": "t", "renewed": time.time() - age}
    path.write_text(json.dumps(left))
    if refused:
        with pytest.raises(StorageError, match="process elsewhere:17"), lease.held(store, NAME):
            pytest.fail("held twice")
    else:
        with lease.held(store, NAME):
            assert json.loads(path.read_text())["holder"] == myself()


def test_a_run_that_lost_its_lease_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    path = Path(f"{store.base}/runs/{NAME}.lease")
    other = {"holder": "elsewhere:17", "token": "t", "renewed": 0.0}
    ended = pytest.raises(StorageError, match="taken over by process elsewhere:17")
    with ended, lease.held(store, NAME):
        path.write_text(json.dumps(other))
        for _ in range(400):  # in pieces, as the stage waits: the interrupt comes between them
            time.sleep(0.05)
        pytest.fail("it went on")
    assert path.exists(), "the new owner keeps it"


# --- the ledger


def test_the_ledger_counts_what_a_committed_checkpoint_names(store: Store) -> None:
    for step in range(1, 5):
        made = saving.save(store, step)
    ledger.write(store, RUN, ledger.Stretch(4, 5, RANKS, "lost"), 0, {5: [Sample(0, 0)]})
    led = ledger.read(made)
    assert led["step"].tolist() == [step for step in range(1, 5) for _ in range(RANKS)]
    assert sorted(led["sample"].tolist()) == list(range(3, 15))
    assert ledger.faults(made, samples=100, global_batch=RANKS) == []


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ([0, 1, 2, 2, 3, 4], r"epoch 0: samples \[2\] more than once"),
        ([0, 1, 2, 3, 4], "5 samples instead of 6"),
        ([0, 1, 2, 3, 4, 5, 6], "samples instead of"),
    ],
)
def test_the_ledger_finds_what_is_wrong(store: Store, samples: list[int], says: str) -> None:
    line = saving.lineage(store)
    staging = store.stage("checkpoint", NAME, run=RUN)
    part = saving.part(staging, 0, 2, line, ranks=1)
    half = len(samples) // 2
    taken = {1: [Sample(0, n) for n in samples[:half]], 2: [Sample(0, n) for n in samples[half:]]}
    led = (ledger.Stretch(0, 2, 1, "s"),)
    progress = dataclasses.replace(part.progress, led=led)
    part = dataclasses.replace(part, taken=taken, progress=progress)
    part.write()
    made: Artifact = part.commit(timeout=1)
    assert [fault for fault in ledger.faults(made, 6, 3) if re.search(says, fault)]


def test_a_lock_names_its_run(store: Store) -> None:
    staging = store.stage("checkpoint", NAME, run=RUN)
    lines = Path(staging.path, LOCK).read_text().splitlines()
    assert lines == [myself(), staging.token, RUN]
