"""Model versions and aliases in MLflow's registry: an index of manifests, which are the truth.

Only drivers talk to it. Without `registry.uri` it is an SQLite file under a local storage root.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.errors import ConfigError, HeliostatError
from cluster.storage import Artifact, Store

ARTIFACT_TAG = "heliostat.artifact"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Schemes of what MLflow's client opens by itself, with no server between."""


def registry_uri(store: Store, config: RunConfig) -> str:
    """
    Raises:
        ConfigError: where the root is remote and no server is named (SQLite needs a disk).
    """
    if config.registry.uri:
        return config.registry.uri
    if not store.is_local:
        raise ConfigError(
            f"registry.uri must name an MLflow server, because storage.root {store.uri} is remote "
            "and the embedded SQLite registry needs a local disk"
        )
    return f"sqlite:///{store.base}/mlflow.db"


def files_location(store: Store, uri: str, experiment: str) -> str | None:
    """URI for the files of an experiment's runs; None where a server says where they go.

    Told nothing, MLflow's client of a database takes `./mlruns` of whoever makes the experiment; in
    a job that is a folder that Ray deletes.
    """
    if not uri.startswith(DATABASES):
        return None
    path = f"mlflow/{experiment}"
    return Path(store.uri_of(path)).as_uri() if store.is_local else store.uri_of(path)


@dataclass(frozen=True)
class Registry:
    uri: str

    @cached_property
    def _client(self) -> Any:
        return client(self.uri)

    def register(self, model: Artifact, alias: str) -> str:
        """Add a model artifact as the next version of its name and move the alias to it.

        Registering the same artifact again changes nothing but the alias.

        Returns:
            The registry's version number; it may differ from the artifact's, the tag
            `heliostat.artifact` is what names the artifact.

        Raises:
            HeliostatError: if the registry cannot be reached or refuses.
        """
        with named_errors(self.uri):
            if not self._client.search_registered_models(f"name = '{model.name}'"):
                self._client.create_registered_model(model.name)
            version = self._version_of(model) or self._add(model)
            self._client.set_registered_model_alias(model.name, alias, version)
        return version

    def resolve(self, name: str, alias: str) -> str | None:
        """Artifact id (`model/name@version`) behind an alias; None where there is none.

        Raises:
            HeliostatError: if the registry cannot be reached.
        """
        with named_errors(self.uri):
            if not self._client.search_registered_models(f"name = '{name}'"):
                return None
            if alias not in self._client.get_registered_model(name).aliases:
                return None
            version = self._client.get_model_version_by_alias(name, alias)
        return str(version.tags.get(ARTIFACT_TAG, "")) or None

    def _version_of(self, model: Artifact) -> str | None:
        for version in self._client.search_model_versions(f"name = '{model.name}'"):
            if version.tags.get(ARTIFACT_TAG) == model.id:
                return str(version.version)
        return None

    def _add(self, model: Artifact) -> str:
        source = model.uri
        if model.store.is_local and self.uri.startswith(("http://", "https://")):
            # A server refuses plain paths: they would be read on its own disk.
            source = f"heliostat://{model.uri}"
        tags = {ARTIFACT_TAG: model.id}
        return str(self._client.create_model_version(model.name, source, tags=tags).version)


def client(uri: str) -> Any:
    """MLflow's client of a server or a database.

    Raises:
        HeliostatError: if it cannot be reached.
    """
    # MLflow counts its users over the network unless told not to, and logs the schema migrations
    # of a new database line by line.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # It prints links to a server's pages; stdout belongs to the one line of `--json`.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Its own 7 retries with growing pauses keep a user waiting for minutes on a wrong address.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    with named_errors(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def named_errors(uri: str) -> Iterator[None]:
    """What goes wrong with MLflow as an error that names the registry.

    Raises:
        HeliostatError: in place of MLflow's own.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise HeliostatError(f"the registry at {uri} failed: {reason}") from error
