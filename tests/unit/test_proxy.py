"""Which proxy a Ray of our own starts with, and where its sockets lie."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from cluster import proxy
from cluster.config import ServeSection


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith(("RAY_SERVE", "RAY_worker")):
            monkeypatch.delenv(name)


def test_haproxy_is_on_unless_it_is_switched_off() -> None:
    on = proxy.environment(ServeSection())
    assert on["RAY_SERVE_ENABLE_HA_PROXY"] == on["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    off = proxy.environment(ServeSection(haproxy=False))
    assert not [name for name in off if "HAPROXY" in name or "HA_PROXY" in name]
    # Clients' headers are guarded whichever proxy there is.
    assert off["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "serving.border:middlewares"
    # As are calls from a model's threads: `generation.LAST` is the other end of the scale.
    assert on["RAY_worker_niceness"] == off["RAY_worker_niceness"] == "5"
    assert float(off["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"]) <= 1  # replicas that died are missed


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in proxy.environment(ServeSection())


def test_its_sockets_are_this_users_alone_and_their_paths_short() -> None:
    places = proxy.environment(ServeSection())
    folder = Path(places["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
    assert len(f"{folder}/{'0' * 56}/metrics.sock") <= 97


def test_somebody_elses_folder_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "x"
    elsewhere.mkdir()
    monkeypatch.setattr(proxy, "LONGEST_FOLDER", 4096)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / f"hs-{os.getuid()}").symlink_to(elsewhere)
    folder = Path(proxy.environment(ServeSection())["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
    assert folder.resolve() != elsewhere.resolve()
    folder.rmdir()


def test_haproxy_is_started_without_splicing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for it is given Serve's arguments and hands them on; never to itself."""
    command = proxy.environment(ServeSection())["RAY_SERVE_HAPROXY_BINARY_PATH"]
    asked = [command, "-vv"]
    told = subprocess.run(
        asked,
        env={**os.environ, "RAY_SERVE_HAPROXY_BINARY_PATH": command},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert told.stdout.startswith("HAProxy version")
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: ran.append(arguments))
    monkeypatch.setattr("sys.argv", ["heliostat-haproxy", "-f", "some.cfg"])
    proxy.haproxy()
    assert ran[0][1:] == ["-dS", "-f", "some.cfg"]
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in proxy.environment(ServeSection())
