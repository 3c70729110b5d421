"""What a step cost: speed, utilisation, memory, goodput. The figures that a person watches."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cluster.hardware import cpu_computes_bf16, peak_flops
from cluster.telemetry import Row
from pipelines.training.threads import compute_on

if TYPE_CHECKING:
    import torch

    from pipelines.training.engine import StepOutcome

PRODUCT = 1024
"""Rows and columns of the matrices that tell how fast a CPU is."""
OWN_STEPS = 20
"""Steps that a rank's own work is judged over."""


@dataclass(frozen=True)
class Rates:
    """What turns a step's seconds into figures; constant over a start of the workers."""

    devices: int
    flops_per_prediction: float | None
    """Of forward and backward pass; None where the family gives no formula."""
    peak_flops: float | None
    """Of one device; None where the table does not know it."""
    began: float
    """Unix time at which the run began, its first start."""

    def row(self, outcome: StepOutcome, *, seconds: float, waited: float, counted: float) -> Row:
        """Figures of a step.

        Model FLOP/s utilisation is that of PaLM (Chowdhery et al., arXiv:2204.02311, appendix B):
        FLOPs that the model's formula asks for, whatever was computed twice, over the peak.

        Args:
            seconds: of the step, waiting for data included.
            waited: of them, for data.
            counted: seconds of all steps of the run that count, this one included: not those that
                were done again.
        """
        speed = outcome.predictions / seconds
        row = {
            "loss": outcome.loss,
            "gradient_norm": outcome.gradient_norm,
            "predictions_per_second": speed,
            "predictions_per_second_per_device": speed / self.devices,
            "step_seconds": seconds,
            "data_wait": waited / seconds,
            "goodput": counted / max(time.time() - self.began, counted),
            "skipped": float(outcome.skipped),
        }
        if self.flops_per_prediction and self.peak_flops:
            achieved = self.flops_per_prediction * speed
            row["mfu"] = achieved / (self.peak_flops * self.devices)
        return row


def peak_of(device: torch.device) -> float | None:
    """Peak FLOP/s of the device that this process computes on."""
    if device.type != "cuda":
        return None
    import torch

    return peak_flops(torch.cuda.get_device_name(device))


def resident_memory() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say (not Linux)."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def peak_memory(device: torch.device) -> float:
    """Bytes: largest allocation on a GPU so far, or the largest resident set on a CPU."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device))
    # Kilobytes on Linux, bytes on macOS (getrusage(2)).
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class OwnTime:
    """Seconds per step of a rank's own work, without collectives, in which ranks only wait."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=OWN_STEPS)
        self.longest = 0.0
        """Seconds of the longest step so far, collectives included."""

    def add(self, own: float, step_seconds: float) -> None:
        self._last.append(own)
        self.longest = max(self.longest, step_seconds)

    @property
    def usual(self) -> float:
        """Median over the last steps; 0 until there are enough of them."""
        return median(self._last) if len(self._last) == OWN_STEPS else 0.0


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self.waited = 0.0

    def data_is_there(self) -> None:
        self.waited = time.monotonic() - self._mark

    def step_is_done(self) -> float:
        """Seconds since the step before was done."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        return max(seconds, math.ulp(1.0))

    def restart(self) -> None:
        """What went by since is no part of a step, such as a checkpoint."""
        self._mark = time.monotonic()


@cache
def product_flops(threads: int, *, half: bool = True) -> float:
    """FLOP/s of a matrix product on this CPU.

    Args:
        half: in bf16 where it computes that, else in fp32.
    """
    import torch

    kind = torch.bfloat16 if half and cpu_computes_bf16() else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(2, PRODUCT, PRODUCT, dtype=kind)
        best = math.inf
        for _ in range(8):
            began = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - began)
    finally:
        compute_on(before)
    return 2 * PRODUCT**3 / best
