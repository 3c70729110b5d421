"""What makes a stage stale, and how an artifact finds what it was made from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster import loading, stages
from cluster.config import RunConfig
from cluster.config.base import Operational
from cluster.errors import ArtifactError, UsageError
from cluster.stages import BY_VERB, STAGES, fingerprint, relevant, resolved
from cluster.storage import Store
from tests import fakes


def operational(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if any(isinstance(mark, Operational) for mark in info.metadata):
            yield prefix + name
        for section in loading.section_classes(info.annotation):
            yield from operational(section, f"{prefix}{name}.")


OPERATIONAL = set(operational(RunConfig))
FAMILIES = ("causal_lm", "image_classifier")
# Another valid value where the next number or the other boolean would not do.
OTHER: dict[str, Any] = {
    "name": "other",
    "data.sources": ["elsewhere"],
    "data.channels": 3,
    "data.lines": ["here"],
    "data.privacy.apply": "always",
    "data.privacy.types": ["email"],
    "data.privacy.style": "plain",
    "data.privacy.phone_regions": ["CN"],
    "data.privacy.ner": "names:find",
    "data.decontaminate.sources": ["elsewhere"],
    "data.decontaminate.action": "report",
    "data.dedup.permutations": 128,
    "data.dedup.unit": "paragraph",
    "data.dedup.bands": 28,
    "data.dedup.threshold": 0.3,
    "data.cleaning": ["compose", {"length": {"min": 7}}],
    "model.heads": 8,
    "model.kv_heads": 2,
    "model.hidden_size": 196,
    "model.hidden_sizes": [32, 48],
    "model.depths": [1, 2],
    "model.layer_type": "bottleneck",
    "train.global_batch": 128,
    "train.zero_stage": 3,
    "train.workers": 4,
    "train.precision": "autocast",
    "train.schedule": "linear",
    "train.micro_batch": 8,
    "ray.cpus": 3,
    "data.heldout_fraction": 0.3,
    "train.final_learning_rate": 0.3,
    "train.beta1": 0.3,
    "train.beta2": 0.3,
    "model.initializer_range": 0.3,
    "data.shift": 0.3,
    "train.offload_optimizer": "cpu",
    "train.offload_parameters": "cpu",
    "train.on_spike": "stop",
    "serve.engine.precision": "fp32",
    "serve.engine.context": 64,
    "serve.models": ["elsewhere"],
    "serve.gpus_per_replica": 0.5,
    "serve.ingress_replicas": 3,
    "serve.max_surge_percent": 50,
    "serve.requests_per_minute": 60,
    "serve.tokens_per_minute": 60,
    "serve.concurrent_per_key": 6,
    "data.tokenizer.model": "unigram",
    "data.tokenizer.special_tokens": ["<|user|>"],
    "data.packing": "best_fit",
    "train.input": "stream",
    "train.augment.delete": 0.1,
    "train.augment.swap": 0.1,
    "train.augment.mask": 0.1,
    "train.augment.replace": 0.1,
    "train.augment.noise": 0.1,
    "tune.objectives.heldout_loss": "max",
    "tune.search": "grid",
    "tune.scheduler": "median",
    "tune.grace": 0.3,
    "tune.gpus_per_worker": 0.5,
    "tune.folds": 3,
}
# Keys that are refused alone: what the rest of the config must say, before and after the change.
TOGETHER: dict[str, dict[str, Any]] = {
    "train.offload_parameters": {"train": {"zero_stage": 3}},
    "train.zero_plus_plus.partition_size": {"train": {"zero_stage": 3}},
    "train.zero_plus_plus.quantized_weights": {"train": {"zero_stage": 3, "precision": "bf16"}},
    "train.zero_plus_plus.quantized_gradients": {"train": {"zero_stage": 3, "precision": "fp16"}},
    "train.augment.mask": {"data": {"tokenizer": {"special_tokens": ["<|mask|>"]}}},
    "tune.money": {"tune": {"price_per_hour": 2}},
}
# A path without an offload to it, or a family that has no use for the key, is refused outright.
REFUSED = {
    ("causal_lm", "train.nvme_path"),
    ("image_classifier", "train.nvme_path"),
    ("image_classifier", "train.loss_chunk"),
    ("image_classifier", "train.activation_checkpointing"),
    ("image_classifier", "train.input"),
    *(
        ("image_classifier", f"train.augment.{kind}")
        for kind in ("delete", "swap", "mask", "replace", "noise")
    ),
}


def changed(config: RunConfig, key: str) -> RunConfig:
    """The config with another valid value of one key."""
    tree = resolved(config)
    node = tree
    *path, leaf = key.split(".")
    for part in path:
        node = node[part]
    old = node[leaf]
    if key in OTHER:
        node[leaf] = OTHER[key]
    elif isinstance(old, bool):
        node[leaf] = not old
    elif isinstance(old, int | float):
        node[leaf] = old + 1
    else:
        node[leaf] = f"{old}x".lower()
    return loading.validate(tree)


def default(family: str, key: str = "") -> RunConfig:
    """The defaults of the schema: recipes are tuned, and say nothing about keys."""
    besides = TOGETHER.get(key, {})
    data = {"sources": ["here"], **besides.get("data", {})}
    tree = {"name": "demo", "family": family, "data": data}
    tree |= {section: besides.get(section, {}) for section in ("train", "tune")}
    return loading.validate(tree)


def keys() -> list[tuple[str, str]]:
    """Every key with a family that has it; family and kinds decide which keys there are."""
    kinds = {"family", "data.kind", "model.kind"}
    return [
        (family, key)
        for family in FAMILIES
        for key in _flat(resolved(default(family)))
        if key not in kinds and (family, key) not in REFUSED
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize(("family", "key"), keys())
def test_a_key_makes_stale_what_depends_on_it(family: str, key: str) -> None:
    before = default(family, key)
    after = changed(before, key)
    assert resolved(after) != resolved(before)
    stale = {
        stage.verb
        for stage in STAGES
        if fingerprint(stage, before, None, {}) != fingerprint(stage, after, None, {})
    }
    section = key.split(".")[0]
    expected = {stage.verb for stage in STAGES if section in stage.sections}
    assert stale == (set() if key in OPERATIONAL else expected)


def test_every_key_that_is_not_operational_belongs_to_a_stage() -> None:
    """Else a change of it would go unnoticed. The name is the artifact's own."""
    sections = {section for stage in STAGES for section in stage.sections}
    loose = {
        key
        for key in loading.dotted_keys()
        if key not in OPERATIONAL and key.split(".")[0] not in sections
    }
    assert loose == {"name"}


def test_a_fingerprint_depends_on_source_inputs_and_stage(tmp_path: Path) -> None:
    config, store = fakes.config(), Store(str(tmp_path))
    one, two = fakes.commit(store), fakes.commit(store)
    pretrain = BY_VERB["pretrain"]
    prints = [
        fingerprint(pretrain, config, None, {}),
        fingerprint(pretrain, config, one, {}),
        fingerprint(pretrain, config, two, {}),
        fingerprint(pretrain, config, one, {"a": 1}),
        fingerprint(BY_VERB["evaluate"], config, one, {}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(pretrain, config, one, {}) == prints[1]


def test_a_stored_config_compares_with_a_fresh_one(tmp_path: Path) -> None:
    """Tuples become lists in JSON; that is no difference."""
    config = fakes.config("digits-cnn")
    made = fakes.commit(Store(str(tmp_path)), config=resolved(config))
    again = Store(str(tmp_path)).artifact("corpus", "demo", 1)
    for stage in STAGES:
        stored = relevant(stage, again.manifest.config)
        assert stored == relevant(stage, resolved(config))
        assert stored == relevant(stage, made.manifest.config)


def test_each_stage_starts_from_what_an_earlier_one_makes() -> None:
    made: set[str | None] = {None}
    for stage in STAGES:
        assert stage.needs in made
        made.add(stage.makes)


def test_the_source_is_the_newest_finished_artifact(tmp_path: Path) -> None:
    store, config = Store(str(tmp_path)), fakes.config()
    evaluate = BY_VERB["evaluate"]
    with pytest.raises(UsageError, match="run `heliostat pretrain` first"):
        stages.source_of(evaluate, store, config)
    fakes.commit(store, "checkpoint", config.name, complete=False)
    with pytest.raises(UsageError, match="needs a finished checkpoint of gpt-demo"):
        stages.source_of(evaluate, store, config)
    done = fakes.commit(store, "checkpoint", config.name)
    fakes.commit(store, "checkpoint", config.name, complete=False)
    assert stages.source_of(evaluate, store, config) == done
    assert stages.required("evaluate", store, config) == done
    assert stages.source_of(BY_VERB["prepare"], store, config) is None


def test_ancestors_are_found_over_generations(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    corpus = fakes.commit(store, "corpus")
    other = fakes.commit(store, "corpus", "teacher-corpus")
    first = fakes.commit(store, "checkpoint", parents=[corpus], complete=False)
    second = fakes.commit(store, "checkpoint", parents=[first, corpus])
    measured = fakes.commit(store, "evaluation", parents=[second])
    model = fakes.commit(store, "model", parents=[measured, other])
    assert stages.parent(model, "evaluation") == measured
    assert stages.parent(model, "checkpoint") == second
    assert stages.parent(measured, "corpus") == corpus
    # The nearest of several is the one that is meant.
    assert stages.parent(model, "corpus") == other
    with pytest.raises(ArtifactError, match="corpus/demo@1 was not made from any checkpoint"):
        stages.parent(corpus, "checkpoint")
    # A resting point that was pruned is not in the way of what was made after it.
    store.delete(first)
    assert stages.parent(measured, "corpus") == corpus
    store.delete(corpus)
    with pytest.raises(ArtifactError, match="corpus/demo@1 does not exist"):
        stages.parent(measured, "corpus")
