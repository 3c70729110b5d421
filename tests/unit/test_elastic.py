"""Another number of workers, another ZeRO stage: the same batches, losses and gradients."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import ArtifactError, ConfigError, StorageError
from cluster.journal import Journal
from cluster.stages import resolved
from cluster.storage import Artifact, Store
from pipelines import families, pretrain
from pipelines.data.corpus import Corpus
from pipelines.training import elastic
from pipelines.training.engine import World
from pipelines.training.loop import BatchSource
from tests import fakes, gloo, ranks, trained
from tests.corpora import counting_corpus

TINY = [
    "name=tiny",
    "data.sequence_length=16",
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=2",
    "model.intermediate_size=64",
    "train.steps=200",
    "train.global_batch=12",
    "train.warmup_steps=4",
    "train.precision=fp32",
]


def tiny(root: Path, *overrides: str) -> RunConfig:
    return loading.load("gpt-demo", [f"storage.root={root}", *TINY, *overrides])


def plain_gradients(config: RunConfig, corpus: Artifact) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step without DeepSpeed, in one process."""
    family, reader = families.load(config.family), Corpus(corpus)
    torch.manual_seed(config.seed)
    model = family.build_model(config, reader.facts)
    (batch,) = BatchSource(config, family, reader, World(0, 1, torch.device("cpu"))).at(0)
    loss = family.loss(model, batch) / family.count(batch)
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), named


@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=pytest.mark.chaos) for size in (1, 3, 4))]
)
def test_world_size_and_stage_never_change_the_gradient(tmp_path: Path, size: int) -> None:
    configs = [
        tiny(tmp_path, f"train.zero_stage={stage}", "train.gradient_clip=0", "train.workers=1")
        for stage in (0, 1, 2, 3)
    ]
    corpus = counting_corpus(configs[0], ragged=True)
    loss, expected = plain_gradients(configs[0], corpus)
    results = gloo.launch(size, ranks.gradients, [resolved(config) for config in configs])
    for rank in results:
        for stage in rank:
            assert stage["loss"] == pytest.approx(loss, rel=1e-6)
            assert stage["weights"].keys() == expected.keys() == stage["gradients"].keys()
            for name, gradient in expected.items():
                assert torch.equal(stage["weights"][name], results[0][0]["weights"][name])
                torch.testing.assert_close(stage["gradients"][name], gradient, rtol=0, atol=1e-6)


def newest(root: Path) -> Artifact:
    found = Store(str(root)).latest("checkpoint", "tiny")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("stage", "after", "size"),
    [pytest.param(2, 3, 3, marks=pytest.mark.chaos), (3, 1, 1)],
)
def test_a_checkpoint_goes_on_at_another_size_and_stage(
    tmp_path: Path, stage: int, after: int, size: int
) -> None:
    config = tiny(tmp_path, f"train.zero_stage={stage}")
    changed = resolved(tiny(tmp_path, f"train.zero_stage={after}"))
    counting_corpus(config, ragged=True)
    (same, _) = gloo.launch(2, ranks.steps, resolved(config), 10, save_at=5)
    first = newest(tmp_path)
    assert first.manifest.detail["world_size"] == 2
    (there, *_) = gloo.launch(size, ranks.steps, changed, 10, source=first.version, save_at=7)
    assert there["losses"][0] == pytest.approx(same["losses"][5], rel=1e-5)
    assert there["losses"] == pytest.approx(same["losses"][5:], rel=1e-4)

    # What it saved there is an ordinary checkpoint: load it plainly, and convert it again.
    second = newest(tmp_path)
    assert second.manifest.detail["world_size"] == size
    (plain, *_) = gloo.launch(size, ranks.steps, changed, 9, source=second.version)
    assert plain["losses"] == there["losses"][2:4]
    (back, _) = gloo.launch(2, ranks.steps, resolved(config), 9, source=second.version)
    assert back["losses"] == pytest.approx(same["losses"][7:9], rel=1e-4)
    events = [e for e in Journal(first.store, ranks.RUN).events() if e.name == "resharded"]
    assert [event.fields["checkpoint"] for event in events] == [first.id, second.id]


@pytest.mark.chaos
def test_stage_0_goes_on_at_any_size_as_it_is(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.zero_stage=0")
    counting_corpus(config, ragged=True)
    (same, _) = gloo.launch(2, ranks.steps, resolved(config), 8, save_at=4)
    version = newest(tmp_path).version
    (there, *_) = gloo.launch(3, ranks.steps, resolved(config), 8, source=version)
    assert there["losses"] == pytest.approx(same["losses"][4:], rel=1e-5)
    assert Store(str(tmp_path)).all(elastic.KIND) == []


@pytest.mark.chaos
def test_batch_statistics_travel(tmp_path: Path) -> None:
    """Losses of such a model depend on the number of workers; that it goes on does not."""
    config = trained.image_config(
        tmp_path,
        name="tiny",
        train={"global_batch": 12, "precision": "fp32", "warmup_steps": 2, "steps": 60},
    )
    trained.corpus(config, trained.pictures(48), trained.pictures(8, seed=1))
    gloo.launch(2, ranks.steps, resolved(config), 4, save_at=4)
    version = newest(tmp_path).version
    same, other = gloo.launch(2, ranks.steps, resolved(config), 5, source=version)
    (alone,) = gloo.launch(1, ranks.steps, resolved(config), 7, source=version)
    counters = [v for name, v in alone["buffers"].items() if name.endswith("num_batches_tracked")]
    assert counters and all(int(counter) == 4 for counter in counters)
    for name, value in same["buffers"].items():
        assert torch.equal(value, other["buffers"][name])
        assert torch.equal(value, alone["buffers"][name])
    assert all(math.isfinite(loss) for loss in alone["losses"])


def checkpoint_of(store: Store, stage: int = 2, workers: int = 2, **detail: Any) -> Artifact:
    """A checkpoint that nobody will load."""
    told = {"zero_stage": stage, "world_size": workers, "run": "r", "step": 5} | detail
    return fakes.commit(store, "checkpoint", files={"state/a.pt": b"a"}, detail=told)


@pytest.mark.parametrize(
    ("stage", "workers", "convert"),
    [(1, 2, True), (2, 2, False), (2, 3, True), (3, 2, True), (3, 1, True)],
)
def test_only_what_does_not_fit_is_converted(
    tmp_path: Path, stage: int, workers: int, convert: bool
) -> None:
    checkpoint = checkpoint_of(Store(str(tmp_path)))
    assert elastic.needed(checkpoint, workers, stage) is convert
    whole = checkpoint_of(Store(str(tmp_path)), stage=0)
    assert not elastic.needed(whole, workers, 0)
    for saved, wanted in ((whole, 2), (checkpoint, 0)):
        with pytest.raises(ConfigError, match="stages 1, 2 and 3 continue each other, 0 only itse"):
            elastic.needed(saved, workers, wanted)


def convert_by_copying(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_a_checkpoint_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    checkpoint = checkpoint_of(store)
    (Path(checkpoint.path) / "state/stray.pt").write_bytes(b"not ours")
    monkeypatch.setattr(elastic, "convert", convert_by_copying)
    made = elastic.ensure(checkpoint)
    assert [entry.path for entry in made.manifest.files] == ["universal/a.pt"]
    assert made.manifest.parents == (checkpoint.id,)
    assert elastic.ensure(checkpoint).version == made.version == elastic.awaited(checkpoint).version

    Path(made.file("universal/a.pt")).write_bytes(b"damaged")
    elastic.ensure(checkpoint).verify()

    # The next one replaces it: both hold what the checkpoints hold anyway.
    later = checkpoint_of(store, step=9)
    assert elastic.find(later) is None
    assert elastic.ensure(later).manifest.detail["step"] == 9
    assert elastic.find(checkpoint) is None
    elastic.discard(store, "demo", "another run")
    assert elastic.find(later) is not None
    elastic.discard(store, "demo", "r")
    assert store.all(elastic.KIND) == []


def test_a_version_that_comes_again_is_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    monkeypatch.setattr(elastic, "convert", convert_by_copying)
    first = checkpoint_of(store)
    elastic.ensure(first)
    store.delete(first)
    second = checkpoint_of(store, step=6)
    assert second.id == first.id
    assert elastic.find(second) is None


def test_a_damaged_checkpoint_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(Store(str(tmp_path)))
    monkeypatch.setattr(elastic, "convert", convert_by_copying)
    Path(checkpoint.file("state/a.pt")).write_bytes(b"b")
    with pytest.raises(ArtifactError, match="damaged"):
        elastic.ensure(checkpoint)
    assert elastic.find(checkpoint) is None


def test_waiting_for_a_conversion_ends(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(Store(str(tmp_path)))
    began = time.monotonic()
    with pytest.raises(StorageError, match="was not converted"):
        elastic.awaited(checkpoint, timeout=0.3)
    assert time.monotonic() - began < 60


def test_workers_may_be_a_range() -> None:
    for override, sizes in (("3", [3]), ("[1,4]", [1, 2, 3, 4]), ("[2,2]", [2])):
        config = fakes.config("gpt-demo", f"train.workers={override}", "train.global_batch=24")
        assert list(config.train.world_sizes) == sizes
        again = loading.validate(resolved(config))
        assert again.train.workers == config.train.workers


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        ("[2,4]", "divide by 3, which train.workers [2, 4] allows: take 24 or 36"),
        ("[1,32]", "take a narrower range"),
        ("[4,2]", "the least first, not [4, 2]"),
        ("[1,2,3]", "a number or [least, most], not [1, 2, 3]"),
        ("[0,2]", "from 1 to 100000"),
        ("1.5", "a number or [least, most], not 1.5"),
    ],
)
def test_workers_that_cannot_be_are_refused(workers: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fakes.config("gpt-demo", f"train.workers={workers}", "train.global_batch=32")
    assert says in str(caught.value)


def test_every_allowed_share_must_divide_by_the_micro_batch() -> None:
    with pytest.raises(ConfigError, match="8 rows, does not divide by train.micro_batch 3"):
        fakes.config(
            "gpt-demo", "train.workers=[2,3]", "train.global_batch=24", "train.micro_batch=3"
        )


def test_what_a_worker_says_on_purpose_ends_the_run() -> None:
    from ray.exceptions import ActorDiedError

    ours, others = StorageError("disk full"), RuntimeError("connection reset by peer")
    assert pretrain.final({0: others, 1: ours}) is ours
    assert pretrain.final({0: others}) is None
    assert pretrain.final({0: ours, 1: ActorDiedError()}) is None
