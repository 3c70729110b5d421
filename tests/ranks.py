"""What ranks do in tests of the training engine: steps of a run, without Ray."""

from typing import Any

import torch

from cluster import loading
from cluster.config import RunConfig
from cluster.stages import BY_VERB, fingerprint, resolved
from cluster.storage import Artifact, Store
from pipelines import families
from pipelines.data.corpus import Corpus
from pipelines.training import elastic
from pipelines.training.checkpoint import CheckpointWriter, Lineage, Progress
from pipelines.training.engine import Engine, World
from pipelines.training.loop import BatchSource
from pipelines.training.schedule import learning_rate

RUN = "run-1"


def steps(
    world: World,
    tree: dict[str, Any],
    last: int,
    *,
    source: int | None = None,
    save_at: int | None = None,
) -> dict[str, Any]:
    """Train up to a step, from the start or from a checkpoint.

    Args:
        tree: a resolved config; its store holds the corpus.
        source: version of the checkpoint to go on from.
        save_at: a step at which to commit a checkpoint; unfinished, unless it is the run's last.

    Returns:
        `losses` by step and `buffers` by name, the latter as they are right after the start.
    """
    config = loading.validate(tree)
    store = Store(config.storage.root)
    made = store.latest("corpus", config.name)
    assert made is not None
    corpus, family = Corpus(made), families.load(config.family)
    torch.set_flush_denormal(True)  # as workers do
    engine = Engine(config, family, corpus.facts, world)
    first, history = 0, []
    if source is not None:
        checkpoint = store.artifact("checkpoint", config.name, source)
        elastic.restore(engine, checkpoint)
        first, history = checkpoint.manifest.detail["step"], checkpoint.read_json("history.json")
    buffers = {name: value.clone() for name, value in engine.module.named_buffers()}
    batches = BatchSource(config, family, corpus, world)
    losses = []
    for step in range(first, last):
        rate = learning_rate(config.train, step)
        losses.append(engine.step(batches.at(step), learning_rate=rate, seed=step).loss)
        history.append({"step": float(step + 1), "loss": losses[-1]})
        if step + 1 == save_at:
            _save(engine, config, made, Progress(step + 1, 1.0, list(history)))
    engine.close()
    return {"losses": losses, "buffers": buffers}


def _save(engine: Engine, config: RunConfig, corpus: Artifact, progress: Progress) -> None:
    engine.average_buffers()
    mark = fingerprint(BY_VERB["pretrain"], config, corpus, {})
    lineage = Lineage(config.name, RUN, mark, resolved(config), corpus, keep=99)
    writer = CheckpointWriter(corpus.store, lineage, engine.world)
    writer.save(engine, progress, complete=progress.step == config.train.steps)
    writer.wait()


def gradients(world: World, trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Initial weights, loss and gradients of the first step of some configs, by parameter name."""
    return [_gradients_of(world, loading.validate(tree)) for tree in trees]


def _gradients_of(world: World, config: RunConfig) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    made = Store(config.storage.root).latest("corpus", config.name)
    assert made is not None
    corpus, family = Corpus(made), families.load(config.family)
    engine = Engine(config, family, corpus.facts, world)
    plain = config.train.zero_stage == 0
    parameters = dict(engine.module.named_parameters())
    weights = {
        name: (p if plain else safe_get_full_fp32_param(p)).detach().clone()
        for name, p in parameters.items()
    }
    taken: dict[str, torch.Tensor] = {}
    usual = engine.deepspeed.step

    def step() -> None:
        for name, p in parameters.items():
            gradient = p.grad if plain else safe_get_full_grad(p)
            taken[name] = gradient.detach().clone()
        usual()

    engine.deepspeed.step = step
    batch = BatchSource(config, family, corpus, world).at(0)
    outcome = engine.step(batch, learning_rate=1e-3, seed=0)
    engine.close()
    return {"loss": outcome.loss, "weights": weights, "gradients": taken}
