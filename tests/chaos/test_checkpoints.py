"""Every boundary of a save, and every step of a run at every ZeRO stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import gloo
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
