"""Searches over the smallest model, and what is left of them."""

from cluster import loading
from cluster.config import RunConfig
from cluster.storage import Artifact
from tests.corpora import counting_corpus
from tests.hunting import TINY
from tune import search
from tune.ledger import Attempt, Ledger

NO_SEARCH = ["tune.space={}", "tune.steps=0", "tune.trials=16", "tune.folds=0"]
"""A recipe's own search taken out of it."""
SMALL = [
    *TINY,
    *NO_SEARCH,
    "train.workers=1",
    "train.zero_stage=1",
    "train.checkpoint_every=20",
    "tune.confirm_seeds=0",
    "tune.report_every=10",
    "tune.concurrent=2",
]


def searching(root: object, *overrides: str) -> RunConfig:
    """40 steps on two CPUs, reported every 10."""
    return loading.load("gpt-demo", [f"storage.root={root}", *SMALL, *overrides])


def searched(config: RunConfig) -> Artifact:
    """The study of a search over a corpus of its own."""
    counting_corpus(config)
    made = search.run(config).artifact
    assert made is not None
    return made


def attempts_of(made: Artifact) -> list[Attempt]:
    return Ledger(made.store, made.manifest.detail["study"]).attempts()
