"""A training run in MLflow while it goes on: figures by step, each step once.

Only drivers talk to MLflow. A run that is killed and continued, by the same command or another, is
one run there too: what is logged already is asked for, not remembered.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import HeliostatError
from cluster.registry import client, files_location, named_errors, registry_uri
from cluster.storage import Store
from cluster.telemetry import Row

Status = Literal["FINISHED", "KILLED", "FAILED"]
KEY = "loss"
"""Figure that every row has; its history tells which steps are logged."""
BATCH = {"metrics": 1000, "params": 100}
"""Entries that an MLflow server takes in one request."""
PARENT_TAG = "mlflow.parentRunId"
LONGEST_PARAM = 500
PAGE = 25_000
"""Points of a history that are asked for at once."""
SEND_SECONDS = 5.0
PATIENCE_SECONDS = 20.0
"""For the last figures, when a run has ended."""


class Tracking:
    """One run of an experiment. Everything may be said again without being there twice.

    Args:
        experiment: name, made on first use.
        run: name of the run in it.
        parent: run that MLflow shows it below.
        files: URI for files of an experiment that is made here (`registry.files_location`); None
            leaves that to MLflow's server.

    Raises:
        HeliostatError: from every method, if MLflow cannot be reached or refuses.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run: str,
        parent: "Tracking | None" = None,
        files: str | None = None,
    ) -> None:
        self.uri, self._experiment, self._run, self._parent = uri, experiment, run, parent
        self._files = files

    @staticmethod
    def of(store: Store, config: RunConfig, run: str, uri: str | None = None) -> "Tracking":
        """A run of a recipe, in the registry of its config unless another is named.

        Raises:
            ConfigError: if there is none for this storage root.
        """
        uri = uri or registry_uri(store, config)
        return Tracking(uri, config.name, run, files=files_location(store, uri, config.name))

    def begin(self, params: Mapping[str, Any]) -> None:
        """Find the run or make it; it is running from now on."""
        with named_errors(self.uri):
            from mlflow.entities import Param

            if self._is_new:
                texts = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in params.items()]
                for start in range(0, len(texts), BATCH["params"]):
                    batch = texts[start : start + BATCH["params"]]
                    self._client.log_batch(self._id, params=batch)
            self._client.update_run(self._id, status="RUNNING")

    def log(self, rows: Sequence[Row]) -> None:
        """Figures of some steps, but of those that are logged already; `step` is the key."""
        fresh = [row for row in rows if int(row["step"]) not in self._steps]
        # Together in one request: a step is there whole or not at all.
        per_request = BATCH["metrics"] // max(map(len, fresh), default=1)
        for start in range(0, len(fresh), per_request):
            some = fresh[start : start + per_request]
            self._send(
                [(int(row["step"]), {k: row[k] for k in row if k != "step"}) for row in some]
            )
            self._steps.update(int(row["step"]) for row in some)

    def end(self, status: Status, metrics: Mapping[str, float] | None = None) -> None:
        """
        Args:
            metrics: figures of the whole run.
        """
        last = max(self._steps, default=0)
        with named_errors(self.uri):
            known = self._client.get_run(self._id).data.metrics
        self._send([(last, {k: v for k, v in (metrics or {}).items() if k not in known})])
        with named_errors(self.uri):
            self._client.set_terminated(self._id, status=status)

    def _send(self, figures: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        with named_errors(self.uri):
            from mlflow.entities import Metric
            from mlflow.utils.time import get_current_time_millis

            now = get_current_time_millis()
            points = [
                Metric(key, float(value), now, step)
                for step, row in figures
                for key, value in row.items()
            ]
            for start in range(0, len(points), BATCH["metrics"]):
                batch = points[start : start + BATCH["metrics"]]
                self._client.log_batch(self._id, metrics=batch)

    @cached_property
    def _client(self) -> Any:
        return client(self.uri)

    @cached_property
    def _found(self) -> tuple[str, bool]:
        """Id of the run, and whether it was made just now."""
        known = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            known.experiment_id
            if known
            else self._client.create_experiment(self._experiment, artifact_location=self._files)
        )
        found = self._client.search_runs(
            [experiment], f"tags.`mlflow.runName` = '{self._run}'", max_results=1
        )
        if found:
            return str(found[0].info.run_id), False
        tags = {PARENT_TAG: self._parent._id} if self._parent else {}
        made = self._client.create_run(experiment, run_name=self._run, tags=tags)
        return str(made.info.run_id), True

    @property
    def _id(self) -> str:
        return self._found[0]

    @property
    def _is_new(self) -> bool:
        return self._found[1]

    @cached_property
    def _steps(self) -> set[int]:
        """Steps that are logged."""
        with named_errors(self.uri):
            if self._is_new:
                return set()
            points = self._client.get_metric_history(self._id, KEY)
            return {int(point.step) for point in points}


class Tracker:
    """Logs from a thread of its own: a server that is slow or away does not hold a run up.

    What could not be logged is tried again with what comes next.
    """

    def __init__(self, tracking: Tracking, params: Mapping[str, Any]) -> None:
        self._tracking, self._params = tracking, params
        self._rows: list[Row] = []
        self._begun, self._complained = False, False
        self._status: Status | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="tracking")
        self._thread.start()

    def put(self, rows: Sequence[Row]) -> None:
        self._rows.extend(rows)

    def end(self, status: Status) -> None:
        """Log what is left, for as long as `PATIENCE_SECONDS`."""
        self._status = status
        self._wake.set()
        self._thread.join(PATIENCE_SECONDS)

    def _keep(self) -> None:
        while self._status is None:
            self._wake.wait(SEND_SECONDS)
            self._attempt()
        self._attempt()

    def _attempt(self) -> None:
        status, rows = self._status, list(self._rows)
        try:
            if not self._begun:
                self._tracking.begin(self._params)
                self._begun = True
            self._tracking.log(rows)
            if status is not None:
                self._tracking.end(status)
        except HeliostatError as error:
            if not self._complained:
                progress.say(f"{error}: the run goes on, its figures are logged when that is back")
            self._complained = True
            return
        del self._rows[: len(rows)]
