"""Work that one node does: where it fits, and how it is followed from the driver."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster import autoscaling
from cluster.config import RunConfig
from cluster.errors import HeliostatError
from cluster.session import joined_address

SETTLE_SECONDS = 5.0
"""Time that Ray gets to notice that the stage before has given its resources back."""
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Room:
    """What one task gets."""

    cpus: int
    gpus: int

    @property
    def device(self) -> str:
        """For torch."""
        return "cuda" if self.gpus else "cpu"


def roomiest(nodes: Iterable[Mapping[str, float]], *, gpu: bool) -> Room:
    """All CPUs of the largest node, or one GPU and a CPU to drive it where there is one.

    Args:
        nodes: resources of each node, by Ray's names.
        gpu: whether the work gains from one.
    """
    known = list(nodes)
    if gpu and any(node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1 for node in known):
        return Room(1, 1)
    return Room(max((int(node.get("CPU", 0)) for node in known), default=0), 0)


def within(wanted: Room, free: Mapping[str, float]) -> Room:
    """The room, cut to what nobody else holds: a served model may keep some for ever."""
    if wanted.gpus and free.get("GPU", 0) >= wanted.gpus:
        return wanted
    return Room(max(1, min(wanted.cpus, int(free.get("CPU", 0)))), 0)


def run_on_one_node(
    function: Callable[..., Any],
    *arguments: Any,
    gpu: bool = False,
    follow: Callable[[], None] = lambda: None,
) -> Any:
    """Call `function(room, *arguments)` in a Ray task and wait for its result.

    Args:
        follow: called while the task runs and once after it, to show how far it is.

    Raises:
        HeliostatError: what the task raised, or that its process was lost.
    """
    import ray

    room = _free_room(gpu=gpu)
    task = ray.remote(num_cpus=room.cpus, num_gpus=room.gpus, max_retries=1)(function)
    answer = task.remote(room, *arguments)
    while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
        follow()
    follow()
    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        raise HeliostatError(f"the process of {function.__name__} was lost: {reason}") from error


def live_resources() -> list[Mapping[str, float]]:
    """What each live node of the cluster has, by Ray's names."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def reachable_resources(config: RunConfig) -> list[Mapping[str, float]]:
    """The nodes that a run can have, those that the joined cluster's autoscaler may start included;
    a Ray of our own starts none."""
    may = autoscaling.growth() if joined_address(config) else autoscaling.Growth()
    return autoscaling.reachable(live_resources(), may)


def _free_room(*, gpu: bool) -> Room:
    import ray

    wanted = roomiest(live_resources(), gpu=gpu)
    deadline = time.monotonic() + SETTLE_SECONDS
    while (room := within(wanted, ray.available_resources())) != wanted:
        if time.monotonic() > deadline:
            return room
        time.sleep(POLL_SECONDS)
    return room
