"""Damaged tables and pictures end no process and are never silent."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["arrow", "parquet", "picture"])
def test_no_damage_ends_the_process_that_reads(kind: str, seed: int) -> None:
    command = [sys.executable, "-m", "tests.damage", kind, str(seed), "400"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    # Numbers of the cases that were read, then what the last one said.
    assert ended.returncode == 0, f"damage {ended.stderr[-2000:]}"
    counts = json.loads(ended.stdout)
    assert counts["Reject"] > 100 and counts["good"] > 100
    assert ended.stderr.split() == [str(number) for number in range(400)], "shown on the terminal"
