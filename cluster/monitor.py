"""`heliostat monitor`: Prometheus, and Grafana with our dashboards, beside a running cluster.

Prometheus asks Ray's dashboard which nodes there are, so that nodes may come and go. Both listen on
loopback, where Ray's own dashboard looks for them on the head (`RAY_PROMETHEUS_HOST`,
`RAY_GRAFANA_HOST`).
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import panels, progress
from cluster.access import read_token, token_file
from cluster.dashboard import Dashboard
from cluster.durable import storage_errors
from cluster.errors import ClusterError, UsageError

TARGETS = "/api/prometheus/sd"
SCRAPE_SECONDS = 5
RAY_DASHBOARDS = Path("/tmp/ray/session_latest/metrics/grafana/dashboards")
"""Which the pages of Ray's dashboard show pictures of."""
LOOK_SECONDS = 0.5
END_SECONDS = 20
GRAFANA_INI = """\
[server]
http_addr = 127.0.0.1
http_port = {port}
[paths]
data = {folder}/grafana
provisioning = {folder}/provisioning
[security]
allow_embedding = true
disable_initial_admin_creation = true
[auth]
disable_login_form = true
[auth.anonymous]
enabled = true
org_role = Viewer
[analytics]
reporting_enabled = false
check_for_updates = false
"""


@dataclass(frozen=True)
class Place:
    """Where everything is."""

    folder: Path
    """Configuration, logs and what Prometheus keeps."""
    cluster: str
    """Address of Ray's dashboard."""
    prometheus_port: int = 9090
    grafana_port: int = 3000
    mlflow: str = "http://127.0.0.1:5000"
    """Address of the registry's page."""

    @property
    def links(self) -> dict[str, str]:
        """Title -> address of what a dashboard leads to."""
        return {"Ray": self.cluster, "MLflow": self.mlflow}

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self.prometheus_port}"

    @property
    def grafana(self) -> str:
        return f"http://127.0.0.1:{self.grafana_port}"


def run(place: Place, *, only_write: bool, patience: float = 0.0) -> None:
    """Write the configuration, start what is installed, stay until Ctrl-C or SIGTERM.

    Args:
        patience: seconds that the cluster may take to answer.

    Raises:
        UsageError: if Prometheus is not installed, or the token is in no file.
        StorageError: if the folder takes no files.
        ClusterError: if the cluster does not answer, or Prometheus ends.
    """
    token = read_token()
    with storage_errors(f"write {place.folder}"):
        write(place, token_file() if token is not None else None, RAY_DASHBOARDS)
    progress.say(f"{place.folder}: prometheus.yml, grafana.ini, dashboards")
    if only_write:
        return
    commands = _commands(place)
    nodes = _sources(Dashboard(place.cluster, token), patience)
    with _started(place, commands) as processes:
        told = sum(len(entry["targets"]) for entry in nodes)
        progress.say(f"Prometheus: {place.prometheus}, {told} sources of {place.cluster}")
        if "grafana" in commands:
            progress.say(f"Grafana: {place.grafana}/dashboards")
        else:
            progress.say("Grafana is not installed here (https://grafana.com/grafana/download)")
        _stay(place, processes)


def _sources(dashboard: Dashboard, patience: float) -> Any:
    deadline = time.monotonic() + patience
    while True:
        try:
            return dashboard.get(TARGETS)
        except ClusterError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(LOOK_SECONDS)


def write(place: Place, token: Path | None, ray_dashboards: Path) -> None:
    """All files, into the folder.

    Args:
        token: file that Prometheus reads it from; None for a cluster without one.
        ray_dashboards: folder of Ray's own; left out where it is not there.
    """
    folder = place.folder
    for name in ("provisioning/datasources", "provisioning/dashboards", "dashboards"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _dump(folder / "prometheus.yml", prometheus(place, token))
    _dump(folder / "provisioning/datasources/heliostat.yml", _source(place))
    folders = {"Heliostat": folder / "dashboards"}
    if ray_dashboards.is_dir():
        folders["Ray"] = ray_dashboards
    _dump(folder / "provisioning/dashboards/heliostat.yml", _providers(folders))
    (folder / "grafana.ini").write_text(
        GRAFANA_INI.format(port=place.grafana_port, folder=folder), "utf-8"
    )
    for board in panels.BOARDS:
        text = json.dumps(panels.grafana(board, place.links), indent=1)
        (folder / "dashboards" / f"{board.uid}.json").write_text(text + "\n", "utf-8")


def prometheus(place: Place, token: Path | None) -> dict[str, Any]:
    """Its configuration; the token stays in its own file."""
    discovery: dict[str, Any] = {"url": place.cluster + TARGETS, "refresh_interval": "10s"}
    if token is not None:
        discovery["authorization"] = {"type": "Bearer", "credentials_file": str(token)}
    return {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s"},
        "scrape_configs": [{"job_name": "heliostat", "http_sd_configs": [discovery]}],
    }


def _source(place: Place) -> dict[str, Any]:
    source = {"name": "Prometheus", "uid": panels.SOURCE, "type": "prometheus"}
    where = {"access": "proxy", "url": place.prometheus, "isDefault": True}
    how = {"jsonData": {"timeInterval": f"{SCRAPE_SECONDS}s"}}
    return {"apiVersion": 1, "datasources": [source | where | how]}


def _providers(folders: Mapping[str, Path]) -> dict[str, Any]:
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": str(path)}}
        for name, path in folders.items()
    ]
    return {"apiVersion": 1, "providers": providers}


def _dump(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), "utf-8")


def _commands(place: Place) -> dict[str, list[str]]:
    """Name -> command, of what is installed here."""
    program = shutil.which("prometheus")
    if program is None:
        raise UsageError(
            "no prometheus on this machine: apt-get install prometheus, or put the binary of "
            "https://prometheus.io/download on the PATH; --only-write writes the configuration for "
            "one that runs elsewhere"
        )
    folder = place.folder
    found = {
        "prometheus": [
            program,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/prometheus",
            f"--web.listen-address=127.0.0.1:{place.prometheus_port}",
        ]
    }
    # The package puts it where only the superuser's PATH looks.
    if grafana := shutil.which("grafana", path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        home = Path("/usr/share/grafana")  # of the packages; an unpacked archive has its own
        if not home.is_dir():
            home = Path(grafana).resolve().parents[1]
        found["grafana"] = [grafana, "server", "--homepath", str(home)]
        found["grafana"] += ["--config", f"{folder}/grafana.ini"]
    return found


@contextmanager
def _started(
    place: Place, commands: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The processes, which end with the block; SIGTERM ends it as Ctrl-C does."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (place.folder / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            _end(process)
        signal.signal(signal.SIGTERM, usual)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _stay(place: Place, processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Until Ctrl-C."""
    try:
        while True:
            for name, process in processes.items():
                if process.poll() is not None:
                    log = place.folder / f"{name}.log"
                    lines = log.read_text("utf-8", errors="replace").splitlines()
                    said = lines[-1] if lines else "nothing"
                    raise ClusterError(
                        f"{name} ended with {process.returncode}, see {log}; it last said: {said}"
                    )
            time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        progress.say("ended; what was measured stays in " + str(place.folder))
