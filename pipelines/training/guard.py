"""What to do when a run goes wrong. Pure: figures in, decisions out; the loop and the watchdog act.

Verdicts on a step come from the run's history alone, which is equal on all ranks and part of every
checkpoint: all ranks come to the same one, and so does a run that was resumed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Literal

from cluster.config import TrainSection
from cluster.telemetry import Row, Sign

WINDOW = 100
"""Steps that the running mean and deviation of the loss are taken over."""
FEWEST = 20
"""Steps before there is a deviation to speak of."""
SMALLEST_DEVIATION = 0.01
"""As a share of the mean: a loss that hardly varies would leap with every breath."""
CRASHES = 3
"""Deaths at one step, with nothing committed between them, that make a crash loop."""
ALL_SILENT = 3
"""Times as long a silence of all ranks may be: rather the machine or the board is busy."""
MOST_REWINDS = 3
"""Of one start of the workers; a run that leaps whatever it is fed is stopped."""
STEP_SPAN = 10.0
"""Steps may take this many times the longest one before the group is taken for stuck."""
SLOW_FACTOR = 2.0
SLOW_SHARE = 0.1
"""A slow rank costs the group at least this share of a step; less is not worth a word."""

Phase = Literal["start", "data", "step", "save"]
PHASES: tuple[Phase, ...] = ("start", "data", "step", "save")


Action = Literal["go", "end", "stop", "rewind"]
"""`end`: somebody wants the run to end; `stop`: it makes no sense to go on."""
ACTIONS: Mapping[str, Action] = {"continue": "go", "stop": "stop", "rewind": "rewind"}


@dataclass(frozen=True)
class Verdict:
    """On the step that just ended."""

    action: Action
    event: str = ""
    """Journal event; empty where there is nothing to tell."""
    reason: str = ""


def judge(train: TrainSection, history: Sequence[Row]) -> Verdict:
    """On the last row of a history, which holds every step up to it.

    A row has `skipped` 1 where its step was skipped, and `spike` what `spikes` said of it.
    """
    if history[-1].get("skipped"):
        row = _in_a_row(history, "skipped")
        if row >= train.max_skipped:
            reason = f"loss or gradient was not finite in {row} steps in a row"
            return Verdict("stop", "skipped_step", reason)
        return Verdict("go", "skipped_step")
    if _in_a_row(history, "spike") != 1:
        return Verdict("go")
    reason = f"the loss leapt to {history[-1]['loss']:.4g}"
    return Verdict(ACTIONS[train.on_spike], "loss_spike", reason)


def spikes(train: TrainSection, history: Sequence[Row]) -> bool:
    """Whether the last `train.spike_steps` losses all lie above what was usual before them."""
    count = train.spike_steps
    recent = [row["loss"] for row in history[-count:]]
    before = [row["loss"] for row in history[-count - WINDOW : -count] if not row.get("skipped")]
    if not train.spike_deviations or len(recent) < count or len(before) < FEWEST:
        return False
    mean = fmean(before)
    deviation = max(pstdev(before, mean), SMALLEST_DEVIATION * abs(mean))
    return min(recent) > mean + train.spike_deviations * deviation


def shift(history: Sequence[Row]) -> int:
    """Batches that were left out so far: step n, counted from 1, takes batch n - 1 + shift."""
    if not history:
        return 0
    last = history[-1]
    return int(last.get("batch", last["step"] - 1)) + 1 - int(last["step"])


def _in_a_row(history: Sequence[Row], mark: str) -> int:
    """Rows at the end of a history that carry a mark."""
    count = 0
    for row in reversed(history):
        if not row.get(mark):
            break
        count += 1
    return count


@dataclass(frozen=True)
class Death:
    """How one start of the workers ended."""

    start: int
    """Step that it started from."""
    step: int
    """Steps done when it died."""
    error: str
    """Empty where workers went without a word."""


VICTIM = ("closed by peer", "connection reset", "broken pipe", "nccl", "gloo", "timed out waiting")
"""In the error of a rank whose partner died."""


def death(signs: Sequence[Sign], errors: Iterable[str]) -> Death | None:
    """What ended a start of the workers; None where none of them had begun.

    Args:
        signs: the last one of each rank.
        errors: of the workers that had a word to say.
    """
    if not signs:
        return None
    causes = [error for error in errors if not any(word in error.lower() for word in VICTIM)]
    start, step = min(sign.start for sign in signs), max(sign.step for sign in signs)
    return Death(start, step, causes[0] if causes else "")


def crash_loop(deaths: Sequence[Death]) -> str:
    """Why it is no use to start again; empty where it is.

    Where the starts began does not matter: a checkpoint that committed in between is no progress as
    long as the same step ends them. Workers that went without a word before their first step say
    nothing about that step.
    """
    last = deaths[-CRASHES:]
    if len(last) < CRASHES or len({death.step for death in last}) > 1:
        return ""
    end = last[-1]
    if not end.error and end.step == end.start:
        return ""
    how = end.error or "the workers went without a word (killed, or out of memory)"
    return f"it died {CRASHES} times in a row in step {end.step + 1}: {how}"


def hung(signs: Sequence[tuple[Sign, float, float]], seconds: float) -> list[Sign]:
    """Ranks that hold the group up, the likeliest first.

    A rank is hung if it gives no sign of life. Where all do and yet nothing moves, it is the one
    that is furthest behind. Nobody is before the first step of a start, which takes all ranks to
    be done on any, and nobody is stuck while a checkpoint is being taken.

    Args:
        signs: the last sign of each rank, seconds since it came, seconds since it showed anything
            new.
    """
    if not signs or len(signs) < signs[0][0].ranks:
        return []
    if all(sign.step <= sign.start for sign, _, _ in signs):
        return []
    heard = len(signs) == 1 or any(age <= seconds for _, age, _ in signs)
    limit = seconds if heard else ALL_SILENT * seconds
    silent = [(age, sign) for sign, age, _ in signs if age > limit]
    if silent or not heard:
        return [sign for _, sign in sorted(silent, key=lambda pair: -pair[0])]
    limit = max(seconds, STEP_SPAN * max(sign.longest for sign, _, _ in signs))
    if any(sign.phase == "save" or still <= limit for sign, _, still in signs):
        return []
    behind = min(map(_place, (sign for sign, _, _ in signs)))
    return [sign for sign, _, _ in signs if _place(sign) == behind]


def _place(sign: Sign) -> tuple[int, int]:
    return sign.step, PHASES.index(sign.phase)


def slow(signs: Sequence[Sign]) -> Sign | None:
    """The rank whose own work takes far longer than that of the others, if there is one."""
    if len(signs) < 2 or any(not sign.own for sign in signs):
        return None
    slowest = max(signs, key=lambda sign: sign.own)
    others = median(sign.own for sign in signs if sign is not slowest)
    costs = slowest.own - others > SLOW_SHARE * slowest.step_seconds
    return slowest if slowest.own > SLOW_FACTOR * others and costs else None
