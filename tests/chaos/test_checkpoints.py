"""Every boundary of a save, every step of a run at every ZeRO stage, storage that fails a run."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import StorageError, TrainingError
from cluster.journal import Journal
from cluster.storage import Store
from pipelines import pretrain
from pipelines.data.corpus import Corpus
from pipelines.training import checkpoint, ledger
from tests import gloo
from tests.corpora import counting_corpus
from tests.disks import small_disk
from tests.hunting import Hunter, tiny
from tests.resuming import check_every_step


def test_a_death_at_every_boundary_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.boundaries", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    print(outcome)
    assert set(outcome["kinds"]) == {"open", "write", "sync", "rename", "remove"}
    assert sum(outcome["kinds"].values()) == sum(outcome["found"].values()) >= 50
    assert outcome["found"].keys() == {"2", "3"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_one_of_fifty_steps_can_be_resumed(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gloo, "TIMEOUT_SECONDS", 3000)
    check_every_step(tmp_path, stage=stage, steps=50)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small") as folder:
        yield folder


def fill(root: Path, name: str) -> None:
    """Leave no room for another checkpoint, and little for anything else, after the first one."""
    deadline = time.monotonic() + 240
    while not (root / f"checkpoint/{name}@1/COMMIT").exists():
        assert time.monotonic() < deadline, "the run never reached a checkpoint"
        time.sleep(0.02)
    state = sum(file.stat().st_size for file in (root / f"checkpoint/{name}@1").rglob("*.pt"))
    left = os.statvfs(root)
    (root / "filler").write_bytes(bytes(left.f_bavail * left.f_frsize - state // 2))


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_ends_a_run_at_once_and_the_same_command_continues(small: Path) -> None:
    overrides = ["name=full", "train.keep_checkpoints=99", "train.steps=200"]
    # Weights of 0.5 MB: of several megabytes of state, not all of ten saves fit.
    config = tiny(small, *overrides, "model.hidden_size=64", "train.checkpoint_every=20")
    counting_corpus(config)
    filling = threading.Thread(target=fill, args=(small, "full"))
    filling.start()
    with pytest.raises(StorageError, match="No space left on device"):
        pretrain.run(config)
    filling.join()
    store = Store(str(small))
    stopped = checkpoint.last(store, "full")
    assert stopped is not None
    run = stopped.manifest.detail["run"]
    assert checkpoint.newest(store, "full", run) == stopped
    assert [e.name for e in Journal(store, run).events()].count("launch") == 1, "no retry"

    (small / "filler").unlink()
    # One that is kept, one on its way: as many as the disk takes beside the corpus.
    frugal = tiny(
        small,
        *("name=full", "train.steps=200", "model.hidden_size=64"),
        *("train.checkpoint_every=20", "train.keep_checkpoints=1"),
    )
    finished = pretrain.run(frugal).artifact
    assert finished is not None and finished.manifest.detail["run"] == run


@pytest.mark.usefixtures("ray_session")
def test_damage_is_fallen_back_from_through_ray(root: Path) -> None:
    config = tiny(root, "name=damaged", "train.max_failures=0", "train.keep_checkpoints=9")
    corpus = counting_corpus(config)
    store = Store(str(root))
    # With two checkpoints there is one to fall back to.
    with (
        Hunter(store, "damaged", kills=1, after=5),
        pytest.raises(TrainingError, match="training failed"),
    ):
        pretrain.run(config)
    found = checkpoint.last(store, "damaged")
    assert found is not None
    for file in Path(found.path).rglob("*optim_states.pt"):
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    finished = pretrain.run(config).artifact
    assert finished is not None
    events = list(Journal(store, finished.manifest.detail["run"]).events())
    fallbacks = [e.fields["checkpoint"] for e in events if e.name == "checkpoint_fallback"]
    assert fallbacks == [found.id]
    assert ledger.faults(finished, Corpus(corpus).row_groups("train").starts[-1], 8) == []
