"""From events of engines to one answer: merging, collecting, server-sent events, the deadline."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serving.engines.base import Event, Failed, Finished, Started, Tokens, is_last
from serving.schema import (
    RequestError,
    choice_body,
    completion_body,
    usage_body,
)

DONE = b"data: [DONE]\n\n"
Indexed = tuple[int, Event]


@dataclass
class Tally:
    """What is known of one answer while it comes."""

    id: str
    created: int
    model: str
    """Name that the request gave."""
    artifact: str = ""
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0

    def note(self, index: int, event: Event, prompt: int) -> None:
        """Count an event of choice `index`, which continues prompt number `prompt`."""
        if isinstance(event, Started):
            self.artifact = event.model
            # Choices of one prompt share it: it is counted once.
            self.prompt_tokens[prompt] = event.prompt_tokens
        elif isinstance(event, Finished):
            self.completion_tokens += event.completion_tokens

    def usage(self) -> dict[str, int]:
        return usage_body(sum(self.prompt_tokens.values()), self.completion_tokens)

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return completion_body(self.id, self.created, self.model, choices)


async def merge(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[Indexed]:
    """Events of all streams as they come, with the number of the stream.

    Closing it closes every stream. An exception of one stream ends all.
    """
    queue: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Event]) -> None:
        try:
            async for event in stream:
                queue.put_nowait((index, event))
                if is_last(event):
                    return
            queue.put_nowait((index, Failed(502, "the model's answer was cut", "cut")))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            open_streams -= is_last(item[1])
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(ends: float, events: AsyncIterator[Indexed]) -> AsyncIterator[Indexed]:
    """The events until the loop's clock reads `ends`, in seconds.

    Raises:
        RequestError: 504 from then on.
    """
    while True:
        try:
            async with asyncio.timeout_at(ends):
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RequestError(
                504, "the answer took longer than the deadline of this service", code="deadline"
            ) from None
        yield event


async def accepted(events: AsyncIterator[Indexed], streams: int) -> list[Indexed]:
    """Read until every stream has started; what came on the way is returned, in order.

    Raises:
        RequestError: if an engine refuses.
    """
    seen: list[Indexed] = []
    missing = streams
    while missing:
        index, event = await anext(events)
        if isinstance(event, Failed):
            raise RequestError.of(event)
        missing -= isinstance(event, Started)
        seen.append((index, event))
    return seen


async def chained(first: Sequence[Indexed], rest: AsyncIterator[Indexed]) -> AsyncIterator[Indexed]:
    for item in first:
        yield item
    async for item in rest:
        yield item


async def collect(tally: Tally, events: AsyncIterator[Indexed], n: int) -> dict[str, Any]:
    """The whole answer.

    Raises:
        RequestError: if one of the choices failed.
    """
    texts: dict[int, list[str]] = {}
    reasons: dict[int, str] = {}
    async for index, event in events:
        tally.note(index, event, index // n)
        if isinstance(event, Failed):
            raise RequestError.of(event)
        if isinstance(event, Started | Tokens):
            texts.setdefault(index, []).append(event.text)
        elif isinstance(event, Finished):
            reasons[index] = event.reason
    choices = [choice_body(i, "".join(texts[i]), reasons[i]) for i in sorted(texts)]
    return {**tally.body(choices), "usage": tally.usage()}


async def server_sent(
    tally: Tally, events: AsyncIterator[Indexed], n: int, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; an error inside it becomes an event of its own."""
    extra: dict[str, Any] = {"usage": None} if include_usage else {}
    async with aclosing(_chunks(tally, events, n)) as chunks:  # type: ignore[type-var]
        try:
            async for chunk in chunks:
                yield frame({**chunk, **extra})
        except RequestError as error:
            yield frame(error.body())
            return
    if include_usage:
        yield frame({**tally.body([]), "usage": tally.usage()})
    yield DONE


async def _chunks(
    tally: Tally, events: AsyncIterator[Indexed], n: int
) -> AsyncIterator[dict[str, Any]]:
    async for index, event in events:
        tally.note(index, event, index // n)
        if isinstance(event, Failed):
            raise RequestError.of(event)
        if isinstance(event, Started | Tokens) and event.text:
            yield tally.body([choice_body(index, event.text, None)])
        elif isinstance(event, Finished):
            yield tally.body([choice_body(index, "", event.reason)])


def frame(tree: dict[str, Any]) -> bytes:
    """One event. JSON has no raw line breaks, so that one `data:` line holds it."""
    return (
        b"data: " + json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
