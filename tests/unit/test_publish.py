"""Publishing: the folder, its card, and what is left when something refuses."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.config import RunConfig
from cluster.errors import ConfigError, HeliostatError
from cluster.manifest import COMMIT
from cluster.placement import Room
from cluster.registry import Registry, registry_uri
from cluster.storage import Artifact, Store
from pipelines import evaluate, publish
from pipelines.evaluation.trained import Trained
from pipelines.families import huggingface
from tests import trained as made


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages without Ray: the task runs in this process."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(Room(1, 0), *arguments)

    @contextmanager
    def no_session(config: RunConfig) -> Iterator[None]:
        yield

    monkeypatch.setattr(publish, "run_on_one_node", call)
    monkeypatch.setattr(publish, "session", no_session)


def evaluated(config: RunConfig) -> Artifact:
    """A checkpoint with its evaluation."""
    if config.family == "causal_lm":
        corpus = made.text_corpus(config)
    else:
        corpus = made.corpus(config, made.pictures(20), made.pictures(6, seed=1))
    trained = Trained.open(made.checkpoint(config, corpus), config)
    report = evaluate.measure(trained, "cpu", lambda done: None)
    return evaluate._commit(Store(config.storage.root), config, trained, report)


def test_a_language_model_is_published_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = made.text_config(tmp_path)
    evaluation = evaluated(config)
    result = publish.run(config)
    model = result.artifact
    assert model is not None and model.id == "model/gpt-demo@1"
    assert result.headline == "gpt-demo@1, champion"
    assert model.manifest.parents[0] == evaluation.id
    assert model.manifest.metrics == evaluation.manifest.metrics
    model.verify()

    opened = AutoModelForCausalLM.from_pretrained(model.path)
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    generation = GenerationConfig.from_pretrained(model.path)
    for key in huggingface.SPECIAL:
        ids = {getattr(opened.config, key), getattr(generation, key), getattr(tokenizer, key)}
        assert ids == {0}
    source = Trained.open(evaluation.store.artifact("checkpoint", config.name, 1), config)
    expected = source.model().state_dict()
    for name, value in opened.state_dict().items():
        assert torch.equal(value, expected[name])

    detail = model.manifest.detail
    assert detail["family"] == "causal_lm" and detail["context_length"] == 32
    assert len(detail["prompts"]) == 3
    for recorded in detail["prompts"]:
        tokens = tokenizer(recorded["prompt"])["input_ids"]
        assert tokens == recorded["tokens"]
        answer = opened.generate(
            torch.tensor([tokens]), max_new_tokens=len(recorded["greedy"]), do_sample=False
        )
        assert answer[0, len(tokens) :].tolist() == recorded["greedy"]


def test_nothing_in_the_folder_runs_code_and_the_card_tells_the_story(tmp_path: Path) -> None:
    config = made.text_config(tmp_path, publish={"license": "apache-2.0"})
    evaluated(config)
    model = publish.run(config).artifact
    assert model is not None
    names = {entry.path for entry in model.manifest.files}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = model.read_bytes("README.md").decode()
    _, head, body = card.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["license"] == "apache-2.0" and fields["pipeline_tag"] == "text-generation"
    assert fields["library_name"] == "transformers" and "bits_per_byte" in fields["metrics"]
    commit = Store(config.storage.root).read(f"{tmp_path}/checkpoint/gpt-demo@1/{COMMIT}")
    assert commit is not None and commit.decode() in body
    for part in (
        "AutoModelForCausalLM",
        "corpus/gpt-demo@1",
        "builtin:python-stdlib",
        "| dropped.short | 1 |",
        "| model.hidden_size | 32 |",
        "gzip -9",
        "not de-identified",
    ):
        assert part in body


def test_a_classifier_is_published_and_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    from pipelines import families

    config = made.image_config(tmp_path)
    evaluated(config)
    model = publish.run(config).artifact
    assert model is not None
    opened = AutoModelForImageClassification.from_pretrained(model.path)
    assert opened.config.id2label == {0: "one", 1: "零"}
    assert model.manifest.detail["prompts"] == []
    predictor = families.load("image_classifier").predictor(Path(model.path))
    (answer,) = predictor.predict([{"pixels": [[0] * 20] * 20}])
    assert sum(answer["scores"].values()) == pytest.approx(1.0)


def test_publishing_again_moves_the_alias(tmp_path: Path) -> None:
    config = made.text_config(tmp_path)
    evaluated(config)
    publish.run(config)
    publish.run(config.model_copy(update={"fresh": True}))
    registry = Registry(registry_uri(Store(str(tmp_path)), config))
    assert registry.resolve("gpt-demo", "champion") == "model/gpt-demo@2"
    experiment = registry._client.get_experiment_by_name("gpt-demo")
    (run,) = registry._client.search_runs([experiment.experiment_id])
    assert run.data.params["model.hidden_size"] == "32"
    assert len(registry._client.get_metric_history(run.info.run_id, "loss")) == 29
    assert "heldout_bits_per_byte" in run.data.metrics


def test_the_index_is_made_again_from_manifests(tmp_path: Path) -> None:
    config = made.text_config(tmp_path)
    evaluated(config)
    publish.run(config)
    publish.run(config)
    store = Store(config.storage.root)
    before = _indexed(registry_uri(store, config))
    assert before["champion"] == "model/gpt-demo@2" and before["loss"]
    empty = made.text_config(tmp_path, registry={"uri": f"sqlite:///{tmp_path}/again.db"})
    lines = publish.rebuild(empty)
    assert [line.partition(" is ")[0] for line in lines] == ["model/gpt-demo@1", "model/gpt-demo@2"]
    assert _indexed(empty.registry.uri) == before
    publish.rebuild(empty)
    assert _indexed(empty.registry.uri) == before  # nothing twice
    # A model whose checkpoint was deleted is a model nevertheless.
    [checkpoint] = store.all("checkpoint")
    store.delete(checkpoint)
    third = made.text_config(tmp_path, registry={"uri": f"sqlite:///{tmp_path}/third.db"})
    assert "its run stays unknown: checkpoint/" in publish.rebuild(third)[0]
    assert Registry(third.registry.uri).resolve("gpt-demo", "champion") == "model/gpt-demo@2"


def _indexed(uri: str) -> dict[str, Any]:
    """What MLflow holds of `gpt-demo`: runs with their figures, versions, the alias."""
    client = Registry(uri)._client
    experiment = client.get_experiment_by_name("gpt-demo")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    return {
        "champion": Registry(uri).resolve("gpt-demo", "champion"),
        "versions": len(client.search_model_versions("name = 'gpt-demo'")),
        "loss": sorted((point.step, point.value) for point in history),
        "figures": run.data.metrics,
        "params": run.data.params,
    }


def test_a_registry_that_refuses_leaves_no_model(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the registry's folder should be")
    config = made.text_config(tmp_path, registry={"uri": f"sqlite:///{tmp_path}/taken/mlflow.db"})
    evaluated(config)
    with pytest.raises(HeliostatError, match="the registry at"):
        publish.run(config)
    assert Store(str(tmp_path)).latest("model", "gpt-demo") is None
    assert not list((tmp_path / "model").iterdir())


class Forgetful:
    """A family whose folder opens to another model."""

    def __init__(self, family: Any) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def reopen(self, folder: Path) -> torch.nn.Module:
        model: torch.nn.Module = self._family.reopen(folder)
        with torch.no_grad():
            next(model.parameters())[0] += 0.5
        return model


def test_a_folder_that_opens_to_another_model_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import families

    config = made.text_config(tmp_path)
    evaluated(config)
    forgetful = Forgetful(families.load("causal_lm"))
    monkeypatch.setattr(families, "load", lambda name: forgetful)
    with pytest.raises(HeliostatError, match="opens to another model: logits differ by"):
        publish.run(config)
    assert not list((tmp_path / "model").iterdir())
    assert not (tmp_path / "mlflow.db").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    huggingface.check_layout(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(HeliostatError, match=r"safetensors only, not pytorch_model\.bin"):
        huggingface.check_layout(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = made.text_config(tmp_path)
    corpus = made.text_corpus(config)
    model = Trained.open(made.checkpoint(config, corpus), config).model()
    hugging: Any = model
    hugging.config.pad_token_id = 7
    with (
        corpus.local("encoder/") as folder,
        pytest.raises(HeliostatError, match="pad_token_id is 7 and its tokenizer's 0"),
    ):
        huggingface.export(model, folder, tmp_path / "out")


def test_the_preflight_wants_a_server_for_a_remote_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "open_store", lambda config: Store("mock://bucket/root"))
    with pytest.raises(ConfigError, match=r"registry\.uri must name"):
        publish.check(made.text_config(Path("unused")))


def test_the_manifest_hash_in_a_card_is_the_commit(tmp_path: Path) -> None:
    artifact = made.text_corpus(made.text_config(tmp_path))
    raw = (Path(artifact.path) / "manifest.json").read_bytes()
    assert publish._digest(artifact) == hashlib.sha256(raw).hexdigest()
    again = artifact.store.artifact("corpus", artifact.name, 1)
    assert publish._digest(again) == publish._digest(artifact)
    assert json.loads(raw)["kind"] == "corpus"
