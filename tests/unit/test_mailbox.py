"""What waits for company on its way out of the engine, and what does not."""

import asyncio
from typing import Any

import pytest

from serving.engines import mailbox
from serving.engines.base import Event, Finished, PromptScored, Tokens
from serving.engines.mailbox import Mailbox, compact


def token(text: str) -> Tokens:
    return Tokens(text, (ord(text),))


def test_tokens_that_follow_each_other_become_one() -> None:
    scored, ended = PromptScored(()), Finished("stop", 4)
    events: list[Event] = [token("a"), token("b"), scored, token("好"), token("d"), ended]
    assert compact(events) == [
        Tokens("ab", (97, 98)), scored, Tokens("好d", (ord("好"), 100)), ended,
    ]  # fmt: skip
    assert compact([]) == [] and compact([ended]) == [ended]


@pytest.mark.parametrize(
    ("whole", "pause", "expected"),
    [
        (False, 0.0, ["a", "b", "c", "d", "length"]),
        (False, 60.0, ["a", "bcd", "length"]),  # the end waits for nobody
        (True, 0.0, ["a", "bcd", "length"]),
    ],
)
def test_the_first_token_never_waits_and_the_end_never_does(
    whole: bool, pause: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "PAUSE", pause)

    async def scenario() -> list[str]:
        box, seen = Mailbox(whole=whole), list[str]()

        async def read() -> None:
            async for event in box.until_last():
                told: Any = event
                seen.append(told.text if isinstance(event, Tokens) else told.reason)

        reading = asyncio.create_task(read())
        for event in (*map(token, "abcd"), Finished("length", 4)):
            box.put(event)
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.wait_for(reading, 5)
        return seen

    assert asyncio.run(scenario()) == expected


def test_tokens_leave_once_their_pause_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "PAUSE", 0.01)

    async def scenario() -> str:
        box = Mailbox()
        events = box.until_last()
        box.put(token("a"))
        assert await anext(events) == token("a")
        waiting = asyncio.ensure_future(anext(events))
        box.put(token("b"))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        box.put(token("c"))
        event = await asyncio.wait_for(waiting, 5)
        assert isinstance(event, Tokens)
        return event.text

    assert asyncio.run(scenario()) == "bc"
