"""Which requests run and what the next step does. Pure: ids in, ids out; no torch, no threads."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serving.engines.places import Copy, Places

ALONE = 512
"""Prompt tokens that a step reads when no request waits for its next token."""
TOGETHER = 4
"""Chunks of several prompts that a step reads beside running requests. One after the other, short
prompts that come at once would be answered in as many steps as they are, each hardly filled."""


@dataclass(frozen=True)
class Chunk:
    """The part of a prompt that one step reads."""

    request: str
    row: int
    start: int
    count: int
    last: bool
    """The prompt ends with it: the first token of the answer follows."""


@dataclass(frozen=True)
class Step:
    """One round of the engine. The copies come first, in order."""

    copies: tuple[Copy, ...]
    prefill: tuple[Chunk, ...]
    decode: tuple[str, ...]
    """Requests that get one token each; the first lies in row 0, and so on."""


@dataclass
class _Reading:
    """How far a request's prompt is read."""

    prompt: Sequence[int]
    reuse: bool
    read: int = 0
    cached: int = 0

    @property
    def done(self) -> bool:
        return self.read == len(self.prompt)


class Scheduler:
    """First come, first served, over a fixed number of slots and a bounded queue.

    A long prompt is read in chunks, one a step, beside the requests that run; short ones are begun
    together. At most one prompt is half read at a time, and lies in the row behind those that run.

    Args:
        chunk: most tokens of one prompt that a step reads beside running requests; None reads every
            prompt in one piece, one a step.
        aligned: cut every prompt at multiples of the chunk, whatever else runs, one a step.
    """

    def __init__(
        self,
        slots: int,
        max_waiting: int,
        *,
        chunk: int | None = None,
        prefixes: int = 0,
        aligned: bool = False,
    ) -> None:
        self._slots = slots
        self._max_waiting = max_waiting
        self._chunk = chunk
        self._aligned = aligned
        self._waiting: deque[str] = deque()
        self._readings: dict[str, _Reading] = {}
        self._leaving: list[str] = []
        self.places = Places(slots, prefixes)

    @property
    def running(self) -> int:
        return len(self.places.order) - len(self._leaving)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether all slots and the whole queue are taken."""
        return self.running + self.waiting >= self._slots + self._max_waiting

    def submit(self, request_id: str, prompt: Sequence[int] = (0,), *, reuse: bool = True) -> bool:
        """Take a request; False where the scheduler is full.

        Args:
            reuse: whether what another request has read of the same beginning may be taken over.
        """
        if self.full:
            return False
        self._readings[request_id] = _Reading(prompt, reuse and self._chunk is not None)
        self._waiting.append(request_id)
        return True

    def remove(self, request_id: str) -> None:
        """A request has finished or was cancelled; its row is free from the next step on."""
        if self._readings.pop(request_id, None) is None:
            return
        if request_id in self._waiting:
            self._waiting.remove(request_id)
        else:
            self._leaving.append(request_id)

    def unread(self, request_id: str) -> int:
        """Prompt tokens that are still to be read."""
        reading = self._readings[request_id]
        return len(reading.prompt) - reading.read

    def cached(self, request_id: str) -> int:
        """Prompt tokens that were taken over and not read."""
        return self._readings[request_id].cached

    def next_step(self) -> Step:
        copies = self._leave()
        decode = tuple(r for r in self.places.order if self._readings[r].done)
        prefill: list[Chunk] = []
        for request_id in self.places.order[len(decode) :]:
            prefill.append(self._read(request_id, self._room(prefill, decode)))
        while self._may_begin(prefill, self._room(prefill, decode)):
            request_id = self._waiting.popleft()
            copies += self._admit(request_id)
            prefill.append(self._read(request_id, self._room(prefill, decode)))
        for chunk in prefill:
            prompt = self._readings[chunk.request].prompt
            self.places.hold(chunk.request, prompt[chunk.start : chunk.start + chunk.count])
        return Step(tuple(copies), tuple(prefill), decode)

    def _leave(self) -> list[Copy]:
        half_read = [
            r for r, reading in self._readings.items() if reading.read > 0 and not reading.done
        ]
        behind = half_read[0] if half_read else None
        copies: list[Copy] = []
        for left, request_id in zip(range(len(self._leaving), 0, -1), self._leaving, strict=True):
            copies += self.places.leave(request_id, behind, followed_by=left - 1)
        self._leaving.clear()
        return copies

    def _may_begin(self, prefill: Sequence[Chunk], room: int | None) -> bool:
        """Whether one more prompt is begun in this step."""
        if not self._waiting or len(self.places.order) == self._slots:
            return False
        if not prefill:
            return True
        if room is None or self._aligned or room <= 0 or not prefill[-1].last:
            return False
        # One that begins like a prompt of this very step takes over from it in the next one.
        following = self._readings[self._waiting[0]]
        begun = [
            self._readings[chunk.request].prompt[: chunk.start + chunk.count] for chunk in prefill
        ]
        return not following.reuse or not self.places.gains(following.prompt, begun)

    def _room(self, prefill: Sequence[Chunk], beside: Sequence[str]) -> int | None:
        """Most tokens that this step may still read of one prompt; None for all."""
        if self._chunk is None:
            return None
        if self._aligned:
            return self._chunk
        taken = sum(chunk.count for chunk in prefill)
        if beside:
            return min(self._chunk, TOGETHER * self._chunk - taken)
        return max(self._chunk, ALONE) - taken

    def _admit(self, request_id: str) -> list[Copy]:
        reading = self._readings[request_id]
        copy = self.places.take(request_id, reading.prompt, reuse=reading.reuse)
        if copy is None:
            return []
        reading.read = reading.cached = copy.tokens
        return [copy]

    def _read(self, request_id: str, room: int | None) -> Chunk:
        reading = self._readings[request_id]
        missing = len(reading.prompt) - reading.read
        count = missing if room is None else min(missing, room)
        start, row = reading.read, self.places.order.index(request_id)
        reading.read += count
        return Chunk(request_id, row, start, count, reading.done)
