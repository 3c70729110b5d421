"""`python -m tests.shrinking ROOT`: pretrain on two nodes, one of which is lost on the way."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.storage import Store
from tests.hunting import tiny

NAME = "shrinking"
SETTINGS = [
    f"name={NAME}",
    "train.workers=[1,2]",
    "train.precision=fp32",
    "train.steps=400",
    "train.checkpoint_every=50",
]


def pretrain_on_two(root: str, settings: Sequence[str], meddle: Callable[[Any, Any], None]) -> None:
    """
    Args:
        meddle: called with the cluster and its second node while the run goes on.
    """
    from ray.cluster_utils import Cluster

    from pipelines import pretrain

    # Without hooks at exit, which only the main thread may set: another one may add a node.
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}, shutdown_at_exit=False)
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    thread = threading.Thread(target=meddle, args=(nodes, second), daemon=True)
    thread.start()
    try:
        pretrain.run(tiny(root, *settings, f"ray.address={nodes.address}"))
    finally:
        thread.join()
        nodes.shutdown()


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def main(root: str) -> None:
    def lose_one(nodes: Any, second: Any) -> None:
        wait_for(lambda: Store(root).latest("checkpoint", NAME) is not None)
        nodes.remove_node(second, allow_graceful=False)

    pretrain_on_two(root, SETTINGS, lose_one)


if __name__ == "__main__":
    main(sys.argv[1])
