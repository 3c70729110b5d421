"""A few steps of training under several settings, one after another on the same ranks: no Ray, no
store."""

import numpy as np
import torch

from cluster import loading
from cluster.config import RunConfig, TextData
from pipelines.families.base import Batch
from pipelines.families.causal_lm import FAMILY
from pipelines.training.engine import Engine, World
from pipelines.training.sampler import share
from pipelines.training.zero import micro_batch

FACTS = {"vocab_size": 1601, "end_of_text": 0}
SHAPE = [
    "data.sequence_length=24",
    # DeepSpeed keeps parameters below 100 thousand elements whole at stage 3: the embedding and
    # the feed-forward layers are larger.
    "model.hidden_size=64",
    "model.intermediate_size=1600",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.initializer_range=0.1",
    "train.global_batch=12",
    "train.micro_batch=2",
    "train.learning_rate=0.01",
    "train.precision=fp32",
]


def configured(*overrides: str) -> RunConfig:
    return loading.load("gpt-demo", [*SHAPE, *overrides])


def histories(
    world: World, settings: dict[str, list[str]], steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step, by name of the settings."""
    return {name: _history(world, overrides, steps) for name, overrides in settings.items()}


def _history(world: World, overrides: list[str], steps: int) -> list[tuple[float, float]]:
    config = configured(f"train.workers={world.size}", *overrides)
    engine = Engine(config, FAMILY, FACTS, world)
    try:
        outcomes = [
            engine.step(batches(config, world, step), learning_rate=0.01, seed=step)
            for step in range(steps)
        ]
    finally:
        engine.close()
    return [(outcome.loss, outcome.gradient_norm) for outcome in outcomes]


def batches(config: RunConfig, world: World, step: int) -> list[Batch]:
    """Micro-batches of a rank: rows of their own length, several documents in each."""
    places = share(step, config.train.global_batch, world.rank, world.size)
    examples = [FAMILY.example(config, FACTS, _row(config, place), None) for place in places]
    size = micro_batch(config.train, world.size)
    return [
        FAMILY.collate(examples[begin : begin + size]) for begin in range(0, len(examples), size)
    ]


def _row(config: RunConfig, place: int) -> dict[str, object]:
    assert isinstance(config.data, TextData)
    rng = np.random.default_rng(place)
    tokens = rng.integers(0, 40, config.data.sequence_length + 1).astype(np.uint16)
    starts = np.array([0, 5, 6, 15], np.int32)
    return {"tokens": tokens, "used": int(rng.integers(18, 25)), "segment_starts": starts}


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Full parameters by name, whatever the stage. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    plain = engine.config.train.zero_stage == 0
    return {
        name: (p if plain else safe_get_full_fp32_param(p)).detach().clone()
        for name, p in engine.module.named_parameters()
    }
