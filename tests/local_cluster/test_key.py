"""An encrypted corpus whose key is not there, or another one, for those who would read it."""

from pathlib import Path

import pytest

from cluster.config import RunConfig
from cluster.errors import HeliostatError, UsageError
from cluster.session import open_store
from cluster.stages import resolved
from cluster.storage import Artifact
from pipelines import evaluate, pretrain
from pipelines.data.sealing import VARIABLE
from tests import fakes, hunting, observed_data

# Its workers started without a key.
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

KEY, OTHER = "0a" * 32, "0b" * 32


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Of a corpus that was prepared with `KEY`."""
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"第{n}篇：绝密的内容 secret content\n" * 20, "utf-8")
    sizes = ("data.vocab_size=300", "data.heldout_fraction=0.3", "train.workers=1")
    given = (f"data.sources=[{tmp_path}/*.txt]", "data.encrypt=true", *sizes)
    config = hunting.tiny(tmp_path / "root", *given)
    monkeypatch.setenv(VARIABLE, KEY)
    observed_data.prepared(config)
    return config


def checkpoint(config: RunConfig) -> Artifact:
    """Enough of one for its corpus to be looked for."""
    store = open_store(config)
    corpus = store.latest("corpus", config.name)
    assert corpus is not None
    return fakes.commit(
        store, "checkpoint", config.name, parents=(corpus,), config=resolved(config)
    )


@pytest.mark.parametrize(
    ("here", "message"),
    [(None, f"{VARIABLE} is not set"), (OTHER, "another key"), (KEY, "set it on every node")],
)
def test_no_stage_begins_without_the_key(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, here: str | None, message: str
) -> None:
    """With the right key on the driver alone, it is the workers who miss it."""
    if here is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, here)
    kind = HeliostatError if here == KEY else UsageError
    store = open_store(config)
    with pytest.raises(kind, match=message) as caught:
        pretrain.run(config)
    assert KEY not in str(caught.value) and store.latest("checkpoint", config.name) is None
    checkpoint(config)
    with pytest.raises(kind, match=message) as caught:
        evaluate.run(config)
    assert KEY not in str(caught.value) and store.latest("evaluation", config.name) is None
