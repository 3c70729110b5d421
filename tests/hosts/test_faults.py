"""What happens to hosts while a cluster works: each fault once, on three hosts of one CPU.

Training on two of three hosts ends as if nothing had happened, the service answers on, and after
the head's death one command brings the cluster back.
"""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

from cluster.journal import Journal
from cluster.storage import Artifact, Store
from tests.hunting import losses, weights_digest
from tests.lab import Host
from tests.launched import LAUNCHER, PORT, RAYLET, TINY, Launched, ray, wait_until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1800)]
EVERY = 40
TRAINING = ("train.steps=240", f"train.checkpoint_every={EVERY}", "train.max_failures=20")


@pytest.fixture(scope="module")
def cluster(three_hosts: Launched) -> Launched:
    return three_hosts


@pytest.fixture(scope="module")
def store(cluster: Launched) -> Store:
    return Store(str(cluster.lab.store / "root"))


class Job:
    """`heliostat submit` of a training run, on the laptop."""

    def __init__(self, cluster: Launched, name: str, *more: str) -> None:
        words = ["submit", "up", "gpt-demo", f"name={name}", *TINY, *TRAINING, *more]
        self.log = cluster.lab.laptop / f"{name}-{time.time_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *words],
                cwd=cluster.tree,
                env=cluster.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = 600) -> None:
        assert self.process.wait(seconds) == 0, self.log.read_text()[-4000:]


def step_of(store: Store, name: str) -> int:
    newest = store.latest("checkpoint", name)
    return int(newest.manifest.detail["step"]) if newest else 0


def finished(store: Store, name: str) -> Artifact:
    made = store.latest("checkpoint", name)
    assert made is not None and made.manifest.complete
    return made


@pytest.fixture(scope="module")
def calm(cluster: Launched, store: Store) -> Artifact:
    """The run that nothing happens to."""
    Job(cluster, "calm", "--to", "pretrain").wait()
    return finished(store, "calm")


def disturbed(cluster: Launched, store: Store, name: str, fault: Callable[[], None]) -> Artifact:
    """A run that something happens to once it has committed."""
    job = Job(cluster, name, "--to", "pretrain")
    wait_until(lambda: step_of(store, name) >= EVERY, 300, job.log.read_text)
    fault()
    job.wait()
    return finished(store, name)


def check_the_same(made: Artifact, calm: Artifact) -> None:
    assert losses(made) == losses(calm)
    assert weights_digest(made) == weights_digest(calm)


def training_host(cluster: Launched) -> Host:
    """A host, not the head, that a training worker runs on."""
    for host in cluster.workers:
        if cluster.lab.processes(host, "RayTrainWorker"):
            return host
    raise AssertionError("no training worker on any host but the head")


def test_a_killed_raylet_changes_nothing(cluster: Launched, store: Store, calm: Artifact) -> None:
    def fault() -> None:
        cluster.lab.kill(training_host(cluster), RAYLET)

    made = disturbed(cluster, store, "killed", fault)
    check_the_same(made, calm)
    events = [e.name for e in Journal(store, made.manifest.detail["run"]).events()]
    assert "worker_lost" in events, events
    # The autoscaler starts Ray there again.
    cluster.wait_for_nodes(3, 180)


def test_a_cut_network_changes_nothing(cluster: Launched, store: Store, calm: Artifact) -> None:
    def fault() -> None:
        host = training_host(cluster)
        cluster.lab.cut(host)
        time.sleep(20)
        cluster.lab.mend(host)

    check_the_same(disturbed(cluster, store, "cut", fault), calm)
    cluster.wait_for_nodes(3, 180)


class Load:
    """Clients that ask the hosts in turn, and the next one where one does not answer."""

    def __init__(self, urls: list[str], key: str) -> None:
        self._urls, self._key = urls, key
        self.answered, self.moved, self.failed = 0, list[str](), list[str]()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        body = {"model": "calm", "prompt": "the mirror", "max_tokens": 4}
        headers = {"Authorization": f"Bearer {self._key}"}
        while not self._end.is_set():
            said = []
            for url in self._urls[number:] + self._urls[:number]:
                try:
                    answer = httpx.post(
                        f"{url}/v1/completions", json=body, headers=headers, timeout=20
                    )
                    said.append(str(answer.status_code))
                except httpx.HTTPError as error:
                    said.append(type(error).__name__)
                if said[-1] == "200":
                    self.answered += 1
                    self.moved += said[:-1]
                    break
            else:
                self.failed.append(", ".join(said))


def test_a_lost_serve_node_is_not_noticed_by_who_asks_the_next(
    cluster: Launched, calm: Artifact
) -> None:
    made = cluster.heliostat("keys", "create", "load", f"storage.root={cluster.lab.store}/root")
    key = made.stdout.split()[-1]
    Job(cluster, "calm", "--from", "evaluate", "serve.host=0.0.0.0", "serve.replicas=2").wait()
    hosts = cluster.answering(2)
    victim = next(host for host in hosts if host != cluster.head)
    try:
        with Load([f"http://{host.address}:{PORT}" for host in hosts], key) as load:
            wait_until(lambda: load.answered > 20, 120)
            cluster.lab.kill(victim, RAYLET, "ray::", "haproxy", "ray/")
            before = load.answered
            wait_until(lambda: load.answered > before + 100, 180, lambda: str(load.failed[-5:]))
        print(f"{load.answered} answered, of them by another host: {Counter(load.moved)}")
        assert load.failed == [], f"{len(load.failed)} of {load.answered} failed: {load.failed[:5]}"
        cluster.wait_for_nodes(3, 180)
    finally:
        cluster.stop_serving()


def test_the_head_comes_back_with_one_command(
    cluster: Launched, store: Store, calm: Artifact
) -> None:
    job = Job(cluster, "headless", "--to", "pretrain")
    wait_until(lambda: step_of(store, "headless") >= EVERY, 300, job.log.read_text)
    cluster.lab.kill(cluster.head, "gcs_server", RAYLET, "ray::", "ray/", "cluster.cli")
    reached = step_of(store, "headless")
    job.process.kill()
    job.process.wait()

    ray(cluster, "up", "-y", "--restart-only", LAUNCHER)
    cluster.wait_for_nodes(3, 240)
    Job(cluster, "headless", "--to", "pretrain").wait()
    made = finished(store, "headless")
    check_the_same(made, calm)
    launches = [
        event.fields["step"]
        for event in Journal(store, made.manifest.detail["run"]).events()
        if event.name == "launch"
    ]
    # Nothing that was committed is done again, and no more than what was on its way is lost.
    assert launches[0] == 0 and launches[-1] >= reached >= EVERY, launches
