"""`python -m tests.placed ROOT`: pretrain on the one of two nodes that has the accelerator.

Ray reads an accelerator off the hardware; a label that a node is started with says the same, so
that no GPU is needed to see where workers go.
"""

import json
import sys

from tests.hunting import tiny

NAME = "placed"
SETTINGS = [
    f"name={NAME}",
    "train.precision=fp32",
    "train.steps=2",
    "train.warmup_steps=1",
    "train.labels={ray.io/accelerator-type: H200}",
]


def main(root: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from pipelines import pretrain

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    right = nodes.add_node(num_cpus=2, labels={"ray.io/accelerator-type": "H200"})
    nodes.wait_for_nodes()
    try:
        ray.init(address=nodes.address, log_to_driver=False)
        pretrain.run(tiny(root, *SETTINGS, f"ray.address={nodes.address}"))
        actors = ray._private.state.actors().values()
        found = [a["Address"]["NodeID"] for a in actors if "RayTrainWorker" in a["ActorClassName"]]
        ray.shutdown()
    finally:
        nodes.shutdown()
    print(json.dumps({"right": right.node_id, "workers": found}))


if __name__ == "__main__":
    main(sys.argv[1])
