"""What jobs have cost so far: the time that their workers held devices, at a device's price.

Prices are those of `cluster.hardware`, or what `heliostat submit --price` was given. The head,
nodes that wait for work, and preparing on CPUs cost money too; they are not counted.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.dashboard import Dashboard
from cluster.hardware import price_per_device

ACTORS = "/logical/actors?nocache=1"
"""Ray's only list of actors that says when each began and ended. Its cache would answer what was
true when somebody last asked, however long ago."""
NODES = "/api/v0/nodes?detail=1&limit=10000"
TRAINS = re.compile(r"(.*\W)?RayTrainWorker")
"""The class of a training worker, which is a device of its own where it has no GPU."""


@dataclass(frozen=True)
class Held:
    """What a process of a job had to itself, until now or its end."""

    job: str
    """Ray's number of it."""
    seconds: float
    devices: float
    device: str
    """Such as H100; empty for a share of a CPU, or where the node does not tell."""


def gather(dashboard: Dashboard, now: float) -> list[Held]:
    """Of all jobs.

    Args:
        now: seconds since the epoch.

    Raises:
        ClusterError: if the cluster does not answer.
    """
    nodes = dashboard.get(NODES)["data"]["result"]["result"]
    accelerators = {str(node["node_id"]): _accelerator(node) for node in nodes}
    actors = dashboard.get(ACTORS)["data"]["actors"]
    return list(held(actors.values(), accelerators, now))


def held(
    actors: Iterable[Mapping[str, Any]], accelerators: Mapping[str, str], now: float
) -> Iterable[Held]:
    """
    Args:
        actors: as `/logical/actors` tells them, times in milliseconds.
        accelerators: of each node, by its id.
    """
    for actor in actors:
        gpus = float((actor.get("requiredResources") or {}).get("GPU", 0))
        began, ended = actor.get("startTime") or 0, actor.get("endTime") or 0
        if not began or not (gpus or TRAINS.fullmatch(str(actor["className"]))):
            continue
        seconds = max(0.0, (ended / 1000 or now) - began / 1000)
        node = str((actor.get("address") or {}).get("nodeId"))
        name = accelerators.get(node, "") if gpus else ""
        yield Held(str(actor["jobId"]), seconds, gpus or 1.0, name)


def dollars(parts: Iterable[Held], price: float | None) -> float | None:
    """USD; None where nothing was held, or the price of a part is not known.

    Args:
        price: USD per hour of a device, in place of the table's.
    """
    total = None
    for part in parts:
        each = price if price is not None else price_per_device(part.device)
        if each is None:
            return None
        total = (total or 0.0) + part.seconds / 3600 * part.devices * each
    return total


def _accelerator(node: Mapping[str, Any]) -> str:
    kinds = [
        key for key in node.get("resources_total") or {} if key.startswith("accelerator_type:")
    ]
    label = (node.get("labels") or {}).get("ray.io/accelerator-type", "")
    return kinds[0].partition(":")[2] if kinds else str(label)
