"""What ranks do to show that a resumed step is the undisturbed one, bit for bit."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster import loading
from cluster.config import RunConfig
from cluster.storage import Artifact, Store
from pipelines.data.corpus import Corpus
from pipelines.families.base import Batch, Facts
from pipelines.families.causal_lm import CausalLM
from pipelines.training import ledger
from pipelines.training.checkpoint import CheckpointWriter, Lineage, Progress, newest
from pipelines.training.engine import Engine, World
from pipelines.training.loop import BatchSource, dropout_seed, restore
from pipelines.training.schedule import learning_rate

RUN = "exact-0123456789"
Figures = tuple[float, float]
"""Loss and gradient norm."""


class Restless(CausalLM):
    """Draws from every generator that a model may draw from."""

    def build_model(self, config: RunConfig, facts: Facts) -> torch.nn.Module:
        model = super().build_model(config, facts)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2  # type: ignore[assignment]
        return model

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        shaken = 1 + 0.1 * random.random() + 0.1 * float(np.random.random())
        return super().loss(model, batch) * shaken


@dataclass
class Rank:
    """One rank with a store, and an engine that can be made anew."""

    world: World
    config: RunConfig

    def __post_init__(self) -> None:
        self.store = Store(self.config.storage.root)
        made = self.store.latest("corpus", self.config.name)
        assert made is not None
        self.corpus = Corpus(made)
        self.lineage = Lineage(self.config.name, RUN, "mark", {}, made, keep=10_000)
        self.batches = BatchSource(self.config, Restless(), self.corpus, self.world)

    def engine(self) -> Engine:
        return Engine(self.config, Restless(), self.corpus.facts, self.world)

    def step(self, engine: Engine, step: int, seed: int | None = None) -> Figures:
        outcome = engine.step(
            self.batches.at(step),
            learning_rate=learning_rate(self.config.train, step),
            seed=dropout_seed(self.config.seed, step, self.world.rank) if seed is None else seed,
        )
        return outcome.loss, outcome.gradient_norm

    def newest(self) -> Artifact | None:
        return newest(self.store, self.config.name, RUN)


def resume_at_every_step(world: World, tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train some steps, saving after each; then go back to each and take the step after it.

    Returns:
        `undisturbed` and `resumed`: figures of every step but the first; `other seed`: of the last
        one with other random choices; `faults` of the ledger.
    """
    rank = Rank(world, loading.validate(tree))
    undisturbed, faults = _train(rank, steps)
    resumed: list[Figures] = []
    other: Figures | None = None
    for done in range(steps - 1, 0, -1):
        last = rank.newest() if world.first else None
        if last is not None:
            rank.store.delete(last)
        dist.barrier()
        if other is None:
            other = _continued(rank, done, seed=1)
        resumed.append(_continued(rank, done))
    return {
        "undisturbed": undisturbed[1:],
        "resumed": resumed[::-1],
        "other seed": other,
        "faults": faults,
    }


def _train(rank: Rank, steps: int) -> tuple[list[Figures], list[str]]:
    engine, writer = rank.engine(), CheckpointWriter(rank.store, rank.lineage, rank.world)
    writer.begin(Progress(0, 0.0, []))
    figures: list[Figures] = []
    for step in range(steps):
        figures.append(rank.step(engine, step))
        writer.record(step + 1, rank.batches.taken(step))
        history = [{"step": n + 1.0, "loss": loss} for n, (loss, _) in enumerate(figures)]
        writer.save(engine, Progress(step + 1, 0.0, history), complete=step + 1 == steps)
    writer.wait()
    engine.close()
    made = rank.newest()
    assert made is not None and made.manifest.detail["step"] == steps
    samples = rank.batches.order.samples
    return figures, ledger.faults(made, samples, rank.config.train.global_batch)


def _continued(rank: Rank, done: int, seed: int | None = None) -> Figures:
    """Restore in a new engine whose generators stand anywhere, and take one step."""
    engine = rank.engine()
    start = restore(rank.store, rank.lineage, engine)
    assert start.step == done
    random.seed(done)
    np.random.seed(done)
    torch.manual_seed(done)
    figures = rank.step(engine, done, seed)
    engine.close()
    return figures
