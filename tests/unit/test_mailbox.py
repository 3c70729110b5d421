"""What waits for company on its way out of the engine, and what does not."""

import asyncio
from typing import Any

import pytest

from serving.engines.base import Event, Finished, PromptScored, Tokens
from serving.engines.mailbox import Mailbox, compact

INTERVAL = 0.02


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
    ("between", "interval", "expected"),
    [
        (INTERVAL, INTERVAL, ["a", "b", "c", "d", "length"]),
        (INTERVAL / 2, INTERVAL, ["a", "bc", "d", "length"]),
        (0.0, INTERVAL, ["a", "bcd", "length"]),  # the end waits for nobody
        (0.0, 0.0, ["a", "b", "c", "d", "length"]),
    ],
)
def test_the_first_token_and_the_end_never_wait(
    between: float, interval: float, expected: list[str]
) -> None:
    now = 1.0

    async def scenario() -> list[str]:
        nonlocal now
        box, seen = Mailbox(interval, lambda: now), list[str]()

        async def read() -> None:
            async for event in box.until_last():
                told: Any = event
                seen.append(told.text if isinstance(event, Tokens) else told.reason)

        reading = asyncio.create_task(read())
        for event in (*map(token, "abcd"), Finished("length", 4)):
            box.put(event)
            for _ in range(5):
                await asyncio.sleep(0)
            now += between
        await asyncio.wait_for(reading, 5)
        return seen

    assert asyncio.run(scenario()) == expected
