"""Events of one request on their way from the engine to whoever asked."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

from serving.engines.answer import merged
from serving.engines.base import Event, Tokens, is_last


class Mailbox:
    """Tokens that come close together leave as one; everything else leaves at once.

    It belongs to one event loop. Tokens that wait leave with the next event that does not: a
    request always gets another one.

    Args:
        interval: seconds for which tokens after the first wait for company. Each event crosses two
            processes on its way to HTTP, on the cores that compute.
        clock: seconds, from any beginning.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self._events: list[Event] = []
        self._ready = asyncio.Event()
        self._due = -math.inf

    def put(self, event: Event) -> None:
        self._events.append(event)
        if not isinstance(event, Tokens) or self._clock() >= self._due:
            self._ready.set()

    async def until_last(self) -> AsyncIterator[Event]:
        while True:
            await self._ready.wait()
            self._ready.clear()
            events, self._events = self._events, []
            for event in compact(events):
                yield event
                if is_last(event):
                    return
                if isinstance(event, Tokens):
                    self._due = self._clock() + self._interval


def compact(events: Sequence[Event]) -> list[Event]:
    """The same events with tokens that follow each other as one."""
    found: list[Event] = []
    piled: list[Tokens] = []
    for event in events:
        if isinstance(event, Tokens):
            piled.append(event)
            continue
        if piled:
            found.append(merged(piled))
            piled = []
        found.append(event)
    return [*found, merged(piled)] if piled else found
