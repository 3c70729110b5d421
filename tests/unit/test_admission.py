"""When a call's place is given back, where the accounts are a hop away."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import Response
from fastapi.responses import StreamingResponse

from serving.admission import Call, SharedBooks
from serving.auth import new_key
from serving.stream import DONE


class Accounts:
    """Stands in for the deployment's handle: what it is told is written after a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.settled = seconds, list[str]()
        self.settle = self

    async def remote(self, key: str, call: str, tokens: int) -> None:
        await asyncio.sleep(self.seconds)
        self.settled.append(call)


def call(accounts: Accounts) -> Call:
    return Call("first", 0.0, new_key("one")[1], SharedBooks(accounts), {}, {})


async def whole() -> Response:
    return Response(b"{}")


async def streamed() -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        yield DONE

    return StreamingResponse(parts())


def test_a_place_is_free_before_the_answer_is_out() -> None:
    async def settled() -> list[str]:
        accounts = Accounts(0.05)
        await call(accounts).answered(whole())
        return accounts.settled

    assert asyncio.run(settled()) == ["first"]


def test_a_place_is_free_before_the_last_part_of_a_stream() -> None:
    async def settled() -> list[tuple[object, int]]:
        accounts = Accounts(0.05)
        answer = await call(accounts).answered(streamed())
        assert isinstance(answer, StreamingResponse)
        return [(part, len(accounts.settled)) async for part in answer.body_iterator]

    assert asyncio.run(settled()) == [(b"data: {}\n\n", 0), (DONE, 1)]


def test_an_answer_does_not_wait_for_accounts_that_hang() -> None:
    async def answered() -> list[str]:
        accounts = Accounts(60.0)
        await asyncio.wait_for(call(accounts).answered(whole()), SharedBooks.SECONDS + 5)
        return accounts.settled

    assert asyncio.run(answered()) == []


def test_the_place_of_a_caller_who_goes_is_given_back_all_the_same() -> None:
    async def settled() -> list[str]:
        accounts = Accounts(0.1)
        asked = asyncio.create_task(call(accounts).answered(whole()))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.wait({asked})
        await asyncio.sleep(0.1)
        return accounts.settled

    assert asyncio.run(settled()) == ["first"]
