"""`python -m tests.growing ROOT`: pretrain on two nodes, one of which is lost and comes back."""

import sys
from contextlib import suppress
from functools import partial
from typing import Any

from cluster.errors import ArtifactError
from cluster.journal import Journal
from cluster.storage import Store
from tests.shrinking import pretrain_on_two, wait_for

NAME = "growing"
SETTINGS = [
    f"name={NAME}",
    "train.workers=[1,2]",
    "train.precision=fp32",
    # Of a hundredth of a second: Ray counts a cluster's nodes every 20 s.
    "train.steps=5000",
    "train.checkpoint_every=250",
]
LOOK_SECONDS = 2.0
"""Between Ray Train's looks for more devices: once a minute otherwise, by when this run would be
over."""


def main(root: str) -> None:
    import ray.train

    ray.train.ScalingConfig = partial(  # type: ignore[misc]
        ray.train.ScalingConfig, elastic_resize_monitor_interval_s=LOOK_SECONDS
    )
    store = Store(root)

    def lose_one_and_bring_it_back(nodes: Any, second: Any) -> None:
        wait_for(lambda: store.latest("checkpoint", NAME) is not None)
        # Asked for once: checkpoints go while they are looked at.
        run = run_of(store)
        nodes.remove_node(second, allow_graceful=False)
        wait_for(lambda: launches(store, run)[1:] == [1])
        # Where the node came back before, the two would go on from what two have committed.
        wait_for(lambda: committed_by_one(store))
        nodes.add_node(num_cpus=1)

    pretrain_on_two(root, SETTINGS, lose_one_and_bring_it_back)


def run_of(store: Store) -> str:
    made = store.latest("checkpoint", NAME)
    assert made is not None
    return str(made.manifest.detail["run"])


def committed_by_one(store: Store) -> bool:
    with suppress(ArtifactError):  # the last but one goes while it is looked at
        made = store.latest("checkpoint", NAME)
        return made is not None and made.manifest.detail["world_size"] == 1
    return False


def launches(store: Store, run: str) -> list[int]:
    """Workers of each start of a run so far."""
    events = Journal(store, run).events()
    return [event.fields["workers"] for event in events if event.name == "launch"]


if __name__ == "__main__":
    main(sys.argv[1])
