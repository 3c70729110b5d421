"""A rank that hangs is found, shown and replaced; the figures are on Prometheus meanwhile."""

import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from cluster.journal import Journal
from cluster.storage import Store
from pipelines import pretrain
from tests.corpora import counting_corpus
from tests.hunting import losses, tiny, training_workers

pytestmark = pytest.mark.usefixtures("ray_session")


class Stopper(threading.Thread):
    """SIGSTOP of one worker once the run has a checkpoint; keeps what Ray's exporter shows."""

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(daemon=True)
        self._commit = root / f"checkpoint/{name}@1/COMMIT"
        self.stopped, self.scraped = 0, ""

    def run(self) -> None:
        deadline = time.monotonic() + 200
        while not self._commit.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        victim = training_workers()[1]
        victim.send_signal(signal.SIGSTOP)
        self.stopped = victim.pid
        while "heliostat_train_goodput" not in self.scraped and time.monotonic() < deadline:
            self.scraped = scrape()
            time.sleep(1)


def scrape() -> str:
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


def test_a_hung_rank_is_found_shown_and_replaced(root: Path) -> None:
    config = tiny(root, "name=hung", "train.hang_seconds=5", "train.checkpoint_every=10")
    counting_corpus(config)
    stopper = Stopper(root, "hung")
    stopper.start()
    finished = pretrain.run(config).artifact
    stopper.join(60)

    assert finished is not None
    assert [step for step, _ in losses(finished)] == [float(n) for n in range(1, 41)]
    store = Store(str(root))
    events = list(Journal(store, finished.manifest.detail["run"]).events())
    assert [e.name for e in events] == ["launch", "hung_rank", "worker_lost", "launch"]
    hung = events[1].fields
    assert hung["pid"] == stopper.stopped
    stacks = (root / hung["stacks"]).read_text()
    assert "stopped" in stacks and "train" in stacks
    assert events[3].fields["step"] >= 10
    labels = [line for line in stopper.scraped.splitlines() if "heliostat_train_loss{" in line]
    assert labels and 'name="hung"' in labels[0] and finished.manifest.detail["run"] in labels[0]
