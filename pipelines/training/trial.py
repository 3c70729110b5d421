"""A run that somebody watches: at each of its reports it waits to hear how it goes on.

A search compares runs at their reports, ends the worst, and has some go on from the weights of
others. The workers arrive at a *gate* after a look at held-out rows; what watches answers `go`,
`save` (commit a checkpoint, then arrive again) or `end`. Nothing is trained while nobody has
answered, so that a run has used exactly what it reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cluster.telemetry import Board

if TYPE_CHECKING:
    from pipelines.training.checkpoint import Progress
    from pipelines.training.engine import Engine, World
    from pipelines.training.loop import TrainJob

Answer = Literal["go", "save", "end"]
Message = dict[str, Any]
"""What arrives: the figures of a step, `{"step", "checkpoint": [name, version]}`, `{"over"}`."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Trial:
    """How a run is cut for a search."""

    steps: int
    """It ends after so many, of the `train.steps` that its schedule has."""
    start: tuple[str, int] | None = None
    """Checkpoint of another run, name and version, that it goes on from."""
    confirm: bool = False
    """Measure on the held-out rows that nothing was chosen by."""
    folds: int = 0
    """Train once per fold, measured on it; 0 trains on all rows."""
    fold_seed: int = 0


class Gate(Board):
    """The board of a watched run."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[Message] = []
        self._answers: dict[int, Answer] = {}
        self._jobs: list[Any] = []
        self._done = 0

    def arrive(self, message: Message) -> int:
        """Number of this arrival, from 1."""
        self._messages.append(message)
        return len(self._messages)

    def arrivals(self, after: int) -> list[Message]:
        """Those behind a number, in order."""
        return self._messages[after:]

    def answer(self, number: int, answer: Answer) -> None:
        self._answers[number] = answer

    def answered(self, number: int) -> Answer | None:
        """None while there is no answer."""
        return self._answers.get(number)

    def hand(self, job: Any) -> None:
        """Another job for the workers, when they are done with theirs; None sends them away."""
        self._jobs.append(job)

    def next(self) -> tuple[bool, Any]:
        """Whether there is a job that is not done yet, and the job. Workers that were replaced ask
        again."""
        there = self._done < len(self._jobs)
        return there, self._jobs[self._done] if there else None

    def finish(self) -> None:
        """The job is done, or was told to end."""
        self._done += 1
        self._messages.append({"over": self._done})


def at_step(at: Progress, job: TrainJob, engine: Engine) -> Message:
    """What a search hears of a step: its figures, and what was spent up to it.

    Steps and spendings count through the folds, of which `fold` is the one that this is.
    """
    row, number = dict(at.history[-1]), job.fold.number if job.fold else 0
    train = engine.config.train
    return row | {
        "fold": number,
        "step": number * min(train.steps, job.trial.steps if job.trial else train.steps) + at.step,
        "tokens": sum(r["predictions_per_second"] * r["step_seconds"] for r in at.history),
        "train_seconds": at.seconds,
        "parameters": float(engine.parameters),
    }


def asked(board: Any, message: Mapping[str, Any], world: World) -> Answer:
    """Arrive, and wait for the answer. Collective; rank 0 asks for all."""
    import ray
    import torch.distributed as dist

    told: list[Any] = [None]
    if world.first:
        number = ray.get(board.arrive.remote(dict(message)))
        while (found := ray.get(board.answered.remote(number))) is None:
            time.sleep(POLL_SECONDS)
        told = [found]
    dist.broadcast_object_list(told, src=0, device=world.device)
    answer: Answer = told[0]
    return answer


def next_job(board: Any, world: World) -> Any:
    """Wait for it; None where there is none any more. Collective."""
    import ray
    import torch.distributed as dist

    told: list[Any] = [None]
    if world.first:
        while not (found := ray.get(board.next.remote()))[0]:
            time.sleep(POLL_SECONDS)
        told = [found[1]]
    dist.broadcast_object_list(told, src=0, device=world.device)
    return told[0]
