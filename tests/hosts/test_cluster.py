"""Hosts as a user of a cluster has them: `ray up`, a job on two of them, HTTP at each, `ray down`.

One launch serves all tests of this folder.
"""

import json
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from cluster.storage import Artifact, Store
from tests.launched import PORT, TINY, Launched

# Most of the time is spent starting processes.
pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1200)]
JOB = ("train.steps=30", "train.checkpoint_every=10", "serve.wait=false", "serve.host=0.0.0.0")
UP = ("python", "-m", "cluster.cli", "up", "gpt-demo", *TINY, *JOB)


@pytest.fixture(scope="module")
def cluster(three_hosts: Launched) -> Launched:
    return three_hosts


def submit(cluster: Launched, *words: str) -> None:
    """`ray job submit` of a command, to its end."""
    done = cluster.command("ray", "job", "submit", "--working-dir", ".", "--", *words)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def checkpoint(cluster: Launched) -> Artifact:
    """From text to a trained model, as a job."""
    submit(cluster, *UP, "--to", "pretrain")
    made = Store(str(cluster.lab.store / "root")).latest("checkpoint", "gpt-demo")
    assert made is not None
    return made


@pytest.fixture(scope="module")
def key(cluster: Launched) -> str:
    """An API key: the service is to be open to the network."""
    made = cluster.heliostat("keys", "create", "smoke", f"storage.root={cluster.lab.store}/root")
    assert made.returncode == 0, made.stderr
    return made.stdout.split()[-1]


@pytest.fixture(scope="module")
def served(cluster: Launched, checkpoint: Artifact, key: str) -> Iterator[None]:
    """The rest of the way: the same job again, which skips what is done, with a replica for every
    host: Serve has its proxies beside replicas."""
    submit(cluster, *UP, f"serve.replicas={len(cluster.lab.hosts)}")
    assert Store(str(cluster.lab.store / "root")).latest("checkpoint", "gpt-demo") == checkpoint
    yield
    cluster.stop_serving()


def test_the_hosts_have_joined_and_are_closed(cluster: Launched) -> None:
    assert {node["node_ip"] for node in cluster.alive()} == {
        host.address for host in cluster.lab.hosts
    }
    assert httpx.get(f"{cluster.url}/api/jobs/").status_code == 401
    for host in cluster.lab.hosts:
        mode = cluster.lab.ssh(host, "stat -c %a ~/.ray/auth_token ~/.ray").split()
        assert mode == ["600", "700"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{cluster.head.address}:8265/api/jobs/")


def test_training_ran_on_two_hosts(cluster: Launched, checkpoint: Artifact) -> None:
    assert checkpoint.manifest.complete
    assert checkpoint.manifest.detail["world_size"] == 2
    used = cluster.trained_on()
    assert len(used) == 2 and used <= {host.address for host in cluster.lab.hosts}


def test_the_head_shows_what_goes_on(cluster: Launched, checkpoint: Artifact) -> None:
    """Pages of MLflow and Prometheus, for who has come in by SSH."""

    def read(url: str) -> str:
        code = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{url}').read().decode())"
        return cluster.lab.ssh(cluster.head, f'~/heliostat-venv/bin/python -c "{code}"')

    assert read("5000/health").strip() == "OK"
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on this machine: apt-get install prometheus")
    targets = json.loads(read("9090/api/v1/targets"))["data"]["activeTargets"]
    up = {urlsplit(t["scrapeUrl"]).hostname for t in targets if t["health"] == "up"}
    assert up == {host.address for host in cluster.lab.hosts}, targets
    losses = json.loads(read("9090/api/v1/query?query=max_over_time(ray_heliostat_train_loss[1h])"))
    assert losses["data"]["result"], losses
    for port in (5000, 9090):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{cluster.head.address}:{port}/")


def test_code_came_with_the_job_and_the_wheel(cluster: Launched, checkpoint: Artifact) -> None:
    """No host sees the checkout: what is installed is the wheel, what ran is the job's copy."""
    copied = 0
    for host in cluster.lab.hosts:
        where = cluster.lab.ssh(
            host, "cd / && ~/heliostat-venv/bin/python -c 'import cluster; print(cluster.__file__)'"
        )
        assert "/heliostat-venv/" in where
        copies = "ls -d /tmp/ray/session_latest/runtime_resources/working_dir_files/*/cluster"
        copied += bool(cluster.lab.ssh(host, f"{copies} 2> /dev/null || true"))
    assert copied >= 2


def test_hosts_answer(cluster: Launched, key: str, served: None) -> None:
    """All, each at a proxy of its own."""
    for host in cluster.answering(len(cluster.lab.hosts)):
        client = openai.OpenAI(base_url=f"http://{host.address}:{PORT}/v1", api_key=key)
        answer = client.completions.create(model="gpt-demo", prompt="the mirror", max_tokens=8)
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        assert httpx.get(f"http://{host.address}:{PORT}/v1/models").status_code == 401
