"""The token of a cluster, and whether it is asked for."""

import os
import stat
from pathlib import Path

import pytest

from cluster import cli
from cluster.access import check_closed, read_token
from cluster.dashboard import DEFAULT_ADDRESS, address_of
from cluster.errors import ClusterError
from tests.dashboards import dashboard

JOBS = {"/api/jobs/": [{"submission_id": "a"}]}
TOKEN = "c" * 64


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def heliostat(*words: str) -> int:
    return cli._guarded(lambda: cli.app(list(words), standalone_mode=False))


def test_the_token_is_made_once_and_never_printed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0)
    try:
        assert heliostat("cluster", "token") == 0
    finally:
        os.umask(before)
    path = home / ".ray/auth_token"
    token = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(token) == 64
    assert heliostat("cluster", "token") == 0
    out = capsys.readouterr().out
    assert path.read_text() == token and token not in out and "is there already" in out


def test_a_token_that_others_can_read_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / ".ray/auth_token"
    path.parent.mkdir()
    path.write_text(TOKEN)
    path.chmod(0o644)
    assert heliostat("cluster", "token") == 3
    assert f"chmod 600 {path}" in capsys.readouterr().err


def test_a_closed_cluster_passes(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text(f"{TOKEN}\n")
    with dashboard(JOBS, TOKEN) as address:
        assert check_closed(address) == 1
        assert heliostat("cluster", "check", "--address", address) == 0
    assert "401 without the token, 1 jobs with it" in capsys.readouterr().out


def test_an_open_cluster_fails_with_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    with dashboard(JOBS, None) as address:
        assert heliostat("cluster", "check", "--address", address) == 1
    err = capsys.readouterr().err
    assert "answers 200 to who has no token" in err and "RAY_AUTH_MODE=token" in err
    assert err.count("\n") == 1


def test_another_clusters_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard(JOBS, TOKEN) as address:
        with pytest.raises(ClusterError, match="there is no token here"):
            check_closed(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
        with pytest.raises(ClusterError, match="answers 403 to the token that is here"):
            check_closed(address)


def test_no_cluster_is_one_line_with_the_cure() -> None:
    with dashboard({}, None) as address:
        pass
    with pytest.raises(ClusterError, match="open the tunnel with `ray dashboard"):
        check_closed(address)


def test_something_else_that_answers_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard({}, None) as address, pytest.raises(ClusterError, match="answers 404"):
        check_closed(address)


def test_the_token_comes_from_where_ray_looks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token() is None
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("from home\n")
    assert read_token() == "from home"
    (home / "mine").write_text("from path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "~/mine")
    assert read_token() == "from path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from environment")
    assert read_token() == "from environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token() is None


def test_the_address_comes_from_where_ray_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "http://h:1")
    assert address_of(None) == "http://h:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "h:2/")
    assert address_of(None) == "http://h:2"
    assert address_of("https://h:3") == "https://h:3"
