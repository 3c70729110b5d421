"""`ray up` over SSH on two hosts of their own, and a job on both; skipped, with the reason, where
the machine makes no hosts. What else such a cluster is for is tested by `make test-hosts`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import lab
from tests.checkout import REPOSITORY
from tests.launched import Launched, launched, wait_until

pytestmark = pytest.mark.timeout(900)
SCRIPT = """
import json
import ray
from ray.util import placement_group

def where():
    import cluster.version
    return ray.util.get_node_ip_address(), cluster.__file__

ray.init()
group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
places = [
    ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, number)
    for number in range(2)
]
task = ray.remote(num_cpus=1)(where)
print("ON", json.dumps(ray.get([task.options(scheduling_strategy=p).remote() for p in places])))
"""


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
    with lab.lab(2) as hosts, launched(hosts, brief=True) as cluster:
        cluster.wait_for_nodes(2)
        yield cluster


def test_two_hosts_are_one_cluster_with_our_code_on_both(cluster: Launched) -> None:
    """The installed wheel, since the job brings no working directory; and no way in without the
    token."""
    sent = cluster.command("ray", "job", "submit", "--", "python", "-c", SCRIPT, timeout=240)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    line = next(row for row in sent.stdout.splitlines() if row.startswith("ON "))
    found = dict(json.loads(line.removeprefix("ON ")))
    assert found.keys() == {host.address for host in cluster.lab.hosts}
    assert all("/heliostat-venv/" in path for path in found.values())
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
