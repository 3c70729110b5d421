"""`up`: which stages run, and in what order. The only way one verb starts another.

The decisions are pure (`decide`); `execute` carries them out.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import ConfigError, UsageError
from cluster.loading import changed
from cluster.session import open_store, session
from cluster.stages import (
    BY_VERB,
    STAGES,
    Stage,
    StageResult,
    fingerprint,
    flat,
    relevant,
    resolved,
    source_of,
)
from cluster.storage import Artifact, Manifest, Store

Action = Literal["run", "resume", "skip"]
SEARCH = "tune"
"""Stage whose result is settings for those behind it."""


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str


@dataclass(frozen=True)
class Done:
    """One row of the closing table."""

    stage: str
    status: Literal["done", "skipped"]
    seconds: float
    artifact: str | None
    headline: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    url: str | None = None


def between(first: str | None, last: str | None) -> list[Stage]:
    """The stages of `up --from first --to last`, in order.

    Raises:
        UsageError: for an unknown stage or an empty range.
    """
    verbs = [stage.verb for stage in STAGES]
    for verb in (first, last):
        if verb is not None and verb not in verbs:
            raise UsageError(f"no stage {verb!r}: the stages are {', '.join(verbs)}")
    begin = verbs.index(first) if first else 0
    end = verbs.index(last) if last else len(verbs) - 1
    if begin > end:
        raise UsageError(f"--from {first} comes after --to {last}")
    return list(STAGES[begin : end + 1])


def decide(
    stage: Stage,
    config: RunConfig,
    newest: Manifest | None,
    source: Artifact | None,
    inputs: Mapping[str, Any],
) -> Decision:
    """What to do about a stage whose newest artifact and source are known.

    Raises:
        ConfigError: if the config differs from the newest artifact's, with the difference.
    """
    if stage.makes is None:
        return Decision("run", "starting the service")
    if newest is None:
        return Decision("run", "nothing made yet")
    if config.fresh:
        return Decision("run", "--fresh")
    _refuse_changes(stage, config, newest)
    if newest.fingerprint != fingerprint(stage, config, source, inputs):
        if source is not None and source.id not in newest.parents:
            return Decision("run", f"its input is new: {source.id}")
        return Decision("run", "its inputs have changed")
    if not newest.complete:
        return Decision("resume", f"continue from {stage.makes}/{newest.name}@{newest.version}")
    return Decision("skip", f"{stage.makes}/{newest.name}@{newest.version} is up to date")


def _refuse_changes(stage: Stage, config: RunConfig, newest: Manifest) -> None:
    changes = difference(relevant(stage, newest.config), relevant(stage, resolved(config)))
    if changes:
        raise ConfigError(
            f"{stage.makes}/{newest.name}@{newest.version} was made with another config "
            f"({'; '.join(changes)}): give this one a name of its own (name={config.name}-2), or "
            "replace the old one with --fresh"
        )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs."""
    keys = sorted(old.keys() | new.keys())
    absent = object()
    return [
        f"{key}: {_shown(old.get(key, absent), absent)} -> {_shown(new.get(key, absent), absent)}"
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]


def wanted(stages: Sequence[Stage], config: RunConfig) -> list[Stage]:
    """Those of several stages that the config does not leave out; one alone is always wanted."""
    if len(stages) == 1:
        return list(stages)
    on = flat(resolved(config))
    return [stage for stage in stages if stage.enabled_by is None or on[stage.enabled_by]]


def tuned(stage: Stage, config: RunConfig, store: Store) -> RunConfig:
    """The config that a stage runs with: behind a search, with what the newest one found.

    Raises:
        UsageError: if the config wants a search and there was none.
    """
    verbs = [one.verb for one in STAGES]
    if not config.tune.enabled or verbs.index(stage.verb) <= verbs.index(SEARCH):
        return config
    study = store.latest(BY_VERB[SEARCH].makes or "", config.name)
    if study is None:
        raise UsageError(
            f"{stage.verb} takes what a search found (tune.enabled) and there was none of "
            f"{config.name}: run `heliostat {SEARCH}` first, or give tune.enabled=false"
        )
    return changed(config, study.manifest.detail["overrides"])


def plan(stages: Sequence[Stage], config: RunConfig, store: Store) -> list[tuple[str, Decision]]:
    """What `execute` would do. A stage after one that runs will see a new input.

    Raises:
        UsageError: for what `execute` would refuse, now or after hours at a later stage.
    """
    planned: list[tuple[str, Decision]] = []
    for stage in wanted(stages, config):
        before = dict(planned).get(_maker_of(stage.needs))
        search = dict(planned).get(SEARCH)
        if search is not None and search.action != "skip" and stage.verb == "pretrain":
            planned.append((stage.verb, Decision("run", f"after {SEARCH}")))
        elif before is not None and before.action != "skip":
            newest = store.latest(stage.makes, config.name) if stage.makes else None
            if newest is not None and not config.fresh:
                _refuse_changes(stage, config, newest.manifest)
            planned.append((stage.verb, Decision("run", f"after {_maker_of(stage.needs)}")))
        else:
            planned.append((stage.verb, _decide_now(stage, tuned(stage, config, store), store)))
    return planned


def execute(
    stages: Sequence[Stage],
    config: RunConfig,
    on_end: Callable[[list[Done]], None] | None = None,
) -> list[Done]:
    """Run the stages in order, skipping what is up to date.

    Args:
        on_end: called when all are done, before a service that one of them started is held open.
    """
    store = open_store(config)
    stages = wanted(stages, config)
    _preflight(stages, config, store)
    done: list[Done] = []
    with session(config) as joined:
        if joined.dashboard:
            progress.say(f"Ray dashboard: http://{joined.dashboard}")
        holding: list[Callable[[], None]] = []
        for stage in stages:
            row, stay = _execute_one(stage, tuned(stage, config, store), store)
            done.append(row)
            holding += [stay] if stay else []
        if on_end is not None:
            on_end(done)
        for stay in holding:
            stay()
    return done


def _execute_one(
    stage: Stage, config: RunConfig, store: Store
) -> tuple[Done, Callable[[], None] | None]:
    decision = _decide_now(stage, config, store)
    if decision.action == "skip":
        progress.say(f"{stage.verb}: skipped, {decision.reason}")
        newest = store.latest(stage.makes or "", config.name)
        assert newest is not None
        metrics = newest.manifest.metrics
        return Done(stage.verb, "skipped", 0.0, newest.id, decision.reason, metrics), None
    progress.say(f"{stage.verb}: {decision.reason}")
    began = time.monotonic()
    run: Callable[[RunConfig], StageResult] = _door(stage).run
    result = run(config)
    seconds = time.monotonic() - began
    identity = result.artifact.id if result.artifact else None
    row = Done(stage.verb, "done", seconds, identity, result.headline, result.metrics, result.url)
    return row, result.stay


def _decide_now(stage: Stage, config: RunConfig, store: Store) -> Decision:
    newest = store.latest(stage.makes, config.name) if stage.makes else None
    source = source_of(stage, store, config)
    inputs = outside_inputs(stage, config)
    return decide(stage, config, newest.manifest if newest else None, source, inputs)


def outside_inputs(stage: Stage, config: RunConfig) -> Mapping[str, Any]:
    """What a stage reads from outside of the store: its module says so in `inputs(config)`."""
    if stage.needs is not None:
        return {}
    reader = getattr(_door(stage), "inputs", None)
    return reader(config) if reader else {}


def _preflight(stages: Sequence[Stage], config: RunConfig, store: Store) -> None:
    """Refuse now what would fail only after minutes of work."""
    for stage in stages:
        check = getattr(_door(stage), "check", None)
        if check is not None:
            check(config)
    plan(stages, config, store)


def _door(stage: Stage) -> Any:
    """A stage's module, with its `run` and, where it has them, `check` and `inputs`."""
    return importlib.import_module(stage.module)


def _maker_of(kind: str | None) -> str:
    return next((stage.verb for stage in STAGES if kind and stage.makes == kind), "")


def _shown(value: Any, absent: object) -> str:
    return "unset" if value is absent else str(value)


__all__ = ["BY_VERB", "Decision", "Done", "between", "decide", "execute", "plan"]
