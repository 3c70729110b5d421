"""Streaming into training: one node prepares, one trains, and the one that trains is hit."""

import json
import subprocess
import sys
from pathlib import Path

from cluster.journal import Journal
from cluster.storage import Store
from pipelines.data import live
from pipelines.training import ledger
from pipelines.training.checkpoint import read_history
from tests import streamed


def test_every_row_of_an_epoch_is_trained_on_at_least_once(tmp_path: Path) -> None:
    docs, root = tmp_path / "docs", tmp_path / "root"
    streamed.documents(docs)
    command = [sys.executable, "-m", "tests.streamed", str(root), str(docs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] == 1
    assert "each row of an epoch is trained on at least once" in done.stdout
    assert told["prepared"] and told["trains"] not in told["prepared"]

    finished = Store(str(root)).latest("checkpoint", streamed.NAME)
    assert finished is not None and finished.manifest.complete
    led = ledger.read(finished)
    assert sorted(set(led["step"].tolist())) == list(range(1, 61))
    count = streamed.partitions(streamed.config(str(root), str(docs)))
    whole = live.finished(led["epoch"], led["sample"])
    first = {piece.partition for piece in whole if piece.epoch == 0}
    seen = {live.Place.of(int(number)).partition for number in led["sample"]}
    assert count > 10 and first == seen
    history = read_history(finished)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert all(0 <= row["data_wait"] <= 1 for row in history)
    events = list(Journal(Store(str(root)), finished.manifest.detail["run"]).events())
    launches = [event.fields["step"] for event in events if event.name == "launch"]
    assert len(launches) == 2 and launches[0] == 0 < launches[1]

    corpus = Store(str(root)).latest("corpus", streamed.NAME)
    assert corpus is not None
    splits = corpus.manifest.detail["splits"]
    assert splits["train"]["rows"] == 0 < splits["heldout"]["rows"]
    assert not any(entry.path.startswith("train/") for entry in corpus.manifest.files)
