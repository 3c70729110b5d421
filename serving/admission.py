"""Taking a call in: what its key may still ask for, and giving back what was not used."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Response
from fastapi.responses import StreamingResponse

from serving.auth import Key, Quota
from serving.classification import Classification
from serving.completion import Completion, Text
from serving.engines.base import Chat, Prompt
from serving.limits import Ledger, Verdict
from serving.schema import RequestError
from serving.stream import DONE, Used

Asked = Completion | Classification | Text
BYTES_PER_TOKEN = 3
"""A careful guess of a prompt's tokens, before it is tokenised; set right when the call is over."""
log = logging.getLogger("ray.serve")


class Books(Protocol):
    """Where it is written down what keys have used: see `limits.Ledger`, with the time given."""

    async def admit(
        self, key: str, quota: Quota, call: str, tokens: int, seconds: float
    ) -> Verdict: ...

    async def settle(self, key: str, call: str, tokens: int) -> None: ...


class OwnBooks:
    """Books of one process: right where there is one ingress replica."""

    def __init__(self) -> None:
        self._ledger = Ledger()

    async def admit(
        self, key: str, quota: Quota, call: str, tokens: int, seconds: float
    ) -> Verdict:
        now = time.monotonic()
        return self._ledger.admit(key, quota, call, tokens, now, now + seconds)

    async def settle(self, key: str, call: str, tokens: int) -> None:
        self._ledger.settle(key, call, tokens)


class SharedBooks:
    """Books that all ingress replicas share, kept by a deployment of its own.

    While it cannot be reached, each replica keeps books itself: the limits hold less exactly for
    some seconds, and no call fails for it.

    Args:
        handle: of the deployment `Accounts`.
    """

    SECONDS = 1.0

    def __init__(self, handle: Any) -> None:
        self._handle, self._own = handle, OwnBooks()

    async def admit(
        self, key: str, quota: Quota, call: str, tokens: int, seconds: float
    ) -> Verdict:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            asked = self._handle.admit.remote(key, quota, call, tokens, seconds)
            return await asyncio.wait_for(asked, self.SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("the shared accounts do not answer: %s", type(error).__name__)
            return await self._own.admit(key, quota, call, tokens, seconds)

    async def settle(self, key: str, call: str, tokens: int) -> None:
        """Waits until it is written; where it is lost, the call's place is free at its deadline."""
        told = asyncio.ensure_future(self._handle.settle.remote(key, call, tokens))
        await self._own.settle(key, call, tokens)
        # Unlike `wait_for`, it leaves alone what takes longer, or whose caller has gone.
        await asyncio.wait({told}, timeout=self.SECONDS)
        if told.done() and (error := told.exception()):
            log.warning("the shared accounts do not answer: %s", type(error).__name__)


@dataclass
class Call:
    """A call that was taken in."""

    identity: str
    ends: float
    """Deadline, by the loop's clock."""
    key: Key | None
    books: Books
    headers: dict[str, str]
    facts: dict[str, Any]
    """For the log."""
    used: Used = field(default_factory=Used)

    _over: bool = False

    async def answered(self, answer: Awaitable[Response]) -> Response:
        """The answer with the headers of the limits.

        Settled before its last part goes out: who asks for one call after the other finds its
        place free.
        """
        try:
            response = await answer
        except BaseException:
            await self._settle()
            raise
        response.headers.update(self.headers)
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._settled(response.body_iterator)
        else:
            await self._settle()
        return response

    async def _settled(self, parts: Any) -> Any:
        try:
            async for part in parts:
                if part == DONE:
                    await self._settle()
                yield part
        finally:
            await parts.aclose()
            await self._settle()

    async def _settle(self) -> None:
        if self._over:
            return
        self._over = True
        self.facts["tokens"] = self.used.tokens
        if self.key is not None:
            await self.books.settle(self.key.id, self.identity, self.used.tokens)


class Admission:
    """
    Args:
        default: the quota of keys that have none of their own, field by field.
    """

    def __init__(self, books: Books, default: Quota) -> None:
        self._books, self._default = books, default

    async def admit(self, scope: MutableMapping[str, Any], asked: Asked, seconds: float) -> Call:
        """
        Raises:
            RequestError: 429 beyond one of the key's limits.
        """
        # Not the request id: a client may send the same one twice.
        identity = secrets.token_hex(12)
        ends = scope["began"] + seconds
        facts: dict[str, Any] = {"model": asked.model[:80], "call": identity}
        scope["facts"] = facts
        key: Key | None = scope.get("key")
        quota = self._quota(key)
        if key is None or not quota.bounded:
            return Call(identity, ends, None, self._books, {}, facts)
        verdict = await self._books.admit(key.id, quota, identity, most_tokens(asked), seconds)
        if verdict.refusal is not None:
            raise RequestError(
                429,
                f"{verdict.refusal}: try again in {verdict.retry_after} s",
                code="rate_limit_exceeded",
                retry_after=verdict.retry_after,
                headers=verdict.headers,
            )
        return Call(identity, ends, key, self._books, verdict.headers, facts)

    def _quota(self, key: Key | None) -> Quota:
        given = key.quota if key else Quota()
        own = self._default
        return Quota(
            given.requests_per_minute or own.requests_per_minute,
            given.tokens_per_minute or own.tokens_per_minute,
            given.concurrent or own.concurrent,
        )


def most_tokens(asked: Asked) -> int:
    """What a call may take: its prompts, and the longest answers that it allows."""
    if isinstance(asked, Classification):
        return len(asked.inputs)
    if isinstance(asked, Text):
        return 0
    prompts = sum(_prompt_tokens(prompt) for prompt in asked.prompts)
    return prompts + len(asked.prompts) * asked.n * asked.sampling.max_tokens


def _prompt_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, tuple):
        return len(prompt)
    if isinstance(prompt, Chat):
        return sum(4 + _prompt_tokens(str(message["content"])) for message in prompt.messages)
    return len(prompt.encode()) // BYTES_PER_TOKEN + 1
