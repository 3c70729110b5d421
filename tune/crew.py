"""The workers of one Ray Train run, seen from the actor of a trial.

Starting workers costs seconds in which nothing is trained: processes, imports, a process group. So
they stay when their trial ends, and train the next one that Ray Tune gives this actor.
"""

from __future__ import annotations

import threading
from typing import Any

import ray

from cluster.config import RunConfig
from cluster.storage import Store
from cluster.telemetry import start_board
from pipelines import pretrain
from pipelines.training.loop import TrainJob
from pipelines.training.trial import Answer, Gate, Message

POLL_SECONDS = 0.05
END_SECONDS = 20.0
"""For workers that were told to end; then Ray ends them with the actor."""


class Crew:
    """Trains jobs one after another, each watched at its gate."""

    def __init__(self, config: RunConfig) -> None:
        self._size = _size(config)
        self._board = start_board(kind=Gate)
        self._thread: threading.Thread | None = None
        self._gone = threading.Event()
        self._heard = 0
        self._held = False
        """Whether the workers wait for an answer."""
        self.error: BaseException | None = None
        """Why they are gone, where it was not on purpose."""
        self.resting = True
        """Whether they are done with their trial, and nothing else is under way."""

    def suits(self, config: RunConfig) -> bool:
        """Whether another run can be theirs."""
        return self.resting and not self._gone.is_set() and self._size == _size(config)

    def begin(self, job: TrainJob, config: RunConfig) -> None:
        """Train a job; Ray Train blocks whoever calls it, so it has a thread."""
        self.resting = False
        ray.get(self._board.hand.remote(job))
        if self._thread is not None:
            return
        self._thread = threading.Thread(
            target=self._run, args=(job, config), daemon=True, name="crew"
        )
        self._thread.start()

    def _run(self, job: TrainJob, config: RunConfig) -> None:
        try:
            pretrain.launch(job, config, Store(job.root), self._board)
        except BaseException as error:  # looked at in the thread that asks for the next message
            self.error = error
        finally:
            self._gone.set()

    def hears(self, after: int) -> Message | None:
        """The next report behind a step, or what was asked for; None when the job is over."""
        while not self.resting:
            gone = self._gone.is_set()
            fresh = ray.get(self._board.arrivals.remote(self._heard))
            if fresh:
                message = dict(fresh[0])
                self._heard += 1
                if "over" in message:
                    self.resting = True
                    return None
                self._held = True
                # Workers that were replaced come by the same reports again.
                if "checkpoint" in message or int(message["step"]) > after:
                    return message
                self.answer("go")
            elif gone:
                self.resting = True
            else:
                self._gone.wait(POLL_SECONDS)
        return None

    def answer(self, answer: Answer) -> None:
        if self._held:
            self._held = False
            ray.get(self._board.answer.remote(self._heard, answer))

    @property
    def waiting(self) -> bool:
        """Whether they have reported, and wait."""
        return self._held and not self._gone.is_set()

    def stop(self) -> None:
        """End the job that is under way, if any; they stay."""
        while not self.resting:
            self.answer("end")
            self.hears(after=-1)

    def dismiss(self) -> None:
        """End the workers."""
        if self._thread is not None and not self._gone.is_set():
            self.answer("end")
            ray.get(self._board.hand.remote(None))
            self._gone.wait(END_SECONDS)
        ray.kill(self._board)


def _size(config: RunConfig) -> tuple[Any, ...]:
    """What Ray Train fixes when workers start."""
    return config.train.workers, config.train.threads_per_worker
