"""`python -m tests.shrinking ROOT`: pretrain on two nodes, one of which is lost on the way."""

import sys
import threading
import time

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


def main(root: str) -> None:
    from ray.cluster_utils import Cluster

    from pipelines import pretrain

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()

    def lose_one() -> None:
        deadline = time.monotonic() + 600
        while Store(root).latest("checkpoint", NAME) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        nodes.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose_one, daemon=True)
    thread.start()
    try:
        pretrain.run(tiny(root, *SETTINGS, f"ray.address={nodes.address}"))
    finally:
        thread.join()
        nodes.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
