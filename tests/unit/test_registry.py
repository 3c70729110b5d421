"""The registry on a real SQLite database."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import loading
from cluster.errors import ConfigError, HeliostatError, UsageError
from cluster.registry import ARTIFACT_TAG, Registry, files_location, registry_uri
from cluster.storage import Artifact, Store
from serving import app, models
from tests import fakes


def model(store: Store, name: str = "demo") -> Artifact:
    staging = store.stage("model", name)
    entry = staging.write("model.safetensors", b"weights %d" % staging.version)
    return staging.commit([entry], fingerprint="f", config={})


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One database for the module: making its tables takes seconds."""
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")


def test_the_alias_follows_the_newest_registration(database: Registry, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first, second = model(store), model(store)
    assert database.register(first, "champion") == "1"
    assert database.resolve("demo", "champion") == first.id == "model/demo@1"
    assert database.register(second, "champion") == "2"
    assert database.resolve("demo", "champion") == second.id
    # The same artifact again: no new version, and the alias goes where it is asked to go.
    assert database.register(first, "champion") == "1"
    assert database.resolve("demo", "champion") == first.id
    versions = database._client.search_model_versions("name = 'demo'")
    assert sorted(v.tags[ARTIFACT_TAG] for v in versions) == [first.id, second.id]


def test_what_is_served_by_an_alias_is_deployed_by_its_version(
    database: Registry, tmp_path: Path
) -> None:
    """The alias moves later; the deployment says what it was when it was made."""
    store = Store(str(tmp_path))
    detail = {"family": "causal_lm", "context_length": 8}
    first, _ = (fakes.commit(store, "model", "voice", detail=detail) for _ in range(2))
    database.register(first, "champion")
    given = [f"registry.uri={database.uri}", "serve.models=[voice@champion]"]
    config = fakes.config("gpt-demo", *given, root=tmp_path)
    assert [served.artifact.id for served in models.chosen(config, store)] == ["model/voice@1"]
    told = yaml.safe_load(app.write_config(config))["applications"][0]["deployments"]
    engine = next(d for d in told if d["name"] == "voice")
    assert engine["user_config"] == {"model": "model/voice@1"}
    assert "champion" not in app.write_config(config)
    with pytest.raises(UsageError, match="voice has no alias challenger: there is voice@1, voice@"):
        models.resolve("voice@challenger", config, store)


def test_aliases_are_independent(database: Registry, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first, second = model(store, "pair"), model(store, "pair")
    database.register(first, "champion")
    database.register(second, "challenger")
    assert database.resolve("pair", "champion") == first.id
    assert database.resolve("pair", "challenger") == second.id


def test_the_registry_may_count_differently_than_the_store(
    database: Registry, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    database.register(model(store, "drift"), "champion")
    model(store, "drift")  # never registered
    third = model(store, "drift")
    assert database.register(third, "champion") == "2"
    assert database.resolve("drift", "champion") == "model/drift@3"


def test_what_is_not_there_resolves_to_nothing(database: Registry, tmp_path: Path) -> None:
    database.register(model(Store(str(tmp_path)), "known"), "champion")
    assert database.resolve("known", "challenger") is None
    assert database.resolve("unknown", "champion") is None


def test_a_new_database_is_made_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Registry(f"sqlite:///{tmp_path}/mlflow.db").register(model(Store(str(tmp_path))), "a")
    assert capfd.readouterr() == ("", "")


def test_errors_name_the_registry(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/missing-folder/mlflow.db")
    (tmp_path / "missing-folder").write_text("a file where a folder should be")
    with pytest.raises(HeliostatError, match="the registry at sqlite"):
        registry.register(model(Store(str(tmp_path / "store"))), "champion")


def config(**registry: Any) -> Any:
    tree = {**loading.read_recipe("gpt-demo"), "registry": registry}
    return loading.validate(tree)


def test_where_the_registry_lives(tmp_path: Path) -> None:
    local = Store(str(tmp_path))
    remote = Store("mock://bucket/root")
    assert registry_uri(local, config()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert registry_uri(remote, config(uri="http://host:5000")) == "http://host:5000"
    with pytest.raises(ConfigError, match=r"registry\.uri must name an MLflow server"):
        registry_uri(remote, config())


def test_where_the_files_of_runs_lie(tmp_path: Path) -> None:
    local, remote = Store(str(tmp_path)), Store("s3://bucket/root?region=eu-north-1")
    database, server = f"sqlite:///{tmp_path}/mlflow.db", "http://host:5000"
    assert files_location(local, database, "demo") == f"file://{tmp_path}/mlflow/demo"
    assert files_location(remote, database, "demo") == (
        "s3://bucket/root/mlflow/demo?region=eu-north-1"
    )
    # A server keeps files by its own settings, on its own disk.
    assert files_location(local, server, "demo") is None
    assert files_location(remote, server, "demo") is None
