"""How large a cluster may grow: the kinds of nodes that its autoscaler may start.

Ray's own autoscalers tell nobody. Of a cluster that `ray up` made, the launcher's file lies on the
head, where jobs' drivers run. On Kubernetes the kinds stand in the RayCluster alone: there
`ray.grows_to` says what they come to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.hardware import instance

LAUNCHED_WITH = "~/ray_bootstrap_config.yaml"
"""What `ray up` leaves on the head, resources of the node types filled in."""
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Kind:
    """A type of nodes."""

    resources: Resources
    """Of one node, by Ray's names."""
    most: int


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may start."""

    kinds: Sequence[Kind] = ()
    nodes: int = 0
    """Of all kinds together, the head not counted."""

    def limits(self) -> dict[str, float]:
        """The most that there may be of each resource, with all nodes of the kinds that have it."""
        found: dict[str, float] = {}
        for key in {key for kind in self.kinds for key in kind.resources}:
            left = self.nodes
            for kind in sorted(self.kinds, key=lambda kind: -kind.resources.get(key, 0)):
                taken = min(left, kind.most)
                left -= taken
                found[key] = found.get(key, 0) + taken * kind.resources.get(key, 0)
        return found


def growth() -> Growth:
    """Of the cluster whose head this is; none on any other machine."""
    try:
        text = Path(LAUNCHED_WITH).expanduser().read_text("utf-8")
    except FileNotFoundError:
        return Growth()
    return growth_of(yaml.safe_load(text))


def growth_of(tree: Mapping[str, Any]) -> Growth:
    """
    Args:
        tree: a launcher's file.
    """
    nodes = int(tree.get("max_workers", 0))
    types = tree.get("available_node_types") or {}
    kinds = [
        Kind(_resources(node), min(nodes, int(node.get("max_workers", nodes))))
        for name, node in types.items()
        if name != tree.get("head_node_type")
    ]
    return Growth(kinds, nodes)


def _resources(node: Mapping[str, Any]) -> Resources:
    """As the file says, completed by what is known of the instance."""
    told = {key: float(amount) for key, amount in (node.get("resources") or {}).items()}
    known = instance(node.get("node_config") or {})
    if known is None:
        return told
    found = {"GPU": float(known.devices), "memory": float(known.host_memory)} | told
    if not any(key.startswith("accelerator_type:") for key in found):
        found[f"accelerator_type:{known.device}"] = 1.0
    return found


def reachable(live: Sequence[Resources], may: Growth) -> list[Resources]:
    """The nodes that a run can have: those that are there, or, where they are more, all that may be
    started of the kind that has most GPUs, or most CPUs where no node has a GPU.
    """
    for key in ("GPU", "CPU"):
        now = sum(node.get(key, 0) for node in live)
        largest = max(
            may.kinds, key=lambda kind: kind.most * kind.resources.get(key, 0), default=None
        )
        if largest is not None and largest.most * largest.resources.get(key, 0) > now:
            return [largest.resources] * largest.most
        if now:
            break
    return list(live)
