"""Jobs from a laptop: what is checked before they go, what is shown while they run."""

import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import jobs, progress, spending
from cluster.dashboard import Dashboard
from cluster.errors import ConfigError, UsageError
from cluster.hardware import price_per_device
from cluster.upload import LARGEST, measure
from tests.dashboards import dashboard

ROOT = "storage.root=/mnt/heliostat"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with things in it that stay at home."""
    for name, content in {
        ".gitignore": "secret.txt\nruns/\n",
        ".rayignore": "dist\n",
        "code.py": "x = 1\n",
        "secret.txt": "s" * 1000,
        "runs/log": "l" * 1000,
        "dist/a.whl": "w" * 1000,
        "数据/定日镜.txt": "光",
    }.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return tmp_path / "tree"


def order(
    tree: Path, *changes: str, verb: str = "up", recipe: str = "gpt-demo", **more: Any
) -> jobs.Order:
    return jobs.order(jobs.Wish(verb, recipe, [ROOT, *changes], **more), tree)


def test_ignored_files_stay_at_home(tree: Path) -> None:
    upload = measure(tree)
    sizes = {".gitignore": 17, ".rayignore": 5, "code.py": 6, "数据": 3}
    assert (upload.files, upload.size) == (4, sum(sizes.values()))
    assert upload.largest[0] == (".gitignore", 17)
    assert upload.line() == f"{tree}: 4 files, 31 bytes"


def test_what_ray_would_not_take_is_refused_with_what_is_large(tree: Path) -> None:
    with (tree / "weights.bin").open("wb") as stream:
        stream.truncate(LARGEST)
    with pytest.raises(UsageError, match=r"500.0 MiB that Ray takes.*weights.bin 500.0 MiB"):
        measure(tree)
    with pytest.raises(UsageError, match="is not a folder"):
        measure(tree / "code.py")


def test_a_job_runs_the_same_command_and_waits_for_nobody(tree: Path) -> None:
    wanted = order(tree, "train.steps=100", "evaluate.prompt=a b; rm -r /")
    words = shlex.split(wanted.command)
    assert words[:5] == ["python", "-m", "cluster.cli", "up", "gpt-demo"]
    assert words[5:] == [
        ROOT,
        "train.steps=100",
        "evaluate.prompt=a b; rm -r /",
        "serve.wait=false",
    ]
    assert jobs.NAME.fullmatch(wanted.name) and wanted.name.startswith("gpt-demo-up-")
    assert "serve.wait" not in order(tree, verb="pretrain").command
    assert "serve.wait" not in order(tree, verb="doctor").command
    part = order(tree, first="pretrain", last="publish", fresh=True).command
    assert " up gpt-demo --from pretrain --to publish --fresh storage" in part
    assert "serve.wait" not in part
    assert "serve.wait=true" in order(tree, "serve.wait=true", verb="serve").command.split()[-1]
    assert order(tree).name != order(tree).name


def test_a_recipe_file_travels_with_the_job(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "mine.yaml").write_text("name: mine\nfamily: causal_lm\ndata: {sources: [/x]}\n")
    monkeypatch.chdir(tree)
    assert " up mine.yaml " in order(Path("."), recipe="mine.yaml").command
    assert " up mine.yaml " in order(tree, recipe=str(tree / "mine.yaml")).command
    (tree.parent / "other.yaml").write_text(
        "name: mine\nfamily: causal_lm\ndata: {sources: [/x]}\n"
    )
    with pytest.raises(UsageError, match="outside of the working directory"):
        order(tree, recipe="../other.yaml")


def test_what_the_job_would_refuse_is_refused_here(tree: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean train.steps"):
        order(tree, "train.step=1")
    with pytest.raises(UsageError, match="no stage 'trian'"):
        order(tree, verb="trian")
    with pytest.raises(UsageError, match="runs is relative"):
        jobs.order(jobs.Wish("up", "gpt-demo", ["storage.root=runs"]), tree)
    with pytest.raises(UsageError, match="job name 'a b'"):
        order(tree, name="a b")
    with pytest.raises(UsageError, match="are of `up`, not of pretrain"):
        order(tree, verb="pretrain", last="publish")


def test_the_token_never_stands_in_a_command(tree: Path) -> None:
    (tree.parent / ".ray").mkdir()
    (tree.parent / ".ray/auth_token").write_text("d" * 64)
    with pytest.raises(UsageError, match="the token is among the arguments") as caught:
        order(tree, f"evaluate.prompt={'d' * 64}")
    assert "d" * 64 not in str(caught.value)


LOG = """\
Ray dashboard: http://127.0.0.1:8265
prepare: nothing made yet
prepare: 60/60 files, 300.0 files/s, 0 s left
pretrain: nothing made yet
pretrain: 30/750 steps, 4.0 steps/s, 180 s left loss 3.141  4,000 predictions/s  goodput 93%
"""


def test_a_log_says_how_far_a_job_is() -> None:
    stage, reading = jobs.position(LOG)
    assert stage == "pretrain" and reading is not None
    assert (reading.done, reading.total, reading.unit, reading.goodput) == (30, 750, "steps", "93%")
    assert jobs.position(LOG + "evaluate: nothing made yet\n") == ("evaluate", None)
    assert jobs.position("") == ("", None)


def test_what_a_bar_prints_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.Bar("pretrain", 750, "steps")
    for total in (750, 0):
        bar.total = total
        line = f"{bar.label}: {bar.describe(30, bar._began + 10)} loss 3.1  goodput 9%"
        reading = progress.read(line)
        assert reading is not None
        assert (reading.label, reading.done, reading.total) == ("pretrain", 30, total)
    assert progress.read("prepare: nothing made yet") is None
    assert progress.read("定日镜: 3/4") is None


def test_a_log_that_is_sent_again_is_shown_once() -> None:
    """As it is when the tunnel broke."""
    lines: list[str] = []
    shown = jobs.Shown(lines.append)
    shown.again()
    for piece in ("first\nsec", "ond\n定日"):
        shown.take(piece)
    shown.again()
    for piece in ("fi", "rst\nsecond\n定日镜\nla", "st"):
        shown.take(piece)
    shown.close()
    assert lines == ["first", "second", "定日镜", "last"]


def test_progress_in_a_log_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, width=120, soft_wrap=True)
    monkeypatch.setitem(progress._state, "console", terminal)
    shown = jobs.Shown()
    shown.take(LOG)
    bar = shown._bar
    shown.take("pretrain: 750/750 steps, 4.0 steps/s, 0 s left loss 2.718  goodput 95%\n")
    assert bar is not None and shown._bar is bar, "a stage has one bar, which grows"
    shown.take("evaluate: nothing made yet\n")
    assert shown._bar is None, "what is said next stands below a bar that is finished"
    shown.close()
    said = ANSI.sub("", drawn.getvalue())
    for line in ("prepare: nothing made yet", "pretrain: nothing made yet", "evaluate: nothing"):
        assert line in said
    # Bars in place of the lines that they were read from, up to the last word of each.
    assert "30/750 steps," not in said and "60/60 files," not in said
    last = [line for line in re.split(r"[\r\n]+", said) if line.startswith("pretrain ")][-1]
    assert "100%" in last and "loss 2.718" in last and "goodput 95%" in last


@dataclass(frozen=True)
class Status:
    value: str


@dataclass(frozen=True)
class Info:
    submission_id: str
    status: Status
    start_time: int
    end_time: int | None = None
    driver_exit_code: int | None = None
    job_id: str | None = None
    metadata: dict[str, str] | None = None


class Cluster:
    """A job API that knows two jobs."""

    def list_jobs(self) -> list[Info]:
        return [
            Info("newer", Status("RUNNING"), 100_000, job_id="0200"),
            Info("older", Status("FAILED"), 10_000, 75_000, 2, "0100", {"price": "2.5"}),
        ]

    def get_job_logs(self, name: str) -> str:
        if name == "older":
            raise RuntimeError("its node is gone")
        return LOG


def test_jobs_are_listed_with_their_place() -> None:
    older, newer = jobs.listing(Cluster(), now=160.0)
    assert (older.name, older.status, jobs.duration(older.age)) == ("older", "failed", "1 m 5 s")
    assert (newer.stage, newer.place, newer.goodput) == ("pretrain", "30/750 steps", "93%")
    assert jobs.duration(newer.age) == "1 m 0 s" and jobs.duration(7300) == "2 h 1 m"
    assert older.cost == newer.cost == ""


def actor(job: str, name: str, start: int, end: int, node: str, **has: float) -> dict[str, Any]:
    """As Ray's dashboard tells one; times in seconds."""
    return {
        "jobId": job,
        "className": name,
        "startTime": start * 1000,
        "endTime": end * 1000,
        "requiredResources": has,
        "address": {"nodeId": node},
    }


def test_cost_so_far_is_what_workers_held() -> None:
    """One hour of two GPUs that were lost and given again, and two workers on CPUs."""
    worker = "ray.train.v2._internal.execution.worker_group.worker.RayTrainWorker"
    actors = {
        "a": actor("0200", "RayTrainWorker", 1000, 2800, "n1", GPU=2, CPU=1),
        "b": actor("0200", "RayTrainWorker", 3000, 0, "n2", GPU=2, CPU=1),
        "c": actor("0200", "Controller", 900, 0, "n1", CPU=1),
        "d": actor("0200", "RayTrainWorker", 0, 0, "", GPU=2),  # it waits
        "e": actor("0100", worker, 1000, 4600, "n1", CPU=1),
        "f": actor("0100", "RayTrainWorker", 1000, 2800, "n1", CPU=1),
        "g": actor("0300", "Engine", 1000, 4600, "n3", GPU=1),
    }
    nodes = [
        {"node_id": "n1", "resources_total": {"GPU": 8, "accelerator_type:H100": 1}},
        {"node_id": "n2", "labels": {"ray.io/accelerator-type": "H100"}},
        {"node_id": "n3", "resources_total": {"GPU": 1}},
    ]
    answers = {
        "/logical/actors": {"data": {"actors": actors}},
        "/api/v0/nodes": {"data": {"result": {"result": nodes}}},
    }
    with dashboard(answers, None) as address:
        held = spending.gather(Dashboard(address, None), now=4800.0)
    hourly = price_per_device("H100")
    assert hourly is not None
    older, newer = jobs.listing(Cluster(), held, now=4800.0)
    assert newer.cost == f"{2 * hourly:.2f} USD"
    assert older.cost == f"{1.5 * 2.5:.2f} USD"
    of_engine = [part for part in held if part.job == "0300"]
    assert spending.dollars(of_engine, None) is None  # nobody knows which device that is
    assert spending.dollars(of_engine, 3.0) == pytest.approx(3.0)
    assert spending.dollars([part for part in held if part.job == "0100"], None) is None


def test_a_jobs_page_leads_to_its_dashboards(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(jobs.GRAFANA_VARIABLE, raising=False)
    link = "/d/heliostat-training?var-name=gpt-demo"
    told = order(tree, "registry.uri=http://127.0.0.1:5000").metadata
    assert told["dashboards"] == f"http://localhost:3000{link}"
    assert told["mlflow"] == "http://127.0.0.1:5000"
    monkeypatch.setenv(jobs.GRAFANA_VARIABLE, "https://grafana.example/")
    assert order(tree).metadata["dashboards"] == f"https://grafana.example{link}"
    assert "mlflow" not in order(tree).metadata


def test_a_price_travels_with_the_job(tree: Path) -> None:
    assert order(tree, price=1.25).metadata["price"] == "1.25"
    assert "price" not in order(tree).metadata


def test_a_jobs_exit_code_is_the_commands_own() -> None:
    older, newer = Cluster().list_jobs()[::-1]
    assert jobs._exit_code(older) == 2
    assert jobs._exit_code(Info("x", Status("FAILED"), 0)) == 1
    assert jobs._exit_code(Info("x", Status("SUCCEEDED"), 0, 1, 0)) == 0
