"""`ray up` over SSH on two hosts of their own, training on both, `ray down`; skipped, with the
reason, where the machine makes no hosts. What else such a cluster is for is tested by
`make test-hosts`.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.storage import Store
from tests import lab
from tests.checkout import REPOSITORY
from tests.launched import TINY, Launched, launched, wait_until

pytestmark = pytest.mark.timeout(900)
SHORT = ("train.steps=6", "train.checkpoint_every=6", "--to", "pretrain")
PYTHON = "cd / && ~/heliostat-venv/bin/python -c"
WHERE = f"{PYTHON} 'import cluster; print(cluster.__file__)'"
GROWS = f"{PYTHON} 'from cluster.autoscaling import growth; print(growth().nodes)'"
MAKE_ONE = """
import time
from tests.lab import lab

with lab(1) as made:
    print(made.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True, scope="module")
def _possible() -> None:
    if reason := lab.missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(_possible: None) -> Iterator[Launched]:
    """Which is taken down after the tests, and leaves no raylet on any host."""
    with lab.lab(2) as hosts, launched(hosts, brief=True) as cluster:
        cluster.wait_for_nodes(2)
        yield cluster


def test_two_hosts_train_one_model_with_the_code_of_the_wheel(cluster: Launched) -> None:
    """The job brings no working directory; and there is no way in without the token."""
    up = ("python", "-m", "cluster.cli", "up", "gpt-demo", *TINY, *SHORT)
    sent = cluster.command("ray", "job", "submit", "--", *up, timeout=240)
    assert sent.returncode == 0, sent.stdout[-4000:] + sent.stderr[-2000:]
    made = Store(str(cluster.lab.store / "root")).latest("checkpoint", "gpt-demo")
    assert made is not None and made.manifest.complete
    assert made.manifest.detail["world_size"] == 2
    assert cluster.trained_on() == {host.address for host in cluster.lab.hosts}
    assert all("/heliostat-venv/" in cluster.lab.ssh(host, WHERE) for host in cluster.lab.hosts)
    # `ray up` has left its file on the head, and nowhere else.
    assert [cluster.lab.ssh(host, GROWS).strip() for host in cluster.lab.hosts] == ["1", "0"]
    assert httpx.get(f"{cluster.url}/api/jobs/").status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{cluster.head.address}:8265/api/jobs/", trust_env=False)


def test_hosts_go_with_who_made_them() -> None:
    """A test that is killed leaves nothing of them on the machine."""
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKE_ONE], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    folder = Path(maker.stdout.readline().strip())
    try:
        assert len(lab.remains(folder)) == 3
    finally:
        maker.kill()
        maker.wait()
    wait_until(lambda: not lab.remains(folder), 30, lambda: str(lab.remains(folder)))
