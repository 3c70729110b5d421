"""Which requests run and what the next step does. Pure: ids in, ids out; no torch, no threads."""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One round of the engine."""

    prefill: str | None
    """Request that joins: its whole prompt is read."""
    decode: tuple[str, ...]
    """Running requests that get one token each, oldest first."""


class Scheduler:
    """First come, first served, over a fixed number of slots and a bounded queue."""

    def __init__(self, slots: int, max_waiting: int) -> None:
        self._slots = slots
        self._max_waiting = max_waiting
        self._waiting: deque[str] = deque()
        self._running: dict[str, None] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request_id: str) -> bool:
        """Take a request; False where all slots and the whole queue are taken."""
        if self.running + self.waiting >= self._slots + self._max_waiting:
            return False
        self._waiting.append(request_id)
        return True

    def remove(self, request_id: str) -> None:
        """A request has finished or was cancelled."""
        if request_id in self._running:
            del self._running[request_id]
        elif request_id in self._waiting:
            self._waiting.remove(request_id)

    def next_step(self) -> Step:
        """At most one request joins per step, so that a burst does not stall those that run."""
        decode = tuple(self._running)
        if not self._waiting or self.running >= self._slots:
            return Step(None, decode)
        joining = self._waiting.popleft()
        self._running[joining] = None
        return Step(joining, decode)
