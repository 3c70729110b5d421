"""One trial: a run of the pretraining stage that Ray Tune drives from report to report.

The actor of a trial only watches: it takes no CPU, its workers take theirs. Ray Tune decides at
each report, while the workers wait at their gate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune import Trainable

from cluster import loading
from cluster.config import RunConfig
from cluster.config.tune import METRICS
from cluster.errors import HeliostatError
from cluster.stages import resolved
from pipelines.training.loop import TrainJob
from pipelines.training.trial import Message, Trial
from tune.crew import Crew

WORST = math.inf
"""What a trial that failed counts as, whichever end is the better one: see `failed`."""


@dataclass(frozen=True)
class Plan:
    """What all trials of a study have in common; plain data."""

    config: dict[str, Any]
    """The recipe, resolved."""
    root: str
    corpus: tuple[str, int]
    study: str
    """Names the runs."""
    name: str
    """Begins the names of the checkpoints."""
    steps: int
    every: int
    """Steps between reports."""
    keep: bool
    """Keep every checkpoint, because others may go on from it."""


def checkpoint_name(plan: Plan, trial: str) -> str:
    return f"{plan.name}.{trial}"


def trial_config(plan: Plan, trial: str, chosen: Mapping[str, Any]) -> RunConfig:
    """The recipe as a trial runs it.

    Args:
        chosen: `values` by dotted key, and `seed`.
    """
    recipe = loading.validate(dict(plan.config))
    train = recipe.train
    return loading.changed(
        recipe,
        {
            "train.workers": train.world_sizes[0],
            **chosen["values"],
            "name": checkpoint_name(plan, trial),
            "seed": chosen["seed"],
            "train.heldout_every": plan.every,
            "train.heldout_rows": recipe.tune.heldout_rows,
            "train.keep_checkpoints": 10**6 if plan.keep else train.keep_checkpoints,
            "train.keep_best": 0,
            # Where trials go on from one another they are saved for that.
            "train.checkpoint_every": plan.steps if plan.keep else train.checkpoint_every,
        },
    )


def cut(plan: Plan, chosen: Mapping[str, Any], start: tuple[str, int] | None) -> Trial:
    """How a trial's run differs from one of its own."""
    confirm = bool(chosen.get("confirm"))
    return Trial(
        plan.steps,
        start,
        confirm=confirm,
        # The winner is confirmed on rows that are held out of all folds.
        folds=0 if confirm else int(plan.config["tune"]["folds"]),
        fold_seed=int(plan.config["seed"]),
    )


def failed(config: RunConfig) -> dict[str, float]:
    """The figures of a trial that failed: worse than any."""
    return {
        metric: WORST if mode == "min" else -WORST
        for metric, mode in {**METRICS, **config.tune.objectives}.items()
    }


class Objective(Trainable):
    """Steps of Ray Tune are reports of the run."""

    _chosen: dict[str, Any]
    _config: RunConfig
    _begun: bool
    """Whether the run is under way."""
    _start: tuple[str, int] | None
    """Checkpoint that the run goes on from."""
    _saved: tuple[str, int] | None
    """Checkpoint that others may go on from."""
    _generation: str
    """Tells the runs of a trial apart, each of which goes on from another checkpoint."""
    _report: dict[str, Any]
    _folds: dict[int, float]
    """Loss on each fold so far."""
    _crew: Crew | None

    def setup(self, config: dict[str, Any], plan: Plan) -> None:
        self._plan, self._crew = plan, None
        self._choose(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial in the same process, and with the same workers where they suit it."""
        self._stop()
        self._choose(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next report; with `done`, the last one."""
        asked = time.monotonic()
        crew = self._crew if self._begun and self._crew else self._set_out()
        crew.answer("go")
        message = crew.hears(self._last)
        if message is None:
            return self._ended(crew)
        waited = {"waited_seconds": time.monotonic() - asked}
        self._report = self._as_report(message) | waited
        if self._last < self._plan.steps * max(1, self._cut.folds):
            return self._report
        crew.answer("go")
        while crew.hears(self._last) is not None:
            pass
        return self._ended(crew)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where a run that goes on from here begins: our own checkpoint, by name."""
        if self._begun and self._crew is not None and self._crew.waiting:
            self._crew.answer("save")
            message = self._crew.hears(self._last)
            self._saved = tuple(message["checkpoint"]) if message else None
        return {"start": self._saved, "report": self._report}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from what another trial saved, or this one."""
        assert checkpoint is not None
        self._stop()
        self._start = self._saved = checkpoint["start"]
        self._report = checkpoint["report"]
        self._generation = f"-{time.time_ns():x}"

    def cleanup(self) -> None:
        if self._crew is not None:
            self._crew.dismiss()

    def _choose(self, config: dict[str, Any]) -> None:
        self._chosen, self._begun, self._generation = config, False, ""
        self._start, self._saved = None, None
        self._report, self._folds = {}, {}

    @property
    def _cut(self) -> Trial:
        return cut(self._plan, self._chosen, self._start)

    @property
    def _last(self) -> int:
        """Step of the last report."""
        return int(self._report.get("step", 0))

    def _set_out(self) -> Crew:
        """Begin the run, with the workers that are there or new ones."""
        plan, trial = self._plan, str(self.trial_id)
        config = self._config = trial_config(plan, trial, self._chosen)
        run = f"{plan.study}-{trial}{self._generation}"
        job = TrainJob(resolved(config), plan.root, plan.corpus, run, plan.study, trial=self._cut)
        if self._crew is None or not self._crew.suits(config):
            self.cleanup()
            self._crew = Crew(config)
        self._crew.begin(job, config)
        self._begun = True
        return self._crew

    def _stop(self) -> None:
        if self._crew is not None:
            self._crew.stop()
        self._begun = False

    def _as_report(self, message: Message) -> dict[str, Any]:
        """What Ray Tune hears: finite figures, or the worst."""
        report: dict[str, Any] = {"state": "running", "reason": "", **message}
        report["samples"] = report["step"] * self._config.train.global_batch
        if self._cut.folds:
            report |= self._over_folds(message)
        for metric, mode in self._config.tune.objectives.items():
            if not math.isfinite(report.get(metric, math.nan)):
                report[metric] = WORST if mode == "min" else -WORST
        return report

    def _over_folds(self, message: Message) -> dict[str, float]:
        """The mean over the folds so far, each at its newest report, and how far they are apart."""
        self._folds[int(message["fold"])] = float(message["heldout_loss"])
        values = list(self._folds.values())
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
        return {"heldout_loss": mean, "heldout_deviation": spread, "folds": float(len(values))}

    def _ended(self, crew: Crew) -> dict[str, Any]:
        """The last report of a run that is over, well or not."""
        error = crew.error
        if error is None:
            return {**self._report, "state": "done", "done": True}
        if not isinstance(error, HeliostatError):
            raise error
        spent = {key: self._report.get(key, 0.0) for key in ("step", "samples", "tokens")}
        reason = " ".join(str(error).split())[:300]
        return {**failed(self._config), **spent, "state": "failed", "reason": reason, "done": True}
