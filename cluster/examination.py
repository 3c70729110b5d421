"""What a node tells of itself, as Ray tasks that run there. No torch unless all is asked."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.access import read_token, token_path
from cluster.findings import Node, Port, Reduce
from cluster.storage import Store
from cluster.version import code_version

PROBE_BYTES = 16 << 20
REDUCE_BYTES = 16 << 20
REDUCE_TIMES = 5
PATIENCE = 120.0
DISTRIBUTIONS = ("ray", "torch", "deepspeed", "transformers")
DRIVER = Path("/proc/driver/nvidia/version")
Row = Mapping[str, Any]
"""Of `ray.nodes()`."""


def quick(name: str) -> Node:
    """In some milliseconds: from metadata and the system, importing nothing."""
    usage = shutil.disk_usage(_session_folder())
    return Node(
        name=name,
        versions={
            "Python": platform.python_version(),
            "Heliostat": code_version(),
            **{what: _installed(what) for what in DISTRIBUTIONS},
            **_driver(),
        },
        disk_free=usage.free,
        disk_total=usage.total,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def full(name: str, root: str, gpus: float) -> Node:
    """Seconds: imports torch, reads and writes the storage root, lists open ports."""
    import torch

    node = quick(name)
    cuda = {"CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        cuda["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    path = token_path()
    return replace(
        node,
        versions={**node.versions, **cuda},
        gpus=gpus,
        devices=torch.cuda.device_count(),
        ports=tuple(_open_ports()),
        token_mode=stat.S_IMODE(path.stat().st_mode) if path.exists() else None,
        token_given=os.environ.get("RAY_AUTH_MODE") != "disabled" and read_token() is not None,
        **_storage(root),
    )


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _driver() -> dict[str, str]:
    """NVIDIA's, where there is one."""
    if not DRIVER.exists():
        return {}
    found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", DRIVER.read_text(encoding="ascii"))
    return {"driver": found[1] if found else "unknown"}


def _session_folder() -> str:
    """Where Ray spills objects on this node."""
    import ray

    return str(ray._private.worker._global_node.get_session_dir_path())


def _storage(root: str) -> dict[str, Any]:
    """Rates of one stream, with bytes that do not compress."""
    content = os.urandom(PROBE_BYTES)
    try:
        store = Store(root)
        path = f"{store.base}/.probe-{uuid.uuid4().hex}"
        began = time.perf_counter()
        store.write(path, lambda stream: stream.write(content))
        written = time.perf_counter()
        try:
            same = store.read(path) == content
            read = time.perf_counter()
        finally:
            store.filesystem.delete_file(path)
    except Exception as error:  # of whatever kind a filesystem has: it is what is to be told
        return {"storage_error": " ".join(str(error).split())[:200]}
    if not same:
        return {"storage_error": "it gives back other bytes than were written"}
    size = float(PROBE_BYTES)
    return {"write_rate": size / (written - began), "read_rate": size / (read - written)}


def _open_ports() -> Iterator[Port]:
    """TCP ports that listen beyond loopback, each once."""
    import psutil

    seen: set[int] = set()
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.laddr.port in seen:
            continue
        if connection.laddr.ip.startswith("127.") or connection.laddr.ip == "::1":
            continue
        seen.add(connection.laddr.port)
        yield Port(connection.laddr.port, _process(connection.pid))


def _process(pid: int | None) -> str:
    import psutil

    try:
        process = psutil.Process(pid) if pid else None
        return " ".join([process.name(), *process.cmdline()])[:200] if process else ""
    except psutil.Error:
        return ""


class Nodes:
    """The live nodes of a joined cluster, asked from the driver."""

    def __init__(self, rows: Sequence[Row] | None = None) -> None:
        import ray

        alive = [row for row in (ray.nodes() if rows is None else rows) if row["Alive"]]
        self._rows = sorted(alive, key=lambda row: str(row["NodeManagerAddress"]))

    def quick(self) -> list[Node]:
        """Asks all nodes at once; their clocks against the driver's by the middle of the way."""
        import ray

        asked = [self._on(row, quick).remote(self._name(row)) for row in self._rows]
        nodes = [ray.get(answer, timeout=PATIENCE) for answer in asked]
        return [self._with_clock(row, node) for row, node in zip(self._rows, nodes, strict=True)]

    def full(self, root: str) -> list[Node]:
        import ray

        asked = [
            self._on(row, full).remote(self._name(row), root, row["Resources"].get("GPU", 0))
            for row in self._rows
        ]
        nodes = [ray.get(answer, timeout=PATIENCE) for answer in asked]
        return [
            replace(self._with_clock(row, node), start_seconds=self._start(row))
            for row, node in zip(self._rows, nodes, strict=True)
        ]

    def reduce(self) -> Reduce | None:
        """With a rank on each node that `ranks_of` chooses; None where that is a single one."""
        import ray

        backend, rows = ranks_of(self._rows)
        if len(rows) < 2:
            return None
        ranks = [self._on(row, _rank, gpus=int(backend == "nccl")) for row in rows]
        address = ray.get(self._on(rows[0], _address).remote(), timeout=PATIENCE)
        answers = [
            rank.remote(backend, address, number, len(ranks)) for number, rank in enumerate(ranks)
        ]
        try:
            seconds = max(ray.get(answers, timeout=PATIENCE))
        except (ray.exceptions.RayError, TimeoutError) as error:
            for answer in answers:
                ray.cancel(answer, force=True)
            return Reduce(backend, len(ranks), 0.0, " ".join(str(error).split())[-200:])
        return Reduce(backend, len(ranks), REDUCE_BYTES / seconds)

    @staticmethod
    def _name(row: Row) -> str:
        return str(row["NodeManagerAddress"])

    @staticmethod
    def _on(row: Row, work: Any, *, gpus: int = 0, **options: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(row["NodeID"], soft=False)
        return ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=there)(
            work
        ).options(**options)

    def _with_clock(self, row: Row, node: Node) -> Node:
        import ray

        before = time.time()
        there = ray.get(self._on(row, _now).remote(), timeout=PATIENCE)
        after = time.time()
        return replace(node, skew=there - (before + after) / 2, skew_error=(after - before) / 2)

    def _start(self, row: Row) -> float:
        """Seconds to the answer of a process that no other task has used."""
        import ray

        fresh = {"env_vars": {"HELIOSTAT_DOCTOR": uuid.uuid4().hex}}
        began = time.monotonic()
        ray.get(self._on(row, _now, runtime_env=fresh).remote(), timeout=PATIENCE)
        return time.monotonic() - began


def ranks_of(rows: Sequence[Row]) -> tuple[str, Sequence[Row]]:
    """What gradients will travel by, and between which nodes: those with GPUs where there are
    several, since a head or a node for data takes no part in it, else all."""
    gpus = [row for row in rows if row["Resources"].get("GPU", 0) >= 1]
    return ("nccl", gpus) if len(gpus) > 1 else ("gloo", rows)


def _now() -> float:
    """Ray takes functions of Python only."""
    return time.time()


def _address() -> str:
    """Of this node, with a port that is free."""
    import socket

    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _rank(backend: str, address: str, rank: int, ranks: int) -> float:
    """Seconds of one all-reduce of `REDUCE_BYTES`, the fastest of some."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    try:
        device = "cuda" if backend == "nccl" else "cpu"
        tensor = torch.ones(REDUCE_BYTES // 4, device=device)
        taken = []
        for _ in range(REDUCE_TIMES):
            began = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()  # waits for the device
            taken.append(time.perf_counter() - began)
        return min(taken)
    finally:
        dist.destroy_process_group()
