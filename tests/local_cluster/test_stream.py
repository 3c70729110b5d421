"""Rows that are prepared while others are trained on: how far ahead, and which."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RunConfig
from cluster.session import open_store
from cluster.storage import Artifact, Store
from pipelines import prepare, pretrain
from pipelines.data import live
from pipelines.data.live import Place
from pipelines.training import ledger, stream
from tests import fakes, streamed
from tests.hunting import Hunter

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

DOCUMENTS = 48
ROW = 1 << 17
"""Tokens: a document of a hundred bytes becomes a row of 256 KB, which is quickly made."""
ROW_BYTES = 2 * ROW
MAY_WAIT = 2 << 20
RUNNING = 4
"""Tasks that a CPU each of the session runs at once."""


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; each document says where to leave a word that it was read."""
    top = tmp_path_factory.mktemp("pile")
    (top / "read").mkdir()
    for n in range(DOCUMENTS):
        source = top / ("诗" if n % 3 else "code")
        source.mkdir(exist_ok=True)
        text = f"{top / 'read'}\n第{n}篇：定日镜跟随太阳，把光投向高塔顶端的一点。\n" * 2
        (source / f"{n:02d}.txt").write_text(text, encoding="utf-8")
    return top


def config(pile: Path, root: Path, *more: str) -> RunConfig:
    return fakes.config(
        "gpt-demo",
        "train.input=stream",
        f"data.sources=[{pile}/诗, {pile}/code]",
        "data.cleaning=[{custom: 'tests.prose:noted'}]",
        "data.partition_bytes=100",
        f"data.sequence_length={ROW}",
        "data.vocab_size=300",
        "data.heldout_fraction=0.2",
        "train.steps=2",
        "train.global_batch=1",
        "train.workers=1",
        "train.warmup_steps=1",
        "train.shuffle_window=1",
        "data.row_group_rows=1",
        *more,
        root=root,
    )


@pytest.fixture(scope="module")
def corpus(pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = prepare.run(config(pile, tmp_path_factory.mktemp("root"))).artifact
    assert made is not None
    return made


def read(pile: Path) -> int:
    return len(list((pile / "read").iterdir()))


def settled(count: Callable[[], int], seconds: float = 3.0) -> int:
    """A count once it has not changed for so long."""
    seen, since = count(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.1)
        if (now := count()) != seen:
            seen, since = now, time.monotonic()
    return seen


def batches(settings: RunConfig, corpus: Artifact) -> Iterator[Any]:
    """What a worker is handed by Ray Train, one row at a time."""
    feed = stream.Feed(pretrain._job(open_store(settings), corpus, settings))
    (shards,) = stream.options(settings).configure({stream.NAME: feed()}, 1, None, None)
    rows = shards[stream.NAME].iter_batches(
        batch_size=1, batch_format="pyarrow", prefetch_batches=2
    )
    yield from rows


def left_alone(pile: Path, corpus: Artifact, may_wait: int) -> tuple[int, list[Any]]:
    """How many documents are read ahead of a trainer that takes two rows and stops; then the
    rows that come when it goes on."""
    for word in (pile / "read").iterdir():
        word.unlink()
    settings = config(pile, Path(corpus.store.base), f"train.stream_bytes={may_wait}")
    rows = batches(settings, corpus)
    first = [next(rows), next(rows)]
    ahead = settled(lambda: read(pile)) - len(first)
    return ahead, [*first, *rows]


@pytest.mark.chaos
def test_no_more_is_prepared_than_may_wait(pile: Path, corpus: Artifact) -> None:
    bounded, rows = left_alone(pile, corpus, MAY_WAIT)
    most = MAY_WAIT // ROW_BYTES + RUNNING
    assert 0 < bounded <= 2 * most < DOCUMENTS
    places = [(row["epoch"][0].as_py(), Place.of(row["id"][0].as_py())) for row in rows]
    assert len(set(places)) == len(places) > 60
    free, _ = left_alone(pile, corpus, 1 << 30)
    assert free > 2 * bounded


@pytest.mark.chaos
def test_a_stream_weighs_its_sources(pile: Path, corpus: Artifact) -> None:
    mix = f"train.mix={{'{pile}/诗': 2, '{pile}/code': 0}}"
    settings = config(pile, Path(corpus.store.base), mix)
    parts = stream.partitions(stream.Corpus(corpus), settings)
    sources = [
        parts[Place.of(row["id"][0].as_py()).partition % len(parts)][0].source
        for row in batches(settings, corpus)
    ]
    assert len(sources) > 30 and set(sources) == {f"{pile}/诗"}


def test_a_stream_goes_on_where_it_stopped(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows of partitions that were open are seen again, none is left out, and the log says so."""
    docs = root.parent / "docs"
    streamed.documents(docs)
    given = ("train.steps=24", "train.checkpoint_every=4", "train.max_failures=0")
    settings = streamed.config(str(root), str(docs), *given)
    store = Store(str(root))
    prepare.run(settings)
    with (
        Hunter(store, streamed.NAME, kills=1),
        pytest.raises(Exception, match="training failed"),
    ):
        pretrain.run(settings)
    stopped = store.latest("checkpoint", streamed.NAME)
    assert stopped is not None and not stopped.manifest.complete
    capfd.readouterr()
    finished = pretrain.run(settings).artifact
    step = stopped.manifest.detail["step"]
    said = capfd.readouterr().out
    assert f"; step {step} has seen " in said and "is trained on at least once: where" in said
    assert finished is not None and finished.manifest.complete
    led = ledger.read(finished)
    assert sorted(set(led["step"].tolist())) == list(range(1, 25))
    first = led["epoch"] == 0
    whole = live.finished(led["epoch"][first], led["sample"][first])
    seen = {Place.of(int(number)).partition for number in led["sample"]}
    assert led["epoch"].max() > 0 and {piece.partition for piece in whole} == seen
    assert len(seen) > 10
