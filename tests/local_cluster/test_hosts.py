"""`ray up` over SSH on two hosts of their own, and a job on both. All that such a cluster is for is
tested by `make test-hosts`, in half an hour; this by `make test-smoke`.
"""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests import lab
from tests.launched import Launched, launched

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Launched]:
    if reason := lab.missing():
        pytest.skip(reason)
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
        httpx.get(f"http://{cluster.head.address}:8265/api/jobs/")
