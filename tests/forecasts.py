"""A plan beside the run that it is of: some steps of training, each rank a process of its own, as
Ray gives each worker one.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from cluster import loading
from pipelines import families
from pipelines.pretrain import _environment
from pipelines.training.engine import Engine, World
from pipelines.training.forecast import STEPS, Forecast
from pipelines.training.meter import peak_memory
from tests.checkout import REPOSITORY

SECONDS = 240
"""That one run may take."""
WIDE = ("model.hidden_size=768", "model.layers=6", "model.heads=12", "model.kv_heads=12")
WIDE += ("model.intermediate_size=2048", "data.vocab_size=16384", "data.sequence_length=256")
WIDE += ("train.global_batch=4",)
DEEP = ("model.hidden_size=384", "model.layers=20", "model.heads=6", "model.kv_heads=6")
DEEP += ("model.intermediate_size=1024", "data.vocab_size=4096", "data.sequence_length=512")
DEEP += ("train.global_batch=4",)


@dataclass(frozen=True)
class Case:
    """Overrides of gpt-demo, and how many workers train it."""

    overrides: tuple[str, ...]
    ranks: int = 1


CASES = {
    "wide, ZeRO 0": Case((*WIDE, "train.zero_stage=0")),
    "wide, ZeRO 1": Case((*WIDE, "train.zero_stage=1")),
    "wide, ZeRO 2, two workers": Case((*WIDE, "train.zero_stage=2"), ranks=2),
    "wide, ZeRO 3": Case((*WIDE, "train.global_batch=2", "train.zero_stage=3")),
    "deep, ZeRO 2": Case((*DEEP, "train.zero_stage=2")),
    "deep, ZeRO 1, bf16": Case((*DEEP, "train.zero_stage=1", "train.precision=bf16")),
    "deep, ZeRO 2, activation checkpointing": Case(
        (
            *DEEP,
            "train.global_batch=8",
            "train.zero_stage=2",
            "train.activation_checkpointing=true",
        )
    ),
    "deep, ZeRO 0, compiled": Case(
        (*DEEP, "train.zero_stage=0", "train.precision=autocast", "train.compile=true")
    ),
    "deep, ZeRO 0, loss in chunks": Case((*DEEP, "train.zero_stage=0", "train.loss_chunk=256")),
}
"""Of 55 (wide) and 37 million parameters (deep): they weigh more than the process around them."""


@dataclass(frozen=True)
class Forecasted:
    """What was planned of rank 0, and what was found."""

    planned_peak: float
    found_peak: float
    """Bytes."""
    planned_speed: float
    found_speed: float
    """Predictions per second of all ranks."""


def forecasted(folder: Path, case: Case, timed: int = 0) -> Forecasted:
    """Train in fp32, unless the overrides say otherwise.

    Args:
        folder: empty.
        timed: steps that follow the `STEPS` after which memory is compared; speed is the median of
            all but the first.

    Raises:
        RuntimeError: if a rank failed.
    """
    ranks = case.ranks
    overrides = ["train.precision=fp32", *case.overrides, f"train.workers={ranks}"]
    environment = os.environ | _environment(1, gpu=False) | {"WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.forecasts", str(folder), str(timed), *overrides],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    return Forecasted(**json.loads((folder / "forecasted.json").read_text()))


def main(folder: Path, timed: int, overrides: list[str]) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    config = loading.load("gpt-demo", overrides)
    family = families.load(config.family)
    facts = family.expected_facts(config)
    world = World(rank, ranks, torch.device("cpu"))
    forecast = Forecast.of(config, family, facts, world)
    assert forecast is not None
    engine = Engine(config, family, facts, world)
    batch = family.blank(config, facts, config.train.global_batch // ranks)
    speeds, peak = [], 0.0
    for step in range(STEPS + timed):
        began = time.perf_counter()
        outcome = engine.step([batch], learning_rate=1e-3, seed=step)
        speeds.append(outcome.predictions / (time.perf_counter() - began))
        peak = peak_memory(world.device) if step < STEPS else peak
    if rank == 0:
        speed = median(speeds[1:])
        found = Forecasted(forecast.peak, peak, forecast.speed, speed)
        (folder / "forecasted.json").write_text(json.dumps(asdict(found)))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
