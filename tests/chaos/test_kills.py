"""kill -9 of a random worker, again and again: nothing is lost, nothing is done twice."""

from pathlib import Path

import pytest

from cluster.storage import Store
from pipelines import pretrain
from tests.corpora import counting_corpus
from tests.hunting import Hunter, check_as_undisturbed, tiny

pytestmark = pytest.mark.usefixtures("ray_session")
KILLS = 20


@pytest.mark.parametrize("seed", [20261122])
def test_twenty_killed_workers_change_nothing(root: Path, seed: int) -> None:
    print(f"seed {seed}")
    overrides = ["train.steps=400", "train.checkpoint_every=10", f"train.max_failures={2 * KILLS}"]
    quiet = tiny(root, "name=quiet", *overrides)
    counting_corpus(quiet)
    undisturbed = pretrain.run(quiet).artifact
    assert undisturbed is not None

    config = tiny(root, "name=killed", *overrides)
    corpus = counting_corpus(config)
    with Hunter(Store(str(root)), "killed", KILLS, seed) as hunter:
        finished = pretrain.run(config).artifact
    assert finished is not None
    check_as_undisturbed(finished, undisturbed, corpus, hunter)
    for kill in hunter.killed:
        print(f"killed {kill['pid']} after step {kill['after_step']}")
