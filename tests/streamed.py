"""`python -m tests.streamed ROOT DOCS`: one node prepares rows, another trains on them and is hit.

Prints a line of JSON: the nodes, the node of each task that prepared rows, and what was killed.
"""

import json
import sys
import threading
import time
from pathlib import Path

import psutil

from cluster.config import RunConfig
from cluster.storage import Store
from pipelines.data.sources import listing, partition
from tests.hunting import tiny
from tests.ports import free_port

NAME = "streamed"
SETTINGS = [
    f"name={NAME}",
    "train.input=stream",
    "train.workers=1",
    "train.threads_per_worker=2",
    "train.steps=60",
    "train.checkpoint_every=6",
    "train.keep_checkpoints=9",
    "train.shuffle_window=1",
    "data.vocab_size=300",
    "data.tokenizer_bytes=1500",
    "data.heldout_fraction=0.2",
    "data.partition_bytes=500",
    "data.row_group_rows=16",
]


def documents(folder: Path, count: int = 24) -> None:
    folder.mkdir()
    for n in range(count):
        text = f"第{n}篇：定日镜跟随太阳，把光投向一点。def f{n}(x):\n    return x + {n}\n"
        (folder / f"{n:03d}.txt").write_text(text * (1 + n % 3), encoding="utf-8")


def config(root: str, docs: str, *more: str) -> RunConfig:
    return tiny(root, *SETTINGS, f"data.sources=[{docs}]", *more)


def partitions(settings: RunConfig) -> int:
    found = listing(settings.data.sources, "text")
    return len(partition(found.files, settings.data.partition_bytes))


def kill_a_worker(root: str, killed: list[int]) -> None:
    """Once something was committed."""
    deadline = time.monotonic() + 300
    while Store(root).latest("checkpoint", NAME) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)


def main(root: str, docs: str) -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.state import list_tasks

    from pipelines import prepare, pretrain

    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": free_port(),
        },
    )
    trains = nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    settings = config(root, docs, f"ray.address={nodes.address}")
    killed: list[int] = []
    try:
        ray.init(address=nodes.address, log_to_driver=False)
        prepare.run(settings)
        threading.Thread(target=kill_a_worker, args=(root, killed), daemon=True).start()
        pretrain.run(settings)
        tasks = list_tasks(limit=10_000, filters=[("state", "=", "FINISHED")])
        prepared = [task.node_id for task in tasks if "_prepared" in (task.name or "")]
        ray.shutdown()
    finally:
        nodes.shutdown()
    print(json.dumps({"trains": trains.node_id, "prepared": prepared, "killed": len(killed)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
