"""`tune`: which settings are searched, how, and for how much."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.config.base import OPERATIONAL, Fraction, Positive, Section
from cluster.errors import ConfigError

Expression = str | list[Any]
Mode = Literal["min", "max"]
METRICS = {
    "heldout_loss": "min",
    "loss": "min",
    "parameters": "min",
    "predictions_per_second": "max",
    "peak_memory_bytes": "min",
    "train_seconds": "min",
}
"""What a trial reports that can be searched for, and which end of it is the better one."""


def _flattened(value: Any) -> Any:
    """Nested sections, as dotted overrides make them, as dotted keys."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for key, below in value.items():
        if isinstance(below, Mapping):
            flat |= {f"{key}.{inner}": entry for inner, entry in _flattened(below).items()}
        elif isinstance(below, str | list):
            flat[key] = below
        else:
            raise ConfigError(
                f"tune.space.{key}: {below!r} leaves nothing to search: give choice[...] or a range"
            )
    return flat


class TuneSection(Section):
    enabled: Annotated[bool, OPERATIONAL] = False
    """`heliostat up` searches before it pretrains; the stages after it take what was found."""
    space: Annotated[dict[str, Expression], BeforeValidator(_flattened)] = {}
    """Key of `model` or `train` -> what it may be: `uniform(0, 0.3)`, `loguniform(1e-4, 1e-2)`,
    `randint(2, 8)` (both ends; a third number is the step), `lograndint(16, 1024)`,
    `choice[4, 6, 8]` or a list, `derive(4 * model.hidden_size)`. `... if train.schedule == linear`
    behind it searches the key only there; elsewhere it keeps the recipe's value."""
    objectives: dict[str, Mode] = {"heldout_loss": "min"}
    """What a trial is judged by, and which end is the better one. Several are searched together for
    their best compromises; the first one names the winner."""
    search: Literal["grid", "random", "tpe"] = "tpe"
    """How the next trial's values are chosen. `grid` tries all combinations; `tpe` learns from the
    trials before (Optuna's tree-structured Parzen estimator)."""
    grid_points: Annotated[int, Field(ge=2, le=100)] = 3
    """With `grid`: values that stand for a range."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "asha"
    """What ends trials early. `asha` lets the best share of those that came as far go on
    (Li et al., arXiv:1810.05934), `median` ends who is worse than half of the others were. `pbt`
    trains all to the end, and has the worst go on from the weights of the best with changed values
    (Jaderberg et al., arXiv:1711.09846)."""
    trials: Positive = 16
    """Trials at most; with `pbt`, those that are trained at once exchange weights."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of a trial; 0 for `train.steps`. The schedule is that of the whole run, so
    that the run itself goes on as the trial began."""
    report_every: Annotated[int, Field(ge=0)] = 0
    """Steps between a trial's reports, at which it may be ended; 0 for a tenth of its steps."""
    heldout_rows: Positive = 512
    """Held-out rows that trials are compared on, of every second one; the winner is confirmed on as
    many of the others."""
    grace: Fraction = 0.1
    """Share of a trial's steps before which no scheduler ends it."""
    reduction: Annotated[int, Field(ge=2, le=100)] = 3
    """With `asha`: one of this many trials goes on, each time for this many times as long."""
    perturb_every: Annotated[int, Field(ge=0)] = 0
    """With `pbt`: steps after which trials wait for one another to exchange weights; 0 for two
    reports."""
    concurrent: Annotated[int, OPERATIONAL, Field(ge=0)] = 0
    """Trials at once; 0 for as many as the cluster holds."""
    gpus_per_worker: Annotated[float, OPERATIONAL, Field(gt=0, le=1)] = 1.0
    """Share of a GPU that a trial's worker takes, so that small trials share one; below 1 with one
    worker per trial."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Time that the search may take, over all of its starts; 0 for any."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Predictions (tokens, images) that all trials together may train on; 0 for any."""
    money: Annotated[float, Field(ge=0)] = 0.0
    """What all trials together may cost, in the currency of `price_per_hour`; 0 for any."""
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of an hour of one training worker with its device."""
    confirm_seeds: Annotated[int, Field(ge=0, le=100)] = 1
    """Seeds beside the run's own that the winner and the recipe as it is are trained with, which
    tells the gain from noise; 0 takes the winner at its word."""
    folds: Annotated[int, Field(ge=0, le=100)] = 0
    """Cross-validation: every trial trains once per fold of the training rows and is judged by the
    mean over them, classes spread evenly; 0 for the held-out rows."""

    @property
    def objective(self) -> tuple[str, Mode]:
        """The first of the objectives: what trials are ranked by, and which end is the better."""
        return next(iter(self.objectives.items()))

    @model_validator(mode="after")
    def _objectives_are_reported(self) -> "TuneSection":
        if not self.objectives:
            raise ConfigError("tune.objectives names none: give {heldout_loss: min}")
        for metric in self.objectives:
            if metric not in METRICS:
                raise ConfigError(
                    f"tune.objectives: no trial reports {metric!r}: take one of "
                    f"{', '.join(METRICS)}"
                )
        if len(self.objectives) > 1 and self.scheduler != "none":
            raise ConfigError(
                f"tune.scheduler {self.scheduler} compares by one objective and tune.objectives "
                f"has {len(self.objectives)}: take tune.scheduler=none, or one objective"
            )
        return self

    @model_validator(mode="after")
    def _scheduler_fits(self) -> "TuneSection":
        if self.scheduler == "pbt":
            if self.search != "random":
                raise ConfigError(
                    f"tune.scheduler pbt changes values by itself: take tune.search=random for "
                    f"the first ones, not {self.search}"
                )
            if self.trials < 2:
                raise ConfigError("tune.scheduler pbt needs tune.trials 2 or more, not 1")
            if self.folds:
                raise ConfigError("tune.scheduler pbt has no tune.folds: take asha, median or none")
        if self.folds == 1:
            raise ConfigError("tune.folds 1 leaves nothing to train on: take 2 or more, or 0")
        return self

    @model_validator(mode="after")
    def _money_has_a_price(self) -> "TuneSection":
        if self.money and not self.price_per_hour:
            raise ConfigError(
                "tune.money needs tune.price_per_hour, what one worker costs in an hour"
            )
        return self
