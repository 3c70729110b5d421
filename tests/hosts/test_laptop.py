"""What the laptop's commands say of a real cluster: check, jobs, why, doctor."""

import re
import signal
import subprocess
import sys
import time

import pytest

from tests.lab import STORE
from tests.launched import TINY, Launched, wait_until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]
GREEDY = "import ray; ray.init(); ray.get(ray.remote(num_gpus=1)(lambda: 1).remote())"


@pytest.fixture(scope="module")
def cluster(three_hosts: Launched) -> Launched:
    return three_hosts


def test_the_cluster_is_closed(cluster: Launched) -> None:
    checked = cluster.heliostat("cluster", "check")
    assert checked.returncode == 0, checked.stderr
    assert "is closed: 401 without the token" in checked.stdout
    token = cluster.lab.laptop / ".ray/auth_token"
    right = token.read_text()
    token.write_text("e" * 64)
    try:
        checked = cluster.heliostat("cluster", "check")
    finally:
        token.write_text(right)
    assert checked.returncode == 1 and "is not the cluster's" in " ".join(checked.stderr.split())


def test_a_job_that_waits_for_ever_is_explained(cluster: Launched) -> None:
    name = f"greedy-{time.time_ns()}"
    sent = cluster.command(
        *("ray", "job", "submit", "--no-wait", "--submission-id", name, "--"),
        *("python", "-c", GREEDY),
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    said: list[str] = []

    def told() -> bool:
        asked = cluster.heliostat("why", name)
        assert asked.returncode == 0, asked.stderr
        said.append(asked.stdout.strip())
        return "GPU" in said[-1]

    try:
        wait_until(told, 120, lambda: str(said))
        assert "asks for 1 GPU, which no node has (nodes: 3x 1 CPU)" in said[-1]
        listed = cluster.heliostat("jobs")
        assert listed.returncode == 0 and "greedy" in listed.stdout and "running" in listed.stdout
    finally:
        cluster.command("ray", "job", "stop", name)
    assert "it was stopped" in cluster.heliostat("why", name).stdout


def job_number(cluster: Launched, name: str) -> str:
    """Ray's id of a submitted job's driver; empty until it has joined."""
    return next(
        str(info.get("job_id") or "")
        for info in cluster.ask("/api/jobs/")
        if info["submission_id"] == name
    )


def test_data_and_training_keep_to_the_nodes_of_their_labels(cluster: Launched) -> None:
    name = f"placed-{time.time_ns()}"
    done = cluster.heliostat(
        *("submit", "up", "gpt-demo", "name=placed", *TINY, "--to", "pretrain", "--name", name),
        *("train.steps=20", "prepare.labels={role: data}", "train.labels={role: train}"),
        "--price=3600",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    role = {node["node_id"]: node["labels"]["role"] for node in cluster.alive()}
    number = job_number(cluster, name)
    trained = [
        role[row["node_id"]]
        for row in cluster.rows("actors")
        if row["job_id"] == number and row["class_name"].endswith("RayTrainWorker")
    ]
    assert trained == ["train", "train"]
    prepared = {
        role[row["node_id"]]
        for row in cluster.rows("tasks")
        if row["job_id"] == number and "MapBatches" in row["name"]
    }
    assert prepared == {"data"}
    listed = cluster.heliostat("jobs")
    line = next(row for row in listed.stdout.splitlines() if name in row)
    # A dollar per second of a worker.
    spent = re.search(r"([\d,]+\.\d\d) USD", line)
    assert spent is not None and 2 < float(spent[1].replace(",", "")) < 1200, line


def test_no_half_of_a_group_is_held(cluster: Launched) -> None:
    """Three workers want the label that two nodes of one CPU have: they wait, and hold nothing."""
    name = f"large-{time.time_ns()}"
    sent = cluster.heliostat(
        *("submit", "up", "gpt-demo", "name=large", *TINY, "--to", "pretrain", "--name", name),
        *("--detach", "train.steps=20", "train.workers=3", "train.global_batch=9"),
        "train.labels={role: train}",
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    said: list[str] = []

    def told() -> bool:
        said.append(cluster.heliostat("why", name).stdout.strip())
        return "pending placement" in said[-1]

    try:
        wait_until(told, 180, lambda: str(said))
        assert "3 CPUs at once and the cluster has 2 CPUs in all with label role=train" in said[-1]
        # What a group holds is taken from the CPUs that are free.
        quick = f"free-{time.time_ns()}"
        asks = "ray.remote(num_cpus=1, label_selector={'role': 'train'})(lambda: 'free')"
        code = f"import ray; ray.init(); print(ray.get([{asks}.remote() for _ in range(2)]))"
        done = cluster.command(
            *("ray", "job", "submit", "--submission-id", quick, "--", "python", "-c"),
            code,
            timeout=120,
        )
        assert done.returncode == 0 and "['free', 'free']" in done.stdout, done.stdout
    finally:
        cluster.command("ray", "job", "stop", name)


def test_doctor_finds_what_is_wrong(cluster: Launched) -> None:
    """An open port and a token that others can read, on two hosts."""
    one, other = cluster.workers
    listener = "import socket, time; s = socket.create_server(('', 5432)); time.sleep(600)"
    cluster.lab.ssh(one, f'nohup python3.11 -c "{listener}" > /dev/null 2>&1 &')
    cluster.lab.ssh(other, "chmod 644 ~/.ray/auth_token")
    try:
        told = cluster.heliostat("submit", "doctor", "gpt-demo", f"storage.root={STORE}/root")
    finally:
        cluster.lab.ssh(other, "chmod 600 ~/.ray/auth_token")
        cluster.lab.kill(one, "create_server(('', 5432))")
    print(told.stdout)
    lines = told.stdout.splitlines()
    assert told.returncode == 1, told.stdout + told.stderr
    assert any("ok" in x and "401 without the token" in x for x in lines)
    assert any("versions: the same on 3 node(s)" in x for x in lines)
    assert any("warn" in x and f"{one.address} listens on 5432" in x for x in lines)
    assert any("bad" in x and f"{other.address} has mode 0644" in x for x in lines)
    assert any("network: an all-reduce over 3 nodes (gloo) moves" in x for x in lines)
    assert sum("storage:" in x and "MB/s" in x for x in lines) == 3


def test_ctrl_c_leaves_the_job_running(cluster: Launched) -> None:
    name = f"left-{time.time_ns()}"
    words = ["submit", "up", "gpt-demo", "name=left", *TINY, "--to", "prepare", "--name", name]
    following = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *words],
        cwd=cluster.tree,
        env=cluster.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    seen = []
    for line in following.stdout:
        seen.append(line)
        if "Ray dashboard:" in line:
            following.send_signal(signal.SIGINT)
            break
    seen.append(following.stdout.read())
    assert following.wait(60) == 0, "".join(seen)
    assert f"detached: job {name} goes on" in "".join(seen), "".join(seen)
    wait_until(lambda: "it is done" in cluster.heliostat("why", name).stdout, 180)
