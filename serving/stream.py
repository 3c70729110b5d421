"""From events of engines to one answer: merging, collecting, server-sent events, the deadline."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serving.answers import Style, usage_body
from serving.engines.base import (
    Event,
    Failed,
    Finished,
    PromptScored,
    Started,
    TokenLogprob,
    Tokens,
    is_last,
)
from serving.schema import RequestError

DONE = b"data: [DONE]\n\n"
Indexed = tuple[int, Event]


@dataclass
class Used:
    """Tokens that a call has taken so far."""

    tokens: int = 0


@dataclass
class Tally:
    """What is known of one answer while it comes."""

    style: Style
    identity: str
    created: int
    model: str
    """Name that the request gave."""
    scored: bool = False
    """Whether log-probabilities were asked for."""
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0
    used: Used = field(default_factory=Used)

    def note(self, event: Event, prompt: int) -> None:
        """Count an event of a choice that continues prompt number `prompt`."""
        # Choices of one prompt share it: it is counted once.
        if isinstance(event, Started):
            self.used.tokens += event.prompt_tokens - self.prompt_tokens.get(prompt, 0)
            self.prompt_tokens[prompt] = event.prompt_tokens
        elif isinstance(event, Tokens):
            self.used.tokens += len(event.ids)
        elif isinstance(event, Finished):
            self.completion_tokens += event.completion_tokens
            known = self.cached_tokens.get(prompt, event.cached_tokens)
            self.cached_tokens[prompt] = min(known, event.cached_tokens)

    def usage(self) -> dict[str, Any]:
        return usage_body(
            sum(self.prompt_tokens.values()),
            self.completion_tokens,
            sum(self.cached_tokens.values()),
        )

    def scores(self, found: Sequence[TokenLogprob]) -> Sequence[TokenLogprob] | None:
        return found if self.scored else None

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._body(self.style.whole_object, choices), "usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body(self.style.chunk_object, choices)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.style.prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


async def merge(streams: Sequence[AsyncIterator[Event]], ends: float) -> AsyncIterator[Indexed]:
    """Events of all streams as they come, with the number of the stream, until the deadline.

    Closing it closes every stream. An exception of one stream ends all.

    Args:
        ends: by the loop's clock, in seconds.

    Raises:
        RequestError: 504 from the deadline on.
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

    # One timer for the whole answer, because one around each event costs more than the event.
    timer = asyncio.get_running_loop().call_at(ends, queue.put_nowait, _late())
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
        timer.cancel()
        running = [task for task in tasks if not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.gather(*running, return_exceptions=True)


def _late() -> RequestError:
    return RequestError(
        504, "the answer took longer than the deadline of this service", code="deadline"
    )


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


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    reason: str = ""


async def collect(tally: Tally, events: AsyncIterator[Indexed], n: int) -> dict[str, Any]:
    """The whole answer.

    Raises:
        RequestError: if one of the choices failed.
    """
    choices: dict[int, _Choice] = {}
    async for index, event in events:
        tally.note(event, index // n)
        if isinstance(event, Failed):
            raise RequestError.of(event)
        choice = choices.setdefault(index, _Choice())
        if isinstance(event, Started | Tokens):
            choice.text.append(event.text)
        if isinstance(event, PromptScored | Tokens):
            choice.scores += event.logprobs
        if isinstance(event, Finished):
            choice.reason = event.reason
    return tally.whole(
        [
            tally.style.whole(at, "".join(one.text), tally.scores(one.scores), one.reason)
            for at, one in sorted(choices.items())
        ]
    )


async def server_sent(
    tally: Tally, events: AsyncIterator[Indexed], n: int, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; an error inside it becomes an event of its own."""
    extra: dict[str, Any] = {"usage": None} if include_usage else {}
    async with aclosing(_chunks(tally, events, n)) as chunks:  # type: ignore[type-var]
        try:
            async for choice in chunks:
                yield frame({**tally.chunk([choice]), **extra})
        except RequestError as error:
            yield frame(error.body())
            return
    if include_usage:
        yield frame({**tally.chunk([]), "usage": tally.usage()})
    yield DONE


async def _chunks(
    tally: Tally, events: AsyncIterator[Indexed], n: int
) -> AsyncIterator[dict[str, Any]]:
    """Choices of one chunk each."""
    style, sent = tally.style, dict[int, int]()
    async for index, event in events:
        tally.note(event, index // n)
        if isinstance(event, Failed):
            raise RequestError.of(event)
        if isinstance(event, Started) and (opening := style.opening(index)) is not None:
            yield opening
        text = event.text if isinstance(event, Started | Tokens) else ""
        scores = event.logprobs if isinstance(event, PromptScored | Tokens) else ()
        if text or scores:
            yield style.piece(index, text, tally.scores(scores), sent.get(index, 0))
            sent[index] = sent.get(index, 0) + sum(len(score.token.text) for score in scores)
        if isinstance(event, Finished):
            yield style.ending(index, event.reason)


def frame(tree: dict[str, Any]) -> bytes:
    """One event. JSON has no raw line breaks, so that one `data:` line holds it."""
    return (
        b"data: " + json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
