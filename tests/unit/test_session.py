"""What is decided around Ray before it starts: the token, the root, the room, the packages."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import session
from cluster.errors import CapacityError, StorageRootError
from cluster.session import Session, check_capacity, open_store
from tests import fakes

ROOT = Path(__file__).parents[2]
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", JOB):
        # `setenv` first, so that what the code sets is undone too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_the_token_is_made_for_its_owner_alone(home: Path) -> None:
    before = os.umask(0)
    try:
        session._ensure_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(path.read_text()) == 64 and list(path.parent.iterdir()) == [path]


def test_a_token_is_never_overwritten(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("mine")
    session._ensure_token()
    assert path.read_text() == "mine"


def test_two_starts_at_once_agree_on_one_token(home: Path) -> None:
    code = (
        "from cluster.session import _ensure_token; _ensure_token(); "
        "from pathlib import Path; print((Path.home() / '.ray' / 'auth_token').read_text())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert (home / ".ray" / "auth_token").read_text() in outputs[0] and len(set(outputs)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")],
)
def test_a_users_own_way_is_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    session._ensure_token()
    assert list(home.iterdir()) == [] and os.environ[name] == value


def test_a_relative_root_is_refused_inside_a_job(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    outside = open_store(fakes.config(root="runs/here"))
    assert outside.base == f"{home}/runs/here" and Path(outside.base).is_dir()
    monkeypatch.setenv(JOB, "{}")
    with pytest.raises(StorageRootError, match="runs/there is relative.*absolute path"):
        open_store(fakes.config(root="runs/there"))
    assert not (home / "runs/there").exists()
    assert open_store(fakes.config(root=home / "abs")).base == f"{home}/abs"
    assert open_store(fakes.config(root="~/store")).base == f"{home}/store"


def test_the_root_stays_the_same_from_another_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train moves its workers to other directories."""
    monkeypatch.chdir(home)
    store = open_store(fakes.config(root="runs"))
    monkeypatch.chdir("/")
    assert store.base == f"{home}/runs"


def test_a_root_that_cannot_be_written_is_refused(home: Path) -> None:
    (home / "file").write_text("")
    with pytest.raises(StorageRootError, match="cannot be written"):
        open_store(fakes.config(root=home / "file"))


def cluster(cpus: int, gpus: int = 0) -> Session:
    return Session(ours=False, dashboard="", cpus=cpus, gpus=gpus, nodes=("a",))


@pytest.mark.parametrize(
    ("joined", "workers", "threads", "says"),
    [
        (cluster(4), 4, 1, None),
        (cluster(4), 2, 2, None),
        (cluster(4), 5, 1, "need 5 CPUs and the cluster has 4: take train.workers=4"),
        (cluster(4), 2, 3, "need 6 CPUs and the cluster has 4: take train.workers=1"),
        (cluster(2), 1, 4, "take train.threads_per_worker=2"),
        (cluster(96, 8), 8, 4, None),
        (cluster(96, 8), 9, 1, "train.workers 9 needs as many GPUs and the cluster has 8"),
    ],
)
def test_more_than_the_cluster_holds_is_refused(
    joined: Session, workers: int, threads: int, says: str | None
) -> None:
    if says is None:
        check_capacity(joined, workers=workers, cpus_per_worker=threads)
        return
    with pytest.raises(CapacityError) as caught:
        check_capacity(joined, workers=workers, cpus_per_worker=threads)
    assert says in str(caught.value)


def test_an_autoscaled_cluster_counts_as_large_as_it_may_grow() -> None:
    """With no worker node up yet, it has no CPU at all."""
    assert session._reachable({"memory": 5.0}, {"CPU": 768, "GPU": 64}) == {
        "memory": 5.0,
        "CPU": 768,
        "GPU": 64,
    }
    assert session._reachable({"CPU": 8.0}, {"CPU": 4}) == {"CPU": 8.0}
    assert session._reachable({"CPU": 8.0}, {}) == {"CPU": 8.0}


def check_packages(*first_on_path: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, [*first_on_path, ROOT]))
    return subprocess.run(
        [sys.executable, "-P", "-c", "from cluster.session import _check_one_parent as f; f()"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_a_package_that_shadows_ours_is_named(tmp_path: Path) -> None:
    assert check_packages().returncode == 0
    (tmp_path / "tune").mkdir()
    # Without __init__.py it is only a folder of that name, and shadows nothing.
    assert check_packages(tmp_path).returncode == 0
    (tmp_path / "tune" / "__init__.py").touch()
    shadowed = check_packages(tmp_path)
    assert shadowed.returncode == 1
    assert f"come from different folders ({ROOT}, {tmp_path})" in shadowed.stderr or (
        f"come from different folders ({tmp_path}, {ROOT})" in shadowed.stderr
    )


def test_a_ray_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    """Unix sockets below a folder of so long a name cannot be made."""
    long = tmp_path / ("x" * 110)
    long.mkdir()
    command = [sys.executable, "-m", "cluster.cli", "prepare", "gpt-demo"]
    done = subprocess.run(
        [*command, f"storage.root={tmp_path}/root"],
        env=os.environ | {"RAY_TMPDIR": str(long), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("heliostat: Ray did not start on this machine (")
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stdout
