"""Looks at held-out rows while a run trains, and the folds of its training rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.config import RunConfig
from cluster.errors import UsageError
from pipelines import families
from pipelines.data.corpus import Corpus
from pipelines.families.base import batched
from pipelines.training import folds, heldout
from pipelines.training.engine import World
from pipelines.training.folds import Fold
from pipelines.training.heldout import HeldOut
from pipelines.training.loop import BatchSource
from tests import trained
from tests.corpora import counting_corpus
from tests.hunting import tiny

HERE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("rows", "ranks", "size"), [(10, 2, 3), (1, 4, 2), (12, 3, 4), (7, 1, 2)])
def test_ranks_share_rows_and_make_as_many_steps(rows: int, ranks: int, size: int) -> None:
    cut = [list(heldout.shares(range(rows), rank, ranks, size)) for rank in range(ranks)]
    assert len({len(own) for own in cut}) == 1
    counted = [row for own in cut for batch, counts in own if counts for row in batch]
    assert sorted(counted) == list(range(rows))
    assert all(0 < len(batch) <= size for own in cut for batch, _ in own)


def test_what_chooses_and_what_confirms_are_different_rows(tmp_path: Path) -> None:
    corpus = Corpus(counting_corpus(tiny(tmp_path)))
    choosing, confirming = heldout.chosen(corpus, 99), heldout.chosen(corpus, 99, confirm=True)
    assert sorted(choosing + confirming) == list(range(20))
    assert heldout.chosen(corpus, 3) == [0, 2, 4]


@pytest.fixture
def alone() -> Any:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def measured(config: RunConfig, model: Any, corpus: Corpus, ids: list[int]) -> float:
    engine: Any = SimpleNamespace(deepspeed=model, average_buffers=lambda: None)
    family = families.load(config.family)
    return HeldOut(config, family, corpus, HERE, ids).loss(engine)


def test_the_loss_is_that_of_the_rows_and_nothing_else_changes(tmp_path: Path, alone: Any) -> None:
    config = tiny(tmp_path, "train.micro_batch=3", "train.workers=1", "train.global_batch=9")
    corpus, family = Corpus(counting_corpus(config, ragged=True)), families.load("causal_lm")
    torch.manual_seed(0)
    model: Any = family.build_model(config, corpus.facts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = measured(config, model.train(), corpus, list(range(0, 20, 2)))
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    total, count = 0.0, 0
    rows = [row for n, row in enumerate(corpus.rows("heldout")) if n % 2 == 0]
    for group in batched(rows, 4):
        made = [family.example(config, corpus.facts, row, None) for row in group]
        batch = family.collate(made)
        with torch.no_grad():
            total += float(family.loss(model.eval(), batch))
        count += family.count(batch)
    assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("number", [2, 3, 7])
def test_every_row_is_held_out_once_and_classes_are_spread(number: int) -> None:
    classes = np.array([0] * 40 + [1] * 21 + [2] * 9)
    dealing = folds.dealt(classes, number, seed=1)
    sizes = np.bincount(dealing, minlength=number)
    assert sizes.max() - sizes.min() <= 1
    for name in range(3):
        own = np.bincount(dealing[classes == name], minlength=number)
        assert own.max() - own.min() <= 1
    assert (dealing == folds.dealt(classes, number, seed=1)).all()
    assert (dealing != folds.dealt(classes, number, seed=2)).any()


def test_a_class_that_is_too_small_is_named() -> None:
    with pytest.raises(UsageError, match="tune.folds 3: class 1 has 2 training rows"):
        folds.dealt(np.array([0, 0, 0, 1, 1]), 3, seed=1)


@pytest.mark.parametrize("family", ["image", "text"])
def test_a_fold_never_trains_on_what_it_is_measured_on(tmp_path: Path, family: str) -> None:
    if family == "image":
        train = {"global_batch": 4, "warmup_steps": 1, "workers": 1}
        config = trained.image_config(tmp_path, train=train)
        made = trained.corpus(config, trained.pictures(22), trained.pictures(4, seed=1))
    else:
        config = tiny(tmp_path, "train.workers=1")
        made = counting_corpus(config, rows=22)
    corpus, seen_out = Corpus(made), []
    for number in range(3):
        fold = Fold(number, 3, seed=7)
        kept, out = folds.rows_of(corpus, fold)
        source = BatchSource(config, families.load(config.family), corpus, HERE, fold)
        assert source.order.samples == len(kept)
        epoch = [source.order.at(position) for position in range(2 * len(kept))]
        assert sorted(s.id for s in epoch if s.epoch == 0) == sorted(kept)
        assert sorted(s.id for s in epoch if s.epoch == 1) == sorted(kept)
        assert source.at(0)
        seen_out += out.tolist()
    assert sorted(seen_out) == list(range(22))
