"""Whole runs on ranks without Ray, in which some documents spoil the loss."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import TrainingError
from cluster.stages import BY_VERB, fingerprint, resolved
from cluster.storage import Store
from pipelines.data.corpus import Corpus
from pipelines.families.base import Batch, Example, Facts, Row
from pipelines.families.causal_lm import CausalLM
from pipelines.training import loop
from pipelines.training.checkpoint import load_weights, read_history
from pipelines.training.engine import Engine, StepOutcome, World
from pipelines.training.sampler import GlobalOrder

RUN = "guarded-0123456789"
TINY = [
    "name=guarded",
    "data.sequence_length=16",
    "model.hidden_size=32",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=2",
    "model.intermediate_size=64",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.warmup_steps=4",
    "train.precision=fp32",
]


class Spoiled(CausalLM):
    """Multiplies the loss of some documents, where they are met on some ranks."""

    def __init__(self, rank: int, factors: dict[int, float], ranks: tuple[int, ...]) -> None:
        self._factors = factors if rank in ranks else {}

    def example(
        self, config: RunConfig, facts: Facts, row: Row, rng: np.random.Generator | None
    ) -> Example:
        document = int(row["segment_documents"][0])
        factor = np.asarray(self._factors.get(document, 1.0), dtype=np.float32)
        return {**super().example(config, facts, row, rng), "factor": factor}

    def blank(self, config: RunConfig, facts: Facts, rows: int) -> Batch:
        return {**super().blank(config, facts, rows), "factor": torch.ones(rows)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        rest = {key: value for key, value in batch.items() if key != "factor"}
        return super().loss(model, rest) * batch["factor"].max()


class Watched(Engine):
    """Notes a figure that changes with any bit of this rank's weights and optimizer state."""

    marks: list[int]

    def step(self, *arguments: Any, **settings: Any) -> StepOutcome:
        outcome = super().step(*arguments, **settings)
        self.marks.append(hash(tuple(_bytes(self.snapshot()))))
        return outcome


def _bytes(state: Any) -> list[bytes]:
    if isinstance(state, torch.Tensor):
        return [state.contiguous().numpy().tobytes()]
    if isinstance(state, dict):
        return [piece for value in state.values() for piece in _bytes(value)]
    if isinstance(state, (list, tuple)):
        return [piece for value in state for piece in _bytes(value)]
    return []


def documents_of(config: RunConfig, batch: int) -> list[int]:
    """Of a global batch of a `counting_corpus`, whose rows are their documents."""
    made = Store(config.storage.root).latest("corpus", config.name)
    assert made is not None
    sizes = Corpus(made).row_groups("train").sizes
    order = GlobalOrder(sizes, config.seed, config.train.shuffle_window)
    size = config.train.global_batch
    return [order.at(place).id for place in range(batch * size, (batch + 1) * size)]


def runs(world: World, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run after another: `overrides`, `factors` by document, `ranks` that feel them."""
    return [_run(world, **case) for case in cases]


def _run(
    world: World, overrides: list[str], factors: dict[int, float], ranks: tuple[int, ...]
) -> dict[str, Any]:
    config = loading.load("gpt-demo", [*TINY, *overrides])
    store = Store(config.storage.root)
    corpus = store.latest("corpus", config.name)
    assert corpus is not None
    mark = fingerprint(BY_VERB["pretrain"], config, corpus, {})
    job = loop.TrainJob(resolved(config), store.uri, (corpus.name, corpus.version), RUN, mark)
    Watched.marks = []
    error = ""
    with (
        patch.object(loop, "join_world", lambda _: world),
        patch.object(loop, "Engine", Watched),
        patch.object(loop.families, "load", lambda _: Spoiled(world.rank, factors, ranks)),
    ):
        try:
            loop.train(job)
        except TrainingError as found:
            error = str(found)
    last = store.latest("checkpoint", config.name)
    history = read_history(last) if last else []
    finite = all(bool(w.isfinite().all()) for w in load_weights(last).values()) if last else None
    return {"marks": Watched.marks, "error": error, "history": history, "finite": finite}
