"""Traced on tensors without content, and held against tensors that have it."""

import pytest
import torch

from cluster import loading
from pipelines import families
from pipelines.training import footprint
from pipelines.training.zero import Precision

GPT = [
    "data.sequence_length=32",
    "data.vocab_size=512",
    "model.hidden_size=64",
    "model.layers=3",
    "model.heads=4",
    "model.kv_heads=2",
    "model.intermediate_size=128",
]


def traced(recipe: str, *overrides: str, rows: int = 4, precision: Precision = "fp32"):
    config = loading.load(recipe, list(overrides))
    family = families.load(config.family)
    return footprint.trace(config, family, family.expected_facts(config), rows, precision)


def test_parameters_are_those_of_the_model() -> None:
    config = loading.load("gpt-demo", GPT)
    family = families.load(config.family)
    model = family.build_model(config, family.expected_facts(config))
    found = traced("gpt-demo", *GPT)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.predictions == 4 * 32 and found.rows == 4
    # Each layer adds its own.
    deeper = traced("gpt-demo", *GPT, "model.layers=6")
    fewer = traced("gpt-demo", *GPT, "model.layers=1")
    assert deeper.operations - found.operations > found.operations - fewer.operations > 0


@pytest.mark.parametrize("recipe", ["gpt-demo", "digits-cnn"])
def test_what_is_held_for_the_backward_pass_is_counted(recipe: str) -> None:
    """Autograd itself tells what it saves; the peak cannot be below that."""
    overrides = GPT if recipe == "gpt-demo" else []
    config = loading.load(recipe, overrides)
    family = families.load(config.family)
    facts = family.expected_facts(config)
    model = family.build_model(config, facts)
    batch = family.blank(config, facts, 4)
    given = (*model.parameters(), *model.buffers(), *batch.values())
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = family.loss(model, batch)
    held = sum(saved.values())
    found = traced(recipe, *overrides)
    loss.backward()
    assert held <= found.activations + found.logits < 3 * held


def test_it_grows_with_rows_and_shrinks_with_checkpoints_and_chunks() -> None:
    plain = traced("gpt-demo", *GPT)
    more = traced("gpt-demo", *GPT, rows=8)
    assert more.activations == pytest.approx(2 * plain.activations, rel=0.1)
    frugal = traced("gpt-demo", *GPT, "train.activation_checkpointing=true")
    assert frugal.activations < 0.7 * plain.activations
    chunked = traced("gpt-demo", *GPT, "train.loss_chunk=16")
    assert chunked.logits < 0.4 * plain.logits
    half = traced("gpt-demo", *GPT, precision="bf16")
    assert half.activations < 0.75 * plain.activations


def test_a_model_of_seventy_billion_needs_no_room() -> None:
    found = traced("gpt-70b", "model.layers=2", rows=1, precision="bf16")
    assert found.parameters > 2e9 and found.activations > 1e8
