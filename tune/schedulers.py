"""What ends trials early, or has them go on from one another: Ray Tune's own, set up for us."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from tune.ledger import Ledger, Row
from tune.space import Choice, Range, Space

TIME = "samples"
"""Rows trained on: what trials are compared at, also where their batches differ."""


def scheduler(space: Space, steps: int, every: int, book: Ledger | None = None) -> TrialScheduler:
    """
    Args:
        steps: of a trial, through all of its folds.
        every: steps between reports.
        book: what trials did before the search was stopped.
    """
    settings, batch = space.config.tune, space.config.train.global_batch
    grace = max(1.0, settings.grace * steps * batch)
    if settings.scheduler == "asha":
        most = steps * _largest_batch(space)
        return Asha(
            book,
            time_attr=TIME,
            max_t=most,
            grace_period=grace,
            reduction_factor=settings.reduction,
        )
    if settings.scheduler == "median":
        return Median(
            book,
            time_attr=TIME,
            grace_period=grace,
            min_samples_required=2,
            min_time_slice=math.inf,  # else it pauses trials until there are others to compare with
        )
    if settings.scheduler == "pbt":
        return _population(space, settings.perturb_every or 2 * every)
    return FIFOScheduler()


class Asha(AsyncHyperBandScheduler):
    """Knows again what trials reported before the driver died: Ray keeps nothing of it, and would
    compare a trial's late reports with the first ones of others."""

    def __init__(self, book: Ledger | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._before = Before(book)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for row in self._before.rows(trial):
            reward = self._metric_op * row[self._metric]
            self._trial_info[trial.trial_id].on_result(trial, row[TIME], reward)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.STOP if self._before.ended(trial) else decision


class Median(MedianStoppingRule):
    """The same. A report that comes again takes the place of the one before."""

    def __init__(self, book: Ledger | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._before = Before(book)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if rows := self._before.rows(trial):
            self._results[trial] = rows

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        earlier = [row for row in self._results.get(trial, []) if row[TIME] < result[TIME]]
        if earlier:
            self._results[trial] = earlier
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.STOP if self._before.ended(trial) else decision


class Before:
    """What the ledger says of trials when a search goes on."""

    def __init__(self, book: Ledger | None) -> None:
        self._book = book
        self._ended: set[str] = set()

    def rows(self, trial: Any) -> list[Row]:
        """To be asked for as a trial is added."""
        attempt = self._book.read(trial.trial_id) if self._book else None
        if attempt is None:
            return []
        if attempt.state == "ended":
            self._ended.add(attempt.trial)
        return [row for row in attempt.rows if TIME in row]

    def ended(self, trial: Any) -> bool:
        """Whether it was decided to end the trial, which Ray had not noted when it was killed."""
        return trial.trial_id in self._ended


def _largest_batch(space: Space) -> int:
    sizes = [space.config.train.global_batch]
    for dimension in space.free:
        if dimension.key == "train.global_batch":
            domain = dimension.domain
            sizes += domain.options if isinstance(domain, Choice) else []
            sizes += [int(domain.high)] if isinstance(domain, Range) else []
    return max(sizes)


def _population(space: Space, every: int) -> TrialScheduler:
    # Ray draws from Python's own generator.
    random.seed(space.config.seed)
    mutations: dict[str, Any] = {}
    for dimension in space.free:
        domain = dimension.domain
        if isinstance(domain, Choice):
            mutations[dimension.key] = list(domain.options)
        elif isinstance(domain, Range):
            mutations[dimension.key] = partial(within, domain)
    return Population(
        time_attr="step",
        perturbation_interval=every,
        hyperparam_mutations={"values": mutations},
        custom_explore_fn=Mended(space),
        log_config=False,
        synch=True,  # allows trials that are paused to be given other weights
    )


class Population(PopulationBasedTraining):
    """Trials wait at every interval until all that run have come to theirs; then the worst take
    the weights of the best.

    By itself Ray compares a trial with what others have reported so far, which is nothing where
    their workers started later; and its way to have them wait takes all to be at the same step,
    so that it stands still for good once one has failed, or begins when others are done.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._waiting: set[Any] = set()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._waiting.discard(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        state, step = self._trial_state[trial], result[self._time_attr]
        if step - state.last_perturbation_time < self._perturbation_interval:
            return TrialScheduler.CONTINUE
        self._save_trial_state(state, step, result, trial)
        self._waiting.add(trial)
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A trial that may go on; None while all of them wait for one that runs."""
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if all(trial.status == Trial.PAUSED and trial in self._waiting for trial in live):
            self._exchange(tune_controller, live)
        ready = [t for t in live if t.status == Trial.PAUSED and t not in self._waiting]
        return next(iter(ready or [t for t in live if t.status == Trial.PENDING]), None)

    def _exchange(self, tune_controller: Any, live: list[Any]) -> None:
        worst, best = self._quantiles()
        between = [trial for trial in live if trial not in worst and trial not in best]
        for trial in [*best, *between, *worst]:  # what is taken has to be there
            state = self._trial_state[trial]
            state.last_perturbation_time = state.last_train_time
            self._checkpoint_or_exploit(trial, tune_controller, best, worst)
        self._waiting.clear()


def within(domain: Range) -> float:
    """By chance, evenly on the range's own scale."""
    if domain.log:
        value = math.exp(random.uniform(math.log(domain.low), math.log(domain.high)))
    else:
        value = random.uniform(domain.low, domain.high)
    return clamped(domain, value)


def clamped(domain: Range, value: float) -> float:
    """The nearest value of a range."""
    value = min(max(value, domain.low), domain.high)
    if not domain.whole:
        return value
    stepped = domain.low + round((value - domain.low) / domain.step) * domain.step
    return int(stepped if stepped <= domain.high else stepped - domain.step)


@dataclass(frozen=True)
class Mended:
    """Brings values that were multiplied back into the space, and derives what follows."""

    space: Space

    def __call__(self, chosen: dict[str, Any]) -> dict[str, Any]:
        values: Mapping[str, Any] = chosen["values"]

        def draw(key: str, domain: Range | Choice) -> Any:
            return clamped(domain, values[key]) if isinstance(domain, Range) else values[key]

        return {**chosen, "values": self.space.point(draw)}
