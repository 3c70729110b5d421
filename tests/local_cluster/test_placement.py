"""Real Ray Train: workers go to the nodes with the accelerator that a recipe asks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpora import counting_corpus
from tests.hunting import tiny
from tests.placed import SETTINGS

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]


def test_workers_are_where_the_accelerator_is(tmp_path: Path) -> None:
    """Though the other node has more room."""
    counting_corpus(tiny(tmp_path, *SETTINGS))
    command = [sys.executable, "-m", "tests.placed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["workers"] == [told["right"]] * 2
