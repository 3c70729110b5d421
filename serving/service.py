"""From a body to an answer: parse, find the model, ask it, write what it says. No Ray, no model."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from serving.answers import ChatStyle, TextStyle, classification_body, text_body, tokens_body
from serving.classification import Classification
from serving.completion import Completion, Text
from serving.engines.base import (
    Chat,
    Encoded,
    Event,
    Failed,
    GenerationRequest,
    Predicted,
    PredictionRequest,
    Prompt,
    Request,
    Started,
    TextRequest,
)
from serving.schema import Limits, ModelCard, RequestError
from serving.stream import Tally, Used, accepted, chained, collect, merge, server_sent

MODEL_HEADER = "x-model-id"
LONGEST_TOKEN = 512
"""Characters; vocabularies have runs of spaces of up to 256."""


class Gateway(Protocol):
    """The way from HTTP to the engines."""

    def models(self) -> Sequence[ModelCard]: ...

    def submit(
        self, card: ModelCard, request: Request, *, whole: bool = False
    ) -> AsyncIterator[Event]:
        """
        Args:
            whole: nothing is shown before the last event, so that a request whose replica was lost
                can begin again.
        """
        ...


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    gateway: Gateway
    limits: Limits
    deadline_seconds: float

    def card(self, name: str, route: str | None = None) -> ModelCard:
        """
        Raises:
            RequestError: 404 for a model that is not served, 400 for one of another route.
        """
        cards = self.gateway.models()
        found = next((c for c in cards if name == c.id), None) or next(
            (c for c in cards if name == c.artifact.partition("/")[2]), None
        )
        if found is None:
            served = ", ".join(c.id for c in cards) or "none"
            raise RequestError(
                404,
                f"The model {name[:80]!r} does not exist: this service has {served}",
                param="model",
                code="model_not_found",
            )
        if route not in (None, found.route):
            raise RequestError(
                400, f"{found.id} answers POST /v1/{found.route}, not {route}", param="model"
            )
        return found

    async def complete(self, asked: Completion, identity: str, ends: float, used: Used) -> Response:
        card = self.card(asked.model, "completions")
        for prompt in asked.prompts:
            check_length(card, prompt)
        if asked.fill:
            asked = await self._filled(card, asked, identity, ends)
        requests = sequences(asked, identity)
        style = ChatStyle() if asked.chat else TextStyle()
        scored = asked.sampling.logprobs is not None
        tally = Tally(style, identity, int(time.time()), asked.model, scored, used=used)
        streams = [self.gateway.submit(card, r, whole=not asked.stream) for r in requests]
        events = merge(streams, ends)
        first = await accepted(events, len(requests))
        headers = {MODEL_HEADER: _artifact(first)}
        following = chained(first, events)
        if not asked.stream:
            return JSONResponse(await collect(tally, following, asked.n), headers=headers)
        sent = server_sent(tally, following, asked.n, include_usage=asked.include_usage)
        return StreamingResponse(
            sent,
            media_type="text/event-stream",
            # Proxies on the way must not wait for more.
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def classify(self, asked: Classification, identity: str, ends: float) -> Response:
        card = self.card(asked.model, "classify")
        event, artifact = await self._answer(card, PredictionRequest(identity, asked.inputs), ends)
        assert isinstance(event, Predicted)
        body = classification_body(asked.model, event.answers)
        return JSONResponse(body, headers={MODEL_HEADER: artifact or card.artifact})

    async def tokenize(self, asked: Text, identity: str, ends: float) -> Response:
        card = self.card(asked.model, "completions")
        return JSONResponse(tokens_body(card, await self._encoded(card, asked, identity, ends)))

    async def detokenize(self, asked: Text, identity: str, ends: float) -> Response:
        card = self.card(asked.model, "completions")
        return JSONResponse(text_body(card, await self._encoded(card, asked, identity, ends)))

    async def _encoded(self, card: ModelCard, asked: Text, identity: str, ends: float) -> Encoded:
        check_length(card, asked.prompt)
        event, _ = await self._answer(card, TextRequest(identity, asked.prompt), ends)
        assert isinstance(event, Encoded)
        return event

    async def _answer(self, card: ModelCard, request: Request, ends: float) -> tuple[Event, str]:
        """The only event of an answer that comes at once, and the artifact that gave it.

        Raises:
            RequestError: if the engine refuses, or the deadline passes.
        """
        artifact = ""
        events = merge([self.gateway.submit(card, request, whole=True)], ends)
        async with aclosing(events) as following:  # type: ignore[type-var]
            async for _, event in following:
                if isinstance(event, Failed):
                    raise RequestError.of(event)
                if isinstance(event, Started):
                    artifact = event.model
                else:
                    return event, artifact
        raise AssertionError("an engine's events end with the last one")

    async def _filled(
        self, card: ModelCard, asked: Completion, identity: str, ends: float
    ) -> Completion:
        """With the room that the prompts leave, where no `max_tokens` was given.

        Raises:
            RequestError: if a prompt leaves none.
        """
        prompts = []
        for prompt in asked.prompts:
            text = Text(asked.model, prompt)
            prompts.append((await self._encoded(card, text, f"{identity}-t", ends)).ids)
        longest = max(len(prompt) for prompt in prompts)
        room = (card.context_length or longest + self.limits.max_tokens) - longest
        if room < 1:
            raise RequestError(
                400,
                f"This model's maximum context length is {card.context_length} tokens and the "
                f"prompt has {longest}: shorten it.",
                param="messages" if asked.chat else "prompt",
                code="context_length_exceeded",
            )
        sampling = replace(asked.sampling, max_tokens=min(room, self.limits.max_tokens))
        return replace(asked, prompts=tuple(prompts), sampling=sampling)


def check_length(card: ModelCard, prompt: Prompt) -> None:
    """Refuse what can never fit before anybody tokenises it; the engine counts exactly.

    Raises:
        RequestError: 400.
    """
    if card.context_length is None:
        return
    if isinstance(prompt, Chat):
        length = sum(len(str(message["content"])) for message in prompt.messages)
    else:
        length = len(prompt)
    longest = card.context_length * (1 if isinstance(prompt, tuple) else LONGEST_TOKEN)
    if length > longest:
        unit = "tokens" if isinstance(prompt, tuple) else "characters"
        raise RequestError(
            400,
            f"This model's maximum context length is {card.context_length} tokens and the prompt "
            f"has {length} {unit}: shorten it.",
            param="messages" if isinstance(prompt, Chat) else "prompt",
            code="context_length_exceeded",
        )


def sequences(asked: Completion, identity: str) -> list[GenerationRequest]:
    """One engine request for each prompt and choice: choice i of prompt p has index p * n + i."""
    found: list[GenerationRequest] = []
    for prompt in asked.prompts:
        for choice in range(asked.n):
            seed = asked.sampling.seed
            if seed is not None:
                # Choices of one seed differ from each other and stay the same from call to call.
                seed = (seed + choice) % 2**63
            found.append(
                GenerationRequest(
                    f"{identity}-{len(found)}-{secrets.token_hex(4)}",
                    prompt,
                    replace(asked.sampling, seed=seed),
                    asked.echo,
                    whole=not asked.stream,
                )
            )
    return found


def _artifact(first: Sequence[tuple[int, Any]]) -> str:
    return next(event.model for _, event in first if isinstance(event, Started))
