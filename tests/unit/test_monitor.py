"""What `heliostat monitor` writes: Prometheus' configuration, Grafana's, dashboards."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from cluster import cli, monitor, panels
from cluster.telemetry import GAUGES, PREFIX
from serving import seen
from tests.dashboards import dashboard

TOKEN = "d" * 64
plugins.register_default_plugins()  # what panels and queries of each type may have


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(TOKEN)
    (tmp_path / ".ray/auth_token").chmod(0o600)
    return tmp_path


def heliostat(*words: str) -> int:
    return cli._guarded(lambda: cli.app(list(words), standalone_mode=False))


def test_what_is_written_names_the_token_and_does_not_hold_it(home: Path) -> None:
    folder = home / "监视"
    address = ("--address", "http://127.0.0.1:8266")
    assert heliostat("monitor", "--only-write", "--folder", str(folder), *address) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert all(TOKEN not in path.read_text("utf-8") for path in files)
    read = yaml.safe_load((folder / "prometheus.yml").read_text("utf-8"))
    [discovery] = read["scrape_configs"][0]["http_sd_configs"]
    assert discovery["url"] == "http://127.0.0.1:8266/api/prometheus/sd"
    assert discovery["authorization"]["credentials_file"] == str(home / ".ray/auth_token")
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "config", str(folder / "prometheus.yml")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
    source = yaml.safe_load((folder / "provisioning/datasources/heliostat.yml").read_text())
    assert source["datasources"][0]["uid"] == panels.SOURCE


def test_a_token_of_the_environment_alone_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "e" * 64)
    assert heliostat("monitor", "--only-write", "--folder", str(home / "m")) == 3
    assert "RAY_AUTH_TOKEN_PATH" in " ".join(capsys.readouterr().err.split())
    assert not (home / "m").exists()


def test_without_prometheus_it_says_where_to_get_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert heliostat("monitor", "--folder", str(home / "m")) == 3
    assert "apt-get install prometheus" in " ".join(capsys.readouterr().err.split())


def test_a_prometheus_that_ends_is_told_with_its_last_words(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = home / "prometheus"
    program.write_text("#!/bin/sh\necho no room left\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    with dashboard({monitor.TARGETS: [{"targets": ["10.0.0.1:9"]}]}, TOKEN) as address:
        assert heliostat("monitor", "--folder", str(home / "m"), "--address", address) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "prometheus ended with 7" in told and "it last said: no room left" in told


@pytest.mark.parametrize("board", panels.BOARDS, ids=lambda board: board.uid)
def test_a_dashboard_is_what_grafana_reads(board: panels.Board) -> None:
    links = {"Ray": "http://127.0.0.1:8265", "MLflow": "http://127.0.0.1:5000"}
    drawn = json.loads(json.dumps(panels.grafana(board, links)))
    assert {"Ray", "MLflow"} <= {link["title"] for link in drawn["links"]}
    # Through the classes that Grafana generates from its own schema: a field that it does not know
    # would be lost on the way.
    read = Dashboard.from_json(json.loads(json.dumps(drawn)))
    again = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert lost(drawn, again) == []
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in drawn["panels"]]
    assert len(set(places)) == len(board.panels)
    assert all(x + panels.WIDTH <= 24 for x, _ in places)
    assert len({panel["id"] for panel in drawn["panels"]}) == len(board.panels)
    for panel in drawn["panels"]:
        assert all(target["datasource"]["uid"] == panels.SOURCE for target in panel["targets"])


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """Paths of what one tree has and the other has not, or otherwise."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            path
            for key, value in given.items()
            for path in (
                lost(value, kept[key], f"{where}.{key}") if key in kept else [f"{where}.{key}"]
            )
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [path for n, (a, b) in pairs for path in lost(a, b, f"{where}[{n}]")]
    return [] if given == kept else [where]


def test_a_misspelt_field_of_a_dashboard_would_be_found() -> None:
    drawn = panels.grafana(panels.TRAINING)
    drawn["panels"][0]["gridPos"]["hight"] = 1
    drawn["panels"][1]["titel"] = "x"
    drawn["panels"][2]["targets"][0]["expression"] = "up"
    read = Dashboard.from_json(json.loads(json.dumps(drawn)))
    again = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert lost(drawn, again) == [
        ".panels[0].gridPos.hight",
        ".panels[1].titel",
        ".panels[2].targets[0].expression",
    ]


def test_queries_ask_for_what_is_exported() -> None:
    """Names of our own metrics; those of Ray are seen on a real run."""
    counters = {f"{name}_total" for name in (*seen.COUNTERS, "heliostat_requests")}
    histograms = {"time_to_first_token_seconds", "time_per_output_token_seconds"}
    known = {PREFIX + key for key in GAUGES} | set(seen.GAUGES) | counters
    known |= {f"heliostat_{name}_bucket" for name in histograms}
    for board in panels.BOARDS:
        for title, query in board.queries():
            ours = re.findall(r"\bray_(heliostat_\w+)", query)
            assert set(ours) <= known, title
    shown = {key for key in GAUGES if any(PREFIX + key in q for _, q in panels.TRAINING.queries())}
    assert shown == set(GAUGES)
