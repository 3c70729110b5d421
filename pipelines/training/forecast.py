"""What a plan says of the run that is going on, to be held against what it turns out to be."""

from __future__ import annotations

from dataclasses import dataclass

from cluster import planner
from cluster.config import RunConfig
from cluster.planner import Machines
from cluster.telemetry import Row
from pipelines.families.base import Facts, Family
from pipelines.training import zero
from pipelines.training.engine import World
from pipelines.training.meter import peak_of, product_flops, resident_memory

STEPS = 3
"""After which the run is compared with its plan: the first makes the optimizer's state."""


@dataclass(frozen=True)
class Forecast:
    """Of rank 0."""

    peak: int
    """Bytes: what the process held before there was a model, and what the plan adds to it."""
    speed: float
    """Predictions per second of all workers; not a number where it cannot be computed."""

    @staticmethod
    def of(config: RunConfig, family: Family, facts: Facts, world: World) -> Forecast | None:
        """To be called before the model is built.

        None for a model that goes by the values in its tensors: that cannot be traced.
        """
        from pipelines.training import footprint

        train = config.train
        device: zero.Device = "cuda" if world.device.type == "cuda" else "cpu"
        precision = zero.precision(train, device)
        rows = zero.micro_batch(train, world.size)
        try:
            traced = footprint.trace(config, family, facts, rows, precision)
        except RuntimeError:  # torch's for operators that it knows no shapes of
            return None
        need = planner.need(train, traced, world.size, precision, heap=device == "cpu")
        peak = (
            product_flops(train.threads_per_worker, half=precision != "fp32")
            if device == "cpu"
            else peak_of(world.device)
        )
        name = "CPU" if device == "cpu" else "GPU"
        machines = Machines(1, world.size, name, 0, None, peak, None)
        flops = family.flops_per_prediction(config, facts)
        cost = planner.cost(
            train.model_copy(update={"workers": world.size}), machines, flops, traced, precision
        )
        held = resident_memory() if device == "cpu" else 0
        return Forecast(held + need.device, cost.tokens_per_second if cost else float("nan"))

    def row(self) -> Row:
        """What joins the figures of the step after which they are compared."""
        return {"planned_peak_bytes": float(self.peak), "planned_per_second": self.speed}


def compared(row: Row) -> str | None:
    """A line for a person, where the row carries a forecast."""
    planned = row.get("planned_peak_bytes")
    if planned is None:
        return None
    held, speed = row["peak_memory_bytes"], row["predictions_per_second"]
    line = (
        f"pretrain: a worker holds {planner.gib(held)} at its peak, planned {planner.gib(planned)} "
        f"({planned / held - 1:+.0%})"
    )
    expected = row["planned_per_second"]
    if expected != expected:
        return line
    return f"{line}; {speed:,.0f}/s, planned {expected:,.0f}/s ({expected / speed - 1:+.0%})"
