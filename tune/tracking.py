"""A study in MLflow: a run of its own, its trials nested below it. Everything may be said again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import HeliostatError
from cluster.storage import Store
from cluster.tracking import Status, Tracking
from tune.ledger import Attempt

ENDS: Mapping[str, Status] = {"done": "FINISHED", "ended": "KILLED", "failed": "FAILED"}


def tell(
    config: RunConfig,
    store: Store,
    study: str,
    attempts: Sequence[Attempt],
    figures: Mapping[str, float] | None = None,
) -> None:
    """Log what trials did. MLflow is an index: where it is away, the study is whole without it.

    Args:
        figures: of the whole study, which is over then.
    """
    try:
        parent = Tracking.of(store, config, study)
        settings = {f"space.{key}": text for key, text in config.tune.space.items()}
        for key in ("search", "scheduler", "trials", "objectives"):
            settings[f"tune.{key}"] = str(getattr(config.tune, key))
        parent.begin(settings)
        for attempt in attempts:
            _tell_one(parent, config, study, attempt)
        if figures is not None:
            parent.end("FINISHED", {k: v for k, v in figures.items() if math.isfinite(v)})
    except HeliostatError as error:
        progress.say(f"tune: no figures go to MLflow: {error}")


def _tell_one(parent: Tracking, config: RunConfig, study: str, attempt: Attempt) -> None:
    nested = Tracking(parent.uri, config.name, f"{study}-{attempt.trial}", parent)
    nested.begin({"role": attempt.role, "seed": attempt.seed, **attempt.values})
    finite = [{k: v for k, v in row.items() if math.isfinite(v)} for row in attempt.rows]
    nested.log([row for row in finite if "loss" in row])
    if attempt.state in ENDS:
        nested.end(ENDS[attempt.state])
