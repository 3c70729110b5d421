"""The whole way as users of a cluster go it: `ray start --head`, `ray job submit`, HTTP.

One head node serves all tests of this module. The first job trains and serves a tiny model of a
few folders of text; the tests then ask it, and submit again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from cluster import panels
from cluster.storage import Artifact, Store
from tests.checkout import checkout
from tests.ports import free_ports

PATIENCE = 600
"""Seconds for a job, which takes a minute or two of a machine that has nothing else to do."""
pytestmark = pytest.mark.timeout(PATIENCE + 60)
PACKAGES = ("cluster", "pipelines", "serving", "tune", "pyproject.toml", ".rayignore")
TOKEN = "b" * 64
TINY = """
name: tiny
family: causal_lm
data: {sources: [SOURCES], vocab_size: 400, sequence_length: 32, heldout_fraction: 0.1}
model: {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}
train:
  steps: 30
  global_batch: 8
  warmup_steps: 3
  learning_rate: 0.01
  checkpoint_every: 10
evaluate: {sample_tokens: 8, prompt: "the sun"}
"""
SENTENCES = (
    "the mirror follows the sun over the field",
    "定日镜跟随太阳，把光投向塔顶",
    "many mirrors throw their rays at one point",
    "塔里的盐熔化，夜里也能发电",
    "a cloud passes and the field waits",
)


@dataclass(frozen=True)
class Head:
    """A running head node and what was asked of it."""

    dashboard: str
    environment: dict[str, str]
    recipe: Path
    root: Path
    port: int

    def submit(self, tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of `up`, from a working tree; waits for the end."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
        command += ["--address", self.dashboard, "--working-dir", str(tree), "--"]
        command += ["python", "-m", "cluster.cli", "up", str(self.recipe), *arguments]
        command += [f"storage.root={self.root}", f"serve.port={self.port}", "serve.wait=false"]
        return subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def heliostat(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Our command on a laptop, in the first job's working tree."""
        tree = self.recipe.parent / "first"
        shutil.copy(self.recipe, tree)
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *words],
            cwd=tree,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.dashboard, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    base = tmp_path_factory.mktemp("head")
    sources = base / "sources"
    sources.mkdir()
    for number in range(60):
        lines = [SENTENCES[(number + k) % len(SENTENCES)] for k in range(12)]
        (sources / f"{number:03d}.txt").write_text(f"page {number}\n" + "\n".join(lines))
    recipe = base / "tiny.yaml"
    recipe.write_text(TINY.replace("SOURCES", str(sources)))

    short = tempfile.mkdtemp(prefix="hh-", dir="/tmp")
    dashboard, http, *rest = free_ports(7)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST"))
    }
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    names = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "ray-client-server-port")
    ports = {"dashboard-port": dashboard} | dict(zip(names, rest, strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--num-cpus=4", f"--temp-dir={short}", "--dashboard-host=127.0.0.1"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with (base / "head.log").open("w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(f"{url}/api/jobs/", node, base / "head.log")
        yield Head(url, environment, recipe, base / "root", http)
    finally:
        end(node)
        shutil.rmtree(short, ignore_errors=True)


def end(node: subprocess.Popen[bytes]) -> None:
    """At once: Ray's own way takes half a minute, for which nothing waits that is tested here."""
    if node.poll() is not None:
        return  # it ended by itself; its log says why
    family = psutil.Process(node.pid).children(recursive=True)
    for process in (node, *family):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()
    psutil.wait_procs(family, timeout=10)


def wait_for(address: str, node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    headers = {"Authorization": f"Bearer {TOKEN}"}
    while time.monotonic() < deadline:
        assert node.poll() is None, log.read_text()
        try:
            if httpx.get(address, headers=headers, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def prometheus(head: Head) -> Iterator[str]:
    """`heliostat monitor`, from before the first job on; empty where Prometheus is missing."""
    if shutil.which("prometheus") is None:
        yield ""
        return
    base = head.recipe.parent
    token, (port,) = base / "token", free_ports(1)
    token.write_text(TOKEN)
    token.chmod(0o600)
    words = ["monitor", f"--folder={base}/monitor", f"--prometheus-port={port}"]
    with (base / "monitor.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *words, f"--address={head.dashboard}"],
            env=head.environment | {"RAY_AUTH_TOKEN_PATH": str(token)},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/-/ready", process, base / "monitor.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (base / "monitor.log").read_text()


@pytest.fixture(scope="module")
def served(head: Head, prometheus: str) -> Artifact:
    """The first job: everything runs, and the model stays served after the job's end."""
    answer = head.submit(checkout(head.recipe.parent / "first", PACKAGES))
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    model = Store(str(head.root)).latest("model", "tiny")
    assert model is not None
    return model


def client(head: Head) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{head.port}/v1", api_key="none")


def test_the_cluster_is_closed_without_the_token(head: Head) -> None:
    assert httpx.get(f"{head.dashboard}/api/jobs/").status_code == 401


def test_the_job_leaves_every_artifact_behind(head: Head, served: Artifact) -> None:
    kinds = ("corpus", "checkpoint", "evaluation", "model")
    found = {kind: Store(str(head.root)).latest(kind, "tiny") for kind in kinds}
    assert all(found.values())
    for artifact in found.values():
        assert artifact is not None and artifact.manifest.complete
        artifact.verify()
    evaluation = found["evaluation"]
    assert evaluation is not None
    assert 0 < evaluation.manifest.metrics["bits_per_byte"] < 8


def test_greedy_answers_equal_generate_on_the_published_folder(
    head: Head, served: Artifact
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(served.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(served.path)
    for prompt in ("the mirror", "定日镜跟随", "page 7\n"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = client(head).completions.create(**asked)  # type: ignore[call-overload]
        assert answer.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)
        pieces = [
            chunk.choices[0].text
            for chunk in client(head).completions.create(stream=True, **asked)  # type: ignore[call-overload]
            if chunk.choices
        ]
        assert "".join(pieces) == answer.choices[0].text


def test_the_page_and_the_errors_are_served(head: Head, served: Artifact) -> None:
    base = f"http://127.0.0.1:{head.port}"
    assert httpx.get(f"{base}/health").status_code == 200
    page = httpx.get(base)
    assert page.status_code == 200 and "<html" in page.text.lower()
    assert [model.id for model in client(head).models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client(head).completions.create(model="nobody", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client(head).completions.create(model="tiny", prompt="x", max_tokens=-1)


def test_every_panel_has_data_from_a_real_run(
    head: Head, served: Artifact, prometheus: str
) -> None:
    """Training's figures from the first job, serving's from requests of now."""
    if not prometheus:
        pytest.skip("no prometheus on this machine: apt-get install prometheus")
    wanted = [query for board in panels.BOARDS for query in board.queries(gpu=False)]
    deadline = time.monotonic() + 90
    while wanted:
        assert time.monotonic() < deadline, f"no data: {wanted}"
        client(head).completions.create(model="tiny", prompt="the mirror " * 8, max_tokens=8)
        wanted = [(title, query) for title, query in wanted if not _has_data(prometheus, query)]
        time.sleep(1)


def _has_data(prometheus: str, query: str) -> bool:
    """Numbers within the last quarter of an hour."""
    asked = {"query": query, "start": time.time() - 900, "end": time.time(), "step": 5}
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=asked).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    return any(value != "NaN" for row in answer["data"]["result"] for _, value in row["values"])


def test_a_second_job_from_an_edited_tree_skips_every_stage(head: Head, served: Artifact) -> None:
    tree = checkout(head.recipe.parent / "second", PACKAGES)
    with (tree / "pipelines/pretrain.py").open("a") as module:
        module.write("\n# An edit that changes the code, not the config.\n")
    answer = head.submit(tree, "--json")
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    line = next(row for row in answer.stdout.splitlines() if row.startswith('{"status"'))
    summary = json.loads(line)
    status = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert status == {
        "prepare": "skipped",
        "pretrain": "skipped",
        "evaluate": "skipped",
        "publish": "skipped",
        "serve": "done",
    }
    assert summary["model"] == f"tiny@{served.version}"
    assert summary["url"] == f"http://127.0.0.1:{head.port}"


def test_a_changed_config_is_refused_inside_a_job_too(head: Head, served: Artifact) -> None:
    """Submitted from a laptop, where the command ends as its job does."""
    changes = ("train.learning_rate=0.02", f"storage.root={head.root}", "--name", "changed")
    answer = head.heliostat("submit", "up", "tiny.yaml", *changes)
    assert answer.returncode == 3, answer.stdout + answer.stderr
    assert "train.learning_rate: 0.01 -> 0.02" in answer.stdout
    assert Store(str(head.root)).latest("model", "tiny") == served
    assert "uploading" in answer.stdout and "job changed: python -m cluster.cli up" in answer.stdout
    assert "it failed after" in head.heliostat("why", "changed").stdout


def test_a_laptop_sees_its_jobs(head: Head, served: Artifact) -> None:
    listed = head.heliostat("jobs")
    assert listed.returncode == 0 and "succeeded" in listed.stdout, listed.stdout + listed.stderr
    assert "serve" in listed.stdout
    checked = head.heliostat("cluster", "check")
    assert checked.returncode == 0 and "401 without the token" in checked.stdout, checked.stderr
    unknown = head.heliostat("why", "nobody")
    assert unknown.returncode == 3 and "knows no job nobody" in unknown.stderr


def test_the_doctor_examines_the_cluster(head: Head, served: Artifact) -> None:
    told = head.heliostat("submit", "doctor", "tiny.yaml", f"storage.root={head.root}")
    lines = [line for line in told.stdout.splitlines() if line.startswith(("ok", "warn", "bad"))]
    assert told.returncode == 0, told.stdout + told.stderr
    subjects = [line.split()[1] for line in lines]
    for subject in ("dashboard:", "versions:", "clock:", "disk:", "storage:", "token:", "start:"):
        assert subject in subjects, told.stdout
    assert not any(line.startswith("bad") for line in lines)
