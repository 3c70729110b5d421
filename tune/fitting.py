"""Whether a trial would fit the machines, by the planner: what does not is never begun."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import planner
from cluster.config import RunConfig
from cluster.errors import UsageError
from cluster.placement import reachable_resources
from cluster.planner import Machines
from cluster.stages import flat, resolved
from pipelines import families, plan
from pipelines.data.corpus import Corpus
from pipelines.families.base import Facts
from pipelines.training import zero
from tune.space import IN_FLIGHT, Fits, everything_fits


@dataclass(frozen=True)
class Planned:
    """Why a config does not fit; None where it does, or where its model cannot be traced."""

    facts: Facts
    machines: Machines
    """With the memory that one worker of one trial may hold."""
    _known: dict[str, str | None] = field(default_factory=dict)
    """By all that can matter for memory: a trace takes a second, and most trials differ in less."""

    def __call__(self, config: RunConfig) -> str | None:
        mark = _mark(config)
        if mark not in self._known:
            self._known[mark] = self._misfit(config)
        return self._known[mark]

    def _misfit(self, config: RunConfig) -> str | None:
        train, gpu = config.train, self.machines.gpu
        precision = zero.precision(train, "cuda" if gpu else "cpu")
        family = families.load(config.family)
        try:
            traced = plan.Tracer(config, family, self.facts, precision)(train)
        except RuntimeError:  # torch's for operators that it knows no shapes of
            return None
        workers = train.world_sizes[0]
        found = planner.need(train, traced, workers, precision, heap=not gpu)
        return planner.misfit(found, self.machines) or None


def fits(config: RunConfig, corpus: Corpus, workers: int, at_once: int) -> Fits:
    """What tells the trials that fit the nodes of a cluster, those that may be started included.

    Args:
        workers: of a trial.
        at_once: trials that share the machines.
    """
    train = config.train.model_copy(update={"workers": workers})
    try:
        machines = plan.of_cluster(reachable_resources(config), train, lambda train: None)
    except UsageError:  # devices of several kinds, or of none that we know
        return everything_fits
    return Planned(corpus.facts, shared(machines, config, at_once))


def shared(machines: Machines, config: RunConfig, at_once: int) -> Machines:
    """What is left of a device for a worker of one trial beside those of the others."""
    if machines.gpu:
        return replace(machines, memory=int(machines.memory * config.tune.gpus_per_worker))
    return replace(machines, memory=machines.memory // at_once)


def _mark(config: RunConfig) -> str:
    known: dict[str, Any] = flat({key: resolved(config)[key] for key in ("model", "train")})
    return json.dumps({k: v for k, v in known.items() if not k.startswith(IN_FLIGHT)}, default=str)
