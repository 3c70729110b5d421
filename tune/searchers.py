"""What gives Ray Tune the next trial: a list of points, or Optuna asked for one after another.

A combination that cannot be trained, or was tried already, never becomes a trial; Optuna is told
that it is a bad one.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from cluster.errors import ConfigError, UsageError
from tune.space import Choice, Point, Range, Space

ATTEMPTS = 200
"""Combinations in a row that cannot be, or are known, until the space is taken for exhausted."""
PATIENCE = 20
"""Of them, what the sampler may come up with; the others are by chance."""
STARTUP = 10
"""Trials by chance before TPE learns, Optuna's default; of few trials, a third."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Listed(Searcher):
    """The points of a list, in order."""

    def __init__(self, points: Sequence[Point], seed: int) -> None:
        super().__init__()
        self._points, self._seed, self._next = list(points), seed, 0

    def suggest(self, trial_id: str) -> Any:
        if self._next == len(self._points):
            return Searcher.FINISHED
        self._next += 1
        return {"values": self._points[self._next - 1], "seed": self._seed}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(str(self._next))

    def restore(self, checkpoint_path: str) -> None:
        self._next = int(Path(checkpoint_path).read_text())


class Asked(Searcher):
    """Optuna's samplers over our space.

    Args:
        steps: of a trial that was not ended early, through all of its folds.
        own_first: begin with the recipe's own values, where the space holds them.
    """

    def __init__(self, space: Space, steps: int, *, own_first: bool = True) -> None:
        super().__init__()
        self._space, self._steps = space, steps
        self._objectives = dict(space.config.tune.objectives)
        self._study = study(space)
        self._asked: dict[str, optuna.trial.Trial] = {}
        self._tried: set[str] = set()
        own = space.own_point() if own_first else None
        if own is not None:
            own_values = {d.key: own[d.key] for d in space.free if d.key in own}
            self._study.enqueue_trial({k: _told(v) for k, v in own_values.items()})

    def suggest(self, trial_id: str) -> Any:
        """
        Raises:
            UsageError: if no combination can be trained.
        """
        reason = ""
        for attempt in range(ATTEMPTS):
            with self._drawing(by_chance=attempt >= PATIENCE):
                trial = self._study.ask()
                point, why = self._point(trial)
            if point is not None:
                self._asked[trial_id] = trial
                self._tried.add(_mark(point))
                return {"values": point, "seed": self._space.config.seed}
            reason = why or reason
            self._refuse(trial, known=not why)
        if not self._tried:
            raise UsageError(f"tune.space holds nothing that can be trained: {reason}")
        return Searcher.FINISHED

    @contextmanager
    def _drawing(self, *, by_chance: bool) -> Iterator[None]:
        """Of few values, what has learned gives the same good ones again and again."""
        usual = self._study.sampler
        if by_chance:
            seed = self._space.config.seed + len(self._study.trials)
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
        try:
            yield
        finally:
            self._study.sampler = usual

    def _point(self, trial: optuna.trial.Trial) -> tuple[Point | None, str]:
        """A point to train, or why not; without a reason it is one that was tried."""
        try:
            point = self._space.point(_Draw(trial))
        except ConfigError as error:
            return None, str(error)
        why = self._space.reason_against(point)
        if why:
            return None, why
        return (None, "") if _mark(point) in self._tried else (point, "")

    def _refuse(self, trial: optuna.trial.Trial, *, known: bool) -> None:
        # Pruned is worse than all others to TPE, failed is as if it had never been asked for.
        bad = len(self._objectives) == 1 and not known
        self._study.tell(trial, state=TrialState.PRUNED if bad else TrialState.FAIL)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self._asked.get(trial_id)
        if trial is not None and len(self._objectives) == 1:
            (value,) = (float(result[metric]) for metric in self._objectives)
            if math.isfinite(value):
                trial.report(value, int(result["step"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._asked.pop(trial_id, None)
        if trial is None:
            return
        values = [float((result or {}).get(metric, math.nan)) for metric in self._objectives]
        several = len(values) > 1
        if error or not all(map(math.isfinite, values)):
            self._study.tell(trial, state=TrialState.FAIL if several else TrialState.PRUNED)
        elif not several and int((result or {})["step"]) < self._steps:
            # Ended early: Optuna compares it by its reports.
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, values)

    def save(self, checkpoint_path: str) -> None:
        state = (self._study, self._asked, self._tried)
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self._study, self._asked, self._tried = state


class _Draw:
    """Values from an Optuna trial."""

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._trial = trial

    def __call__(self, key: str, domain: Range | Choice) -> Any:
        if isinstance(domain, Choice):
            options = {_told(option): option for option in domain.options}
            return options[self._trial.suggest_categorical(key, list(options))]
        if domain.whole:
            low, high = int(domain.low), int(domain.high)
            return self._trial.suggest_int(key, low, high, log=domain.log, step=domain.step)
        return self._trial.suggest_float(key, float(domain.low), float(domain.high), log=domain.log)


def study(space: Space) -> optuna.Study:
    """An empty study with the sampler that the recipe asks for."""
    settings = space.config.tune
    startup = min(STARTUP, max(2, settings.trials // 3))
    sampler: optuna.samplers.BaseSampler = (
        optuna.samplers.RandomSampler(seed=space.config.seed)
        if settings.search == "random"
        else optuna.samplers.TPESampler(
            n_startup_trials=startup, constant_liar=True, seed=space.config.seed
        )
    )
    directions = ["minimize" if m == "min" else "maximize" for m in settings.objectives.values()]
    return optuna.create_study(directions=directions, sampler=sampler)


def drawn(space: Space, number: int) -> list[Point]:
    """Different points by chance that can be trained; the recipe's own first, if it is one.

    Raises:
        UsageError: if there are fewer.
    """
    asked = Asked(space, 0)
    found = [asked.suggest(str(place)) for place in range(number)]
    points: list[Point] = [f["values"] for f in found if isinstance(f, Mapping)]
    if len(points) < number:
        raise UsageError(
            f"tune.trials {number}: tune.space holds only {len(points)} combinations that can be "
            f"trained: take tune.trials={len(points)} or name more values"
        )
    return points


def possible(space: Space) -> list[Point]:
    """The grid without what cannot be trained.

    Raises:
        UsageError: if nothing is left.
    """
    reasons: list[str] = []
    points: list[Point] = []
    for point in space.grid(space.config.tune.grid_points):
        reason = space.reason_against(point)
        points += [point] if reason is None else []
        reasons += [reason] if reason else []
    if not points:
        raise UsageError(f"tune.space holds nothing that can be trained: {reasons[0]}")
    return points


def _told(value: Any) -> Any:
    """As Optuna takes a category: it knows no lists."""
    return json.dumps(value) if isinstance(value, list) else value


def _mark(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)
