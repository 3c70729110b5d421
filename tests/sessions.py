"""One real local Ray for all tests of a folder: own temporary folder, own ports, a token."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

# Set before anything imports ray: its configuration is read at import.
# Short, because Ray's unix sockets live below it and their paths are limited to 107 bytes.
_TEMPORARY = tempfile.mkdtemp(prefix="hs-", dir="/tmp")
os.environ["RAY_TMPDIR"] = _TEMPORARY
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "0" * 63 + "1"
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_DEDUP_LOGS"] = "0"
# Nobody should wait for Ray's ten seconds to see a figure.
os.environ["RAY_metrics_report_interval_ms"] = "2000"  # noqa: SIM112 (its name)
# Several sessions may run on a machine; and lines of a log that a test reads must be out at once.
for _name in ("STATS", "METRICS"):
    os.environ[f"RAY_SERVE_HAPROXY_{_name}_PORT"] = str(free_port())
os.environ["RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE"] = "1"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[object]:
    """A Ray of the test session's own with four CPUs on paper, whatever the machine has."""
    from cluster import loading
    from cluster.session import session

    config = loading.load("gpt-demo", ["ray.cpus=4"])
    with session(config) as joined:
        yield joined
    shutil.rmtree(_TEMPORARY, ignore_errors=True)


@pytest.fixture(scope="session")
def new_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database before its first entry: to make one takes it seconds."""
    from cluster import registry

    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    registry.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, new_registry: Path) -> Path:
    """A storage root of the test's own."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(new_registry, root)
    return root
