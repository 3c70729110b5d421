"""What a checkpoint costs the run that takes it.

Blocked: seconds that `CheckpointWriter.save` holds the step up, against a plain copy of the same
tensors in memory; pairs of both, one after the other, in one process. Share: blocked seconds, and
what steps lose to the writing in the background, over the steps of one interval at the default
cadence. `python benchmarks/checkpoint.py [PAIRS]`.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster import loading
from cluster.config import RunConfig
from cluster.stages import resolved
from cluster.storage import Store
from pipelines import families
from pipelines.training.checkpoint import CheckpointWriter, Lineage, Progress
from pipelines.training.engine import Engine, World

SHAPE = [
    "name=bench",
    "data.sequence_length=128",
    "model.layers=12",
    "model.hidden_size=640",
    "model.heads=10",
    "model.kv_heads=10",
    "model.intermediate_size=1728",
    "train.workers=1",
    "train.global_batch=2",
    "train.precision=fp32",
]
FACTS = {"vocab_size": 8192, "end_of_text": 0}
STEPS = 8
"""Measured without a save; a save is watched for as many steps as its writing takes."""


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Every tensor of a snapshot once."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state
    if not isinstance(state, dict | list | tuple):
        return []
    found = {id(tensor): tensor for item in items for tensor in tensors_of(item)}
    return list(found.values())


class Bench:
    def __init__(self, config: RunConfig, root: Path) -> None:
        store = Store(str(root))
        corpus = store.stage("corpus", config.name).commit([], fingerprint="", config={})
        world = World(0, 1, torch.device("cpu"))
        family = families.load(config.family)
        self.config, self.engine = config, Engine(config, family, FACTS, world)
        lineage = Lineage(config.name, "bench", "", resolved(config), corpus, keep=1)
        self.writer = CheckpointWriter(store, lineage, world)
        self.writer.begin(Progress(0, 0.0, []))
        tokens = torch.randint(1, FACTS["vocab_size"], (config.train.global_batch, 128))
        self._batch, self._steps = {"input_ids": tokens, "labels": tokens.clone()}, 0

    def step(self) -> float:
        began = time.perf_counter()
        self.engine.step([self._batch], learning_rate=1e-4, seed=self._steps)
        self._steps += 1
        return time.perf_counter() - began

    def save(self) -> float:
        """Seconds blocked."""
        return self.writer.save(self.engine, Progress(self._steps, 0.0, []), complete=False)

    def copy(self) -> float:
        """Seconds that a plain copy of the state takes."""
        tensors = tensors_of(self.engine.snapshot())
        began = time.perf_counter()
        copies = [tensor.clone() for tensor in tensors]
        return (time.perf_counter() - began) if copies else 0.0

    def pair(self, number: int) -> tuple[float, float]:
        """Seconds of a plain copy, and of a save; either goes first in turn, because the second
        finds memory that the first gave back."""
        plain = self.copy() if number % 2 else 0.0
        blocked = self.save()
        self.writer.wait()
        return plain or self.copy(), blocked

    def overhead(self) -> tuple[float, float]:
        """Seconds of an undisturbed step, and seconds that one save costs the steps around it."""
        undisturbed = statistics.median(self.step() for _ in range(STEPS))
        began, steps = time.perf_counter(), 0
        self.save()
        while steps < STEPS or any(thread.is_alive() for thread in self.writer._threads):
            self.step()
            steps += 1
        return undisturbed, time.perf_counter() - began - steps * undisturbed


def main(pairs: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        bench = Bench(loading.load("gpt-demo", SHAPE), Path(folder) / "root")
        bench.step()
        bytes_of_state = sum(t.nbytes for t in tensors_of(bench.engine.snapshot()))
        bench.pair(0)
        ratios = []
        for number in range(pairs):
            plain, blocked = bench.pair(number)
            ratios.append(blocked / plain)
            print(f"pair {number}: copy {plain:.3f} s, blocked {blocked:.3f} s, {ratios[-1]:.3f}x")
        undisturbed, lost = bench.overhead()
        bench.writer.wait()
        bench.engine.close()
        dist.destroy_process_group()
    interval = bench.config.train.checkpoint_every * undisturbed
    figures = {
        "state_gib": bytes_of_state / 2**30,
        "checkpoint_blocked_ratio": statistics.median(ratios),
        "checkpoint_blocked_ratio_worst": max(ratios),
        "step_seconds": undisturbed,
        "checkpoint_share": lost / (interval + lost),
    }
    for name, value in figures.items():
        print(f"{name:<32} {value:>10.4f}")
    print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
