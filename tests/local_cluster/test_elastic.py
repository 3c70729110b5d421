"""Real Ray Train: a run goes on with another number of workers, at another ZeRO stage."""

from pathlib import Path

import pytest

from cluster.journal import Journal
from cluster.stages import resolved
from cluster.storage import Store
from pipelines import pretrain
from pipelines.training import elastic
from pipelines.training.checkpoint import read_history
from tests import gloo, ranks
from tests.corpora import counting_corpus
from tests.hunting import tiny

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_run_goes_on_with_fewer_workers_at_another_stage(root: Path) -> None:
    settings = ["name=shrunk", "train.precision=fp32", "train.steps=24"]
    two = tiny(root, *settings, "train.zero_stage=3")
    counting_corpus(two, ragged=True)
    (undisturbed, _) = gloo.launch(2, ranks.steps, resolved(two), 24, save_at=16)

    one = tiny(root, *settings, "train.workers=1", "train.zero_stage=2")
    finished = pretrain.run(one).artifact
    assert finished is not None and finished.manifest.complete
    assert finished.manifest.detail["run"] == ranks.RUN
    assert finished.manifest.detail["world_size"] == 1
    rows = read_history(finished)
    assert [row["step"] for row in rows] == [float(n) for n in range(1, 25)]
    assert [row["loss"] for row in rows] == pytest.approx(undisturbed["losses"], rel=1e-4)

    events = [(event.name, event.fields) for event in Journal(Store(str(root)), ranks.RUN).events()]
    assert [fields["step"] for name, fields in events if name == "resharded"] == [16]
    launches = [fields for name, fields in events if name == "launch"]
    assert [(told["step"], told["workers"]) for told in launches] == [(16, 1)]
    assert Store(str(root)).all(elastic.KIND) == []
