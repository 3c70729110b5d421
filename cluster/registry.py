"""Model versions and aliases in MLflow's registry: an index of manifests, which are the truth.

Only drivers talk to it. Without `registry.uri` it is an SQLite file under a local storage root.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster.config import RunConfig
from cluster.errors import ConfigError, HeliostatError
from cluster.storage import Artifact, Store

ARTIFACT_TAG = "heliostat.artifact"


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


@dataclass(frozen=True)
class Registry:
    uri: str

    @cached_property
    def _client(self) -> Any:
        import logging

        # Its schema migrations are logged line by line at the first use of a new database.
        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def register(self, model: Artifact, alias: str) -> str:
        """Add a model artifact as the next version of its name and move the alias to it.

        Registering the same artifact again changes nothing but the alias.

        Returns:
            The registry's version number.
        """
        with _named_errors(self.uri):
            if not self._client.search_registered_models(f"name = '{model.name}'"):
                self._client.create_registered_model(model.name)
            version = self._version_of(model.id, model.name)
            if version is None:
                tags = {ARTIFACT_TAG: model.id}
                version = str(
                    self._client.create_model_version(model.name, model.uri, tags=tags).version
                )
            self._client.set_registered_model_alias(model.name, alias, version)
        return version

    def resolve(self, name: str, alias: str) -> str | None:
        """Artifact id (`model/name@version`) behind an alias; None where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_model_version_by_alias(name, alias)
        except MlflowException:
            return None
        return str(version.tags.get(ARTIFACT_TAG, "")) or None

    def log_run(
        self,
        name: str,
        run: str,
        params: Mapping[str, Any],
        history: list[dict[str, float]],
        metrics: Mapping[str, float],
    ) -> None:
        """Record a finished training run; logging the same run again replaces nothing twice.

        Args:
            history: one row per logged step; `step` is its key.
        """
        from mlflow.entities import Metric, Param

        with _named_errors(self.uri):
            experiment = self._client.get_experiment_by_name(name)
            number = (
                experiment.experiment_id if experiment else self._client.create_experiment(name)
            )
            if self._client.search_runs([number], f"tags.`mlflow.runName` = '{run}'"):
                return
            created = self._client.create_run(number, run_name=run)
            identity = created.info.run_id
            time = created.info.start_time
            points = [
                Metric(key, float(value), time, int(row["step"]))
                for row in history
                for key, value in row.items()
                if key != "step"
            ]
            points += [Metric(key, float(value), time, 0) for key, value in metrics.items()]
            for start in range(0, len(points), 1000):
                self._client.log_batch(identity, metrics=points[start : start + 1000])
            short = [Param(key, str(value)[:500]) for key, value in params.items()]
            for start in range(0, len(short), 100):
                self._client.log_batch(identity, params=short[start : start + 100])
            self._client.set_terminated(identity)

    def _version_of(self, artifact: str, name: str) -> str | None:
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(ARTIFACT_TAG) == artifact:
                return str(version.version)
        return None


@contextmanager
def _named_errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise HeliostatError(f"the registry at {uri} refused: {error}") from error
