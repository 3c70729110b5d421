"""What is wrong with a cluster, by what its nodes tell of themselves. Pure.

`heliostat doctor` prints each finding with its cure; `pretrain` asks for the quick ones first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warn", "bad"]
MOST_SKEW = 2.0
"""Seconds that clocks may differ: leases and journals compare times of different nodes, and the
lease of a live run would look a minute old (`lease.STALE_SECONDS`) at thirty times this."""
LEAST_DISK = 5 << 30
"""Bytes free where Ray spills objects and keeps logs; Ray itself stops at 5 % free."""
SLOWEST_STORAGE = 20e6
"""Bytes per second of one stream; a checkpoint of 1 GB takes 50 s at it."""
SLOWEST_REDUCE = 0.1e9
"""Bytes per second of an all-reduce's algorithm bandwidth; 1 Gbit/s Ethernet gives about this."""
SLOWEST_START = 60.0
"""Seconds to a first worker process; Ray Train gives a group of workers 60 s to start
(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S)."""
LEAST_FILES = 8192
"""Open files of a process; Ray's daemons hold a socket per worker and connection."""
DASHBOARD_PORT, SSH_PORT = 8265, 22
WORKER_PORTS = range(10002, 20000)
"""That Ray gives to workers and drivers (`ray start --min-worker-port`, `--max-worker-port`)."""
RAY_PROCESSES = (
    "raylet",
    "gcs_server",
    "ray::",
    "ray-dashboard",
    "/ray/",
    "ray.util.client.server",
)
SERVICE_PROCESSES = ("haproxy",)
OF_GPUS = frozenset({"driver", "NCCL"})
"""Versions of what a node without GPUs, such as a head that only leads, need not have."""


@dataclass(frozen=True)
class Port:
    """Something on a node that other machines can connect to, as far as the node knows."""

    number: int
    process: str


@dataclass(frozen=True)
class Node:
    """What one node told."""

    name: str
    """Its address, as people know it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What must be the same everywhere: Python, Ray, torch, CUDA, driver, NCCL, Heliostat."""
    skew: float = 0.0
    """Seconds that its clock is ahead of the driver's."""
    skew_error: float = 0.0
    """Seconds that the figure may be wrong by: half of the time that asking took."""
    disk_free: int | None = None
    disk_total: int | None = None
    files: int | None = None
    """Most open files of a process."""
    gpus: float = 0
    """As Ray counts them."""
    devices: int | None = None
    """As torch sees them; None where it was not asked."""
    write_rate: float | None = None
    """To the storage root, in bytes per second; None where it was not measured."""
    read_rate: float | None = None
    storage_error: str = ""
    ports: Sequence[Port] = ()
    token_mode: int | None = None
    """Mode of the token file; None where there is none."""
    token_given: bool = True
    """Whether this node's Ray runs with a token."""
    start_seconds: float | None = None
    """To the first answer of a new worker process."""


@dataclass(frozen=True)
class Reduce:
    """An all-reduce with a rank on each of some nodes."""

    backend: str
    """`nccl` between nodes with GPUs, `gloo` between all."""
    ranks: int
    rate: float
    """Bytes per second: size of the tensor over the time of one call."""
    error: str = ""


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    text: str
    cure: str = ""

    def line(self) -> str:
        return f"{self.level:<4} {self.subject}: {self.text}" + (
            f"; {self.cure}" if self.cure else ""
        )


def quick(nodes: Sequence[Node]) -> list[Finding]:
    """What can be told within a moment."""
    return [*_versions(nodes), *_each(nodes, _clock), *_each(nodes, _disk), *_each(nodes, _files)]


def full(
    nodes: Sequence[Node], reduce: Reduce | None, service_port: int, closed: Finding
) -> list[Finding]:
    """All of it.

    Args:
        reduce: None where there is only one node.
        service_port: the one port, besides SSH, that may be open to everyone.
        closed: whether the dashboard refuses who has no token.
    """
    found = [closed, *quick(nodes)]
    for check in (_devices, _storage, _token, lambda node: _ports(node, service_port), _start):
        found += _each(nodes, check)
    if reduce is not None:
        found.append(_reduce(reduce))
    return found


def worst(findings: Iterable[Finding]) -> Level:
    levels = {finding.level for finding in findings}
    return "bad" if "bad" in levels else "warn" if "warn" in levels else "ok"


def _each(
    nodes: Sequence[Node], check: Callable[[Node], Finding | None | Iterator[Finding]]
) -> list[Finding]:
    found: list[Finding] = []
    for node in nodes:
        answer = check(node)
        found += [answer] if isinstance(answer, Finding) else list(answer or ())
    return found


def _versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    """One line per thing that differs, or one that all is equal."""
    known = list(dict.fromkeys(key for node in nodes for key in node.versions))
    same = []
    for what in known:
        asked = [node for node in nodes if what not in OF_GPUS or what in node.versions]
        by_version: dict[str, list[str]] = {}
        for node in asked:
            by_version.setdefault(node.versions.get(what, "missing"), []).append(node.name)
        if len(by_version) > 1:
            told = ", ".join(f"{v} on {_named(names)}" for v, names in sorted(by_version.items()))
            yield Finding(
                "bad",
                "versions",
                f"{what} is {told}",
                "give all nodes one image or the same set-up commands, and start Ray again",
            )
        else:
            where = f" on {len(asked)} of them" if len(asked) < len(nodes) else ""
            same.append(f"{what} {next(iter(by_version))}{where}")
    if nodes and len(same) == len(known):
        yield Finding("ok", "versions", f"the same on {len(nodes)} node(s): {', '.join(same)}")


def _named(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _clock(node: Node) -> Finding:
    if abs(node.skew) - node.skew_error > MOST_SKEW:
        return Finding(
            "bad",
            "clock",
            f"{node.name} is {node.skew:+.1f} s from the driver, more than {MOST_SKEW:g} s",
            "run chrony or ntpd on it",
        )
    return Finding("ok", "clock", f"{node.name} {node.skew:+.2f} s (±{node.skew_error:.2f})")


def _disk(node: Node) -> Finding | None:
    if node.disk_free is None or node.disk_total is None:
        return None
    share = node.disk_free / max(1, node.disk_total)
    told = f"{node.name} has {node.disk_free / 2**30:.1f} GiB free ({share:.0%}) where Ray works"
    if node.disk_free < LEAST_DISK or share < 0.05:
        cure = "free some, or start Ray with --temp-dir on a larger disk (at least "
        return Finding("bad", "disk", told, f"{cure}{LEAST_DISK >> 30} GiB and 5 %)")
    return Finding("ok", "disk", told)


def _files(node: Node) -> Finding | None:
    if node.files is None or node.files >= LEAST_FILES:
        return None
    return Finding(
        "warn",
        "limits",
        f"{node.name} allows {node.files} open files",
        "`ulimit -n 65536` before `ray start`",
    )


def _devices(node: Node) -> Finding | None:
    if node.devices is None:
        return None
    if node.devices < node.gpus:
        return Finding(
            "bad",
            "devices",
            f"Ray counts {node.gpus:g} GPUs on {node.name} and torch sees {node.devices}",
            "install NVIDIA's driver and a CUDA build of torch there, see `nvidia-smi`",
        )
    if node.devices > node.gpus:
        return Finding(
            "warn",
            "devices",
            f"torch sees {node.devices} GPUs on {node.name} and Ray counts {node.gpus:g}",
            f"start Ray there with --num-gpus={node.devices}, or these stay idle",
        )
    return Finding("ok", "devices", f"{node.name} {node.devices} GPUs")


def _storage(node: Node) -> Finding | None:
    if node.storage_error:
        return Finding(
            "bad",
            "storage",
            f"{node.name} cannot use the storage root ({node.storage_error})",
            "mount it there at the same path, or give the node's role access to the bucket",
        )
    if node.write_rate is None or node.read_rate is None:
        return None
    told = f"{node.name} writes {node.write_rate / 1e6:.0f} MB/s, reads {node.read_rate / 1e6:.0f}"
    if min(node.write_rate, node.read_rate) < SLOWEST_STORAGE:
        return Finding(
            "warn",
            "storage",
            f"{told}, less than {SLOWEST_STORAGE / 1e6:.0f} MB/s",
            "checkpoints and data will wait: take storage in the same region or faster disks",
        )
    return Finding("ok", "storage", told)


def _token(node: Node) -> Finding:
    if not node.token_given:
        return Finding(
            "bad",
            "token",
            f"Ray on {node.name} runs without one",
            "start it with RAY_AUTH_MODE=token and the cluster's ~/.ray/auth_token",
        )
    if node.token_mode is not None and node.token_mode & 0o077:
        return Finding(
            "bad",
            "token",
            f"its file on {node.name} has mode {node.token_mode:04o}",
            "chmod 600 ~/.ray/auth_token",
        )
    return Finding("ok", "token", f"on, at {node.name}")


def _ports(node: Node, service: int) -> Iterator[Finding]:
    for port in sorted(node.ports, key=lambda port: port.number):
        if port.number == DASHBOARD_PORT:
            yield Finding(
                "bad",
                "ports",
                f"the dashboard on {node.name} listens to other machines",
                "start the head with --dashboard-host=127.0.0.1 and use `ray dashboard`",
            )
        elif not _allowed(port, service):
            yield Finding(
                "warn",
                "ports",
                f"{port.process or 'something'} on {node.name} listens on {port.number}, which is "
                f"neither SSH, the service ({service}) nor Ray's own",
                "close it, or see that the firewall does",
            )


def _allowed(port: Port, service: int) -> bool:
    if port.number in (SSH_PORT, service) or port.number in WORKER_PORTS:
        return True
    return any(name in port.process for name in (*RAY_PROCESSES, *SERVICE_PROCESSES))


def _start(node: Node) -> Finding | None:
    if node.start_seconds is None:
        return None
    told = f"a new worker process answers on {node.name} after {node.start_seconds:.1f} s"
    if node.start_seconds > SLOWEST_START:
        return Finding("warn", "start", told, "is its disk slow, or the machine overcommitted?")
    return Finding("ok", "start", told)


def _reduce(reduce: Reduce) -> Finding:
    which = "nodes with GPUs" if reduce.backend == "nccl" else "nodes"
    what = f"an all-reduce over {reduce.ranks} {which} ({reduce.backend})"
    if reduce.error:
        return Finding(
            "bad",
            "network",
            f"{what} failed: {reduce.error}",
            "open all ports between the nodes, and name the interface with GLOO_SOCKET_IFNAME "
            "or NCCL_SOCKET_IFNAME",
        )
    told = f"{what} moves {reduce.rate / 1e9:.2f} GB/s"
    if reduce.rate < SLOWEST_REDUCE:
        return Finding(
            "warn",
            "network",
            f"{told}, less than {SLOWEST_REDUCE / 1e9:g}",
            "gradients will wait: put the nodes into one placement group, use EFA or InfiniBand",
        )
    return Finding("ok", "network", told)
