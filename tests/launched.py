"""A cluster that `ray up` has made of a lab's hosts, used from the laptop as its owner would."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.checkout import REPOSITORY, checkout
from tests.lab import STORE, Host, Lab
from tests.ports import free_port

TREE = ("cluster", "pipelines", "serving", "tune", "pyproject.toml", "constraints.txt", "README.md")
TREE += ("LICENSE", ".rayignore", ".gitignore")
LAUNCHER = "on-prem.yaml"
NODE_OPTIONS = "--num-cpus=1 --object-store-memory=150000000"
"""Of one CPU each, so that two workers are on two hosts."""
PORT = 8000
"""Of the service."""
RAYLET = "raylet/raylet "
"""In the command of Ray's daemon on each node."""
OLD_AUTOSCALER = {"RAY_UP_enable_autoscaler_v2": "0"}
SENTENCES = (
    "the mirror follows the sun over the field",
    "定日镜跟随太阳，把光投向塔顶",
    "many mirrors throw their rays at one point",
    "塔里的盐熔化，夜里也能发电",
    "a cloud passes and the field waits",
)
TINY = (
    f"data.sources=[{STORE}/sources]",
    f"storage.root={STORE}/root",
    "data.vocab_size=400",
    "data.sequence_length=32",
    "data.heldout_fraction=0.1",
    "model.hidden_size=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.intermediate_size=64",
    "train.workers=2",
    "train.global_batch=8",
    "train.warmup_steps=3",
    "evaluate.sample_tokens=8",
)
"""gpt-demo of a size that trains in seconds."""


@dataclass
class Launched:
    """A cluster, and the laptop that it was launched from."""

    lab: Lab
    tree: Path
    """The working tree on the laptop: what a checkout holds, and the launcher file."""
    url: str
    """The laptop's end of the tunnel to the dashboard."""

    @property
    def head(self) -> Host:
        return self.lab.hosts[0]

    @property
    def workers(self) -> Sequence[Host]:
        return self.lab.hosts[1:]

    @property
    def token(self) -> str:
        return (self.lab.laptop / ".ray/auth_token").read_text().strip()

    def environment(self) -> dict[str, str]:
        return self.lab.environment(
            RAY_AUTH_MODE="token", RAY_API_SERVER_ADDRESS=self.url, COLUMNS="200"
        )

    def command(self, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """A command on the laptop, in the working tree."""
        return subprocess.run(
            words,
            cwd=self.tree,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def heliostat(self, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return self.command(sys.executable, "-m", "cluster.cli", *words, timeout=timeout)

    def ask(self, path: str) -> Any:
        """The dashboard's answer to who has the token."""
        answer = httpx.get(
            self.url + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=20
        )
        answer.raise_for_status()
        return answer.json()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Of the dashboard's state API: `nodes`, `actors` and so on."""
        answer = self.ask(f"/api/v0/{kind}?detail=1&limit=1000")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def trained_on(self) -> set[str]:
        """Addresses of hosts that training workers were on."""
        nodes = {node["node_id"]: node["node_ip"] for node in self.alive()}
        actors = self.rows("actors")
        return {nodes[a["node_id"]] for a in actors if a["class_name"].endswith("RayTrainWorker")}

    def alive(self) -> list[dict[str, Any]]:
        """Nodes of the cluster; none while it does not answer."""
        try:
            return [row for row in self.rows("nodes") if row["state"] == "ALIVE"]
        except httpx.HTTPError:
            return []

    def answering(self, least: int, seconds: float = 180) -> list[Host]:
        """Hosts that answer for the service, once there are so many."""
        found: list[Host] = []

        def enough() -> bool:
            urls = {host: f"http://{host.address}:{PORT}/health" for host in self.lab.hosts}
            found[:] = [host for host, url in urls.items() if _status(url) == 200]
            return len(found) >= least

        wait_until(enough, seconds, lambda: f"only {[host.name for host in found]} answer")
        return found

    def stop_serving(self) -> None:
        ray(self, "exec", LAUNCHER, "~/heliostat-venv/bin/serve shutdown -y")

    def wait_for_nodes(self, count: int, seconds: float = 480) -> None:
        wait_until(lambda: len(self.alive()) == count, seconds, lambda: str(self.alive()))


def wait_until(
    done: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {why()}"
        time.sleep(0.3)


@contextmanager
def launched(lab: Lab, roles: Sequence[str] = (), *, brief: bool = False) -> Iterator[Launched]:
    """Build the wheel, make the token, `ray up`; `ray down` at the end.

    Args:
        roles: label `role` of each host; none without.
        brief: without the head's pages.

    Raises:
        AssertionError: if a host has a raylet left after `ray down`.
    """
    tree = _working_tree(lab, pages=not brief)
    _sources(lab.store / "sources")
    port = free_port()
    cluster = Launched(lab, tree, f"http://127.0.0.1:{port}")
    for host, role in zip_longest(lab.hosts, roles):
        label = f" --labels=role={role}" if role else ""
        (host.home / "heliostat-ray-options").write_text(NODE_OPTIONS + label)
    made = cluster.heliostat("cluster", "token")
    assert made.returncode == 0, made.stdout + made.stderr
    ray(cluster, "up", "-y", LAUNCHER)
    try:
        with _tunnel(cluster, port):
            yield cluster
    finally:
        ray(cluster, "down", "-y", LAUNCHER)
    # With hosts of one's own, Ray stops the head; the others end when they have missed it for a
    # minute (gcs_rpc_server_reconnect_timeout_s).
    wait_until(lambda: not _raylets(lab), 120, lambda: f"raylets are left: {_raylets(lab)}")


def _raylets(lab: Lab) -> dict[str, list[int]]:
    """Host -> pids, of hosts where Ray still runs."""
    found = {host.name: lab.processes(host, RAYLET) for host in lab.hosts}
    return {name: pids for name, pids in found.items() if pids}


def ray(cluster: Launched, *words: str, timeout: float = 600) -> str:
    """A `ray` command on the laptop; AssertionError with its output where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        cwd=cluster.tree,
        env=cluster.environment() | OLD_AUTOSCALER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"ray {' '.join(words)}:\n{done.stdout[-6000:]}"
    return done.stdout


def _working_tree(lab: Lab, *, pages: bool) -> Path:
    tree = checkout(lab.laptop / "heliostat", TREE)
    # The tools that build are there already, and no index is asked for them.
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    build.append("--no-index")
    subprocess.run([*build, "--wheel-dir", "dist", "."], cwd=tree, check=True, timeout=300)
    text = (REPOSITORY / "cluster/launchers" / LAUNCHER).read_text("utf-8")
    head, *workers = (host.address for host in lab.hosts)
    for old, new in (
        ("HEAD-ADDRESS", head),
        ("[WORKER-ADDRESS, WORKER-ADDRESS]", json.dumps(workers)),
        ("ssh_user: USER", "ssh_user: root"),
        ("~/.ssh/id_ed25519", str(lab.key)),
    ):
        assert old in text, old
        text = text.replace(old, new)
    if not pages:
        launcher = yaml.safe_load(text)
        starts = launcher["head_start_ray_commands"]
        launcher["head_start_ray_commands"] = [c for c in starts if "nohup" not in c]
        text = yaml.safe_dump(launcher)
    (tree / LAUNCHER).write_text(text, "utf-8")
    return tree


def _sources(folder: Path) -> None:
    folder.mkdir()
    for number in range(60):
        lines = [SENTENCES[(number + k) % len(SENTENCES)] for k in range(12)]
        (folder / f"{number:03d}.txt").write_text(f"page {number}\n" + "\n".join(lines))


@contextmanager
def _tunnel(cluster: Launched, port: int) -> Iterator[None]:
    """What `ray dashboard` opens, kept open through a head that is away for a while."""
    call = [*cluster.lab.ssh_command(), "-N", "-L", f"{port}:127.0.0.1:8265"]
    call.append(f"root@{cluster.head.address}")
    tunnel = subprocess.Popen(call, stdin=subprocess.DEVNULL, env=dict(os.environ))
    try:
        wait_until(lambda: _status(f"{cluster.url}/api/gcs_healthz") == 200, 120)
        yield
    finally:
        tunnel.terminate()
        tunnel.wait()


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0
