"""What happens to a request whose replica dies: tried again, shown as cut, or given up."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serving import gateway
from serving.engines.base import (
    OVERLOADED,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParameters,
    Started,
    Tokens,
)
from serving.gateway import REPLICA_LOST, UNAVAILABLE, HandleGateway
from serving.schema import ModelCard

CARD = ModelCard("gpt", "model/gpt@1", 0, "completions", 8)
REQUEST = GenerationRequest("id", "a", SamplingParameters(4))
START, ONE, TWO, END = Started("m", 1), Tokens("a", (1,)), Tokens("b", (2,)), Finished("length", 2)
DIED = ActorDiedError()


class Call:
    """What a handle gives: events, then perhaps an exception."""

    def __init__(self, events: list[Event | Exception]) -> None:
        self._events = events
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[tuple[Event, ...]]:
        for event in self._events:
            await asyncio.sleep(0)
            if isinstance(event, Exception):
                raise event
            yield (event,)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Each call follows the next script, the last one for ever."""

    def __init__(self, *scripts: list[Event | Exception]) -> None:
        self._scripts = list(scripts)
        self.calls: list[Call] = []
        self.asked: list[Any] = []
        self.submit = self

    def options(self, stream: bool) -> "Handle":
        return self

    def remote(self, request: Any) -> Call:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self.asked.append(request)
        self.calls.append(Call(script))
        return self.calls[-1]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "PAUSE", 0.001)


def answer(handle: Handle, *, whole: bool, stop: Callable[[Event], bool] = lambda _: False) -> Any:
    async def collected() -> list[Event]:
        found: list[Event] = []
        events = HandleGateway({"gpt": handle}).submit(CARD, REQUEST, whole=whole)
        async for event in events:
            found.append(event)
            if stop(event):
                await events.aclose()  # type: ignore[attr-defined]
                break
        return found

    return asyncio.run(asyncio.wait_for(collected(), 5))


@pytest.mark.parametrize("whole", [False, True])
def test_before_the_first_token_another_replica_begins_again(whole: bool) -> None:
    handle = Handle([DIED], [START, DIED], [START, ONE, TWO, END])
    assert answer(handle, whole=whole) == [START, ONE, TWO, END]
    # Each with an id of its own: a replica that was only out of reach may hold the first.
    assert len({asked.id for asked in handle.asked}) == 3


def test_what_is_not_shown_yet_begins_again_at_any_time() -> None:
    handle = Handle([START, ONE, DIED], [START, ONE, TWO, END])
    assert answer(handle, whole=True) == [START, ONE, TWO, END]


def test_a_stream_that_is_cut_says_so_and_is_not_repeated() -> None:
    handle = Handle([START, ONE, DIED], [START, ONE, TWO, END])
    assert answer(handle, whole=False) == [START, ONE, REPLICA_LOST]
    assert len(handle.calls) == 1


def test_refusals_are_not_tried_again() -> None:
    mistake = Failed(400, "too long")
    for script, expected in (
        ([BackPressureError(num_queued_requests=1, max_queued_requests=1)], OVERLOADED),
        ([DeploymentUnavailableError("x")], UNAVAILABLE),
        ([OVERLOADED], OVERLOADED),
        ([mistake], mistake),
    ):
        handle = Handle(script)  # type: ignore[arg-type]
        assert answer(handle, whole=False) == [expected]
        assert len(handle.calls) == 1


def test_a_caller_that_leaves_cancels_the_call() -> None:
    handle = Handle([START, ONE, TWO, END])
    answer(handle, whole=False, stop=lambda event: event == ONE)
    assert handle.calls[0].cancelled
    finished = Handle([START, ONE, END])
    answer(finished, whole=False)
    assert not finished.calls[0].cancelled


def test_without_any_replica_the_callers_deadline_ends_it() -> None:
    with pytest.raises(TimeoutError):

        async def wait() -> None:
            async with asyncio.timeout(0.1):
                async for _ in HandleGateway({"gpt": Handle([DIED])}).submit(CARD, REQUEST):
                    pass

        asyncio.run(wait())
