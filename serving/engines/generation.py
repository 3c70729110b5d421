"""Continuous batching: requests join and leave between steps.

One thread of its own runs the model; the event loop only hands requests in and events out. What a
step does is decided by the scheduler, how the model computes it is the runner's affair.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import ServingError
from serving.engines import sampling
from serving.engines.answer import Answer
from serving.engines.base import (
    OVERLOADED,
    Chat,
    Encoded,
    Event,
    Failed,
    GenerationRequest,
    Likelihood,
    Prompt,
    PromptScored,
    Started,
    Stats,
    TextRequest,
    TokenLogprob,
    is_last,
)
from serving.engines.mailbox import Mailbox
from serving.engines.runner import Feed, Runner
from serving.engines.sampling import Drawing
from serving.engines.scheduler import Chunk, Scheduler
from serving.engines.text import TextStream
from serving.engines.tokenizer import PromptError

if TYPE_CHECKING:
    import torch

LAST = 19
"""Lowest priority of a thread; to take a lower one is always allowed."""


@dataclass
class _Sequence:
    """A request on its way; touched by the engine's thread only, once it was accepted."""

    key: str
    """Its name within the engine: callers may use an id twice."""
    prompt: tuple[int, ...]
    answer: Answer
    drawing: Drawing
    scored: bool
    """Whether the prompt's own log-probabilities are asked for."""
    loop: asyncio.AbstractEventLoop
    mailbox: Mailbox
    whole: bool
    """Whether nobody looks before the last event."""
    scores: list[TokenLogprob] = field(default_factory=list)
    """Of the part of the prompt that was read."""
    kept: list[Event] = field(default_factory=list)

    def leaving(self, news: list[Event]) -> list[Event]:
        """The events that go out now. Where nobody looks, those after the first token wait for the
        last one, because waking an event loop takes time from the step that follows."""
        if not self.whole or len(self.answer.produced) < 2:
            return news
        self.kept += news
        if not is_last(self.kept[-1]):
            return []
        out, self.kept = self.kept, []
        return out

    @property
    def top(self) -> int | None:
        return self.drawing.sampling.logprobs


class GenerationEngine:
    """See `engines.base.Engine`.

    Args:
        model: id of the artifact, told with each answer.
        stream_interval: see `Mailbox`.
    """

    def __init__(
        self, model: str, runner: Runner, *, max_waiting: int, stream_interval: float = 0.02
    ) -> None:
        self.model, self._stream_interval = model, stream_interval
        self._runner = runner
        self._scheduler = Scheduler(
            runner.slots,
            max_waiting,
            chunk=runner.chunk,
            prefixes=runner.spare,
            aligned=runner.constant,
        )
        self._sequences: dict[str, _Sequence] = {}
        self._numbers = itertools.count()
        self._totals = [0, 0, 0]
        """Tokens of prompts, the part that was not read, tokens of answers; since the start."""
        # Guards all of the above; held for bookkeeping only, never for a step.
        self._changed = threading.Condition()
        self._closing = False
        self._fault: BaseException | None = None
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    async def submit(self, request: GenerationRequest | TextRequest) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        if isinstance(request, GenerationRequest) and self._full():
            # Before anything is spent on it: there may be many of these.
            yield OVERLOADED
            return
        try:
            prompt = await loop.run_in_executor(
                self._tokenizing, self._runner.encode, request.prompt
            )
        except PromptError as error:
            yield Failed(400, str(error), None, _field(request.prompt))
            return
        problem = self._problem(request, prompt)
        if problem is not None or isinstance(request, TextRequest):
            yield problem or self._encoded(prompt)
            return
        sequence = self._sequence(request, prompt, loop)
        refused = self._enqueue(sequence)
        if refused is not None:
            yield refused
            return
        try:
            yield Started(self.model, len(prompt), self._echo(request, prompt))
            async for event in sequence.mailbox.until_last():
                yield event
        finally:
            self._forget([sequence.key])

    def cancel(self, request_id: str) -> None:
        with self._changed:
            keys = [key for key in self._sequences if key.rpartition("#")[0] == request_id]
        self._forget(keys)

    def stats(self) -> Stats:
        with self._changed:
            queued = sum(
                self._scheduler.unread(key) + sequence.answer.left
                for key, sequence in self._sequences.items()
            )
            return Stats(
                self._scheduler.running,
                self._scheduler.waiting,
                queued_tokens=queued,
                cache_tokens=self._scheduler.places.tokens,
                cache_capacity=(self._runner.slots + self._runner.spare)
                * self._runner.context_length,
                prompt_tokens_total=self._totals[0],
                cached_tokens_total=self._totals[1],
                completion_tokens_total=self._totals[2],
            )

    def check(self) -> None:
        if self._fault is not None or not self._thread.is_alive():
            raise ServingError(f"the generation thread of {self.model} stopped: {self._fault!r}")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._tokenizing.shutdown(wait=False)

    # --- at the door, on the event loop

    def _sequence(
        self,
        request: GenerationRequest,
        prompt: tuple[int, ...],
        loop: asyncio.AbstractEventLoop,
    ) -> _Sequence:
        asked = request.sampling
        text = TextStream(self._runner.pieces(), asked.stop)
        return _Sequence(
            key=f"{request.id}#{next(self._numbers)}",
            prompt=prompt,
            answer=Answer(asked, text, self._runner.end),
            drawing=Drawing(asked),
            scored=request.echo and asked.logprobs is not None,
            loop=loop,
            mailbox=Mailbox(self._stream_interval),
            whole=request.whole,
        )

    def _full(self) -> bool:
        with self._changed:
            return self._scheduler.full

    def _encoded(self, ids: tuple[int, ...]) -> Encoded:
        pieces = tuple(self._runner.piece(token)[0] for token in ids)
        return Encoded(ids, pieces, self._runner.decode(ids))

    def _echo(self, request: GenerationRequest, prompt: tuple[int, ...]) -> str:
        if not request.echo:
            return ""
        return request.prompt if isinstance(request.prompt, str) else self._runner.decode(prompt)

    def _problem(
        self, request: GenerationRequest | TextRequest, prompt: tuple[int, ...]
    ) -> Failed | None:
        """Why a request can never be answered."""
        where = _field(request.prompt)
        vocabulary = self._runner.vocabulary
        outside = [token for token in prompt if not 0 <= token < vocabulary]
        if outside:
            return Failed(
                400,
                f"prompt holds token {outside[0]} and this model's vocabulary ends at "
                f"{vocabulary - 1}",
                None,
                where,
            )
        if isinstance(request, TextRequest):
            return None
        if not prompt:
            return Failed(400, "prompt is empty: give at least one token", None, where)
        limit, wanted = self._runner.context_length, request.sampling.max_tokens
        if len(prompt) + wanted > limit:
            return Failed(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + wanted} tokens ({len(prompt)} in the prompt, {wanted} for the "
                "completion): shorten the prompt or max_tokens.",
                "context_length_exceeded",
                where,
            )
        return None

    def _enqueue(self, sequence: _Sequence) -> Failed | None:
        with self._changed:
            if self._fault is not None or self._closing:
                return Failed(503, "the model is being replaced", "unavailable", retry_after=1)
            # What was taken over has no logits: a scored prompt is read as a whole.
            if not self._scheduler.submit(sequence.key, sequence.prompt, reuse=not sequence.scored):
                return OVERLOADED
            self._sequences[sequence.key] = sequence
            self._totals[0] += len(sequence.prompt)
            self._changed.notify()
        return None

    def _forget(self, keys: Sequence[str]) -> None:
        with self._changed:
            for key in keys:
                self._scheduler.remove(key)
                self._sequences.pop(key, None)

    # --- on the engine's own thread

    def _work(self) -> None:
        _step_back()
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as fault:
            # The thread's border: the fault goes to every caller and to the health check.
            with self._changed:
                self._fault = fault
                lost = list(self._sequences.values())
            failed = Failed(500, "the model failed on this request", "engine_fault")
            _deliver([(sequence, [failed]) for sequence in lost])
            raise

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._sequences or self._closing)
            return bool(self._sequences)

    def _step(self) -> None:
        """Schedule, run, post-process."""
        with self._changed:
            step = self._scheduler.next_step()
            decoding = [self._sequences[key] for key in step.decode]
            reading = [(chunk, self._sequences[chunk.request]) for chunk in step.prefill]
            self._note_cached(reading)
        for copy in step.copies:
            self._runner.copy(copy.source, copy.target, copy.tokens)
        if not decoding and not reading:
            return
        logits = self._runner.forward(
            [self._next(row, sequence) for row, sequence in enumerate(decoding)],
            [_chunk_feed(chunk, sequence) for chunk, sequence in reading],
        )
        events = self._chosen(logits[: len(decoding)], decoding)
        at = len(decoding)
        for chunk, sequence in reading:
            wanted = chunk.count if sequence.scored else int(chunk.last)
            events += self._read(logits[at : at + wanted], chunk, sequence)
            at += wanted
        self._forget([sequence.key for sequence, news in events if is_last(news[-1])])
        _deliver([(sequence, sequence.leaving(news)) for sequence, news in events])

    def _note_cached(self, reading: Sequence[tuple[Chunk, _Sequence]]) -> None:
        for chunk, sequence in reading:
            cached = self._scheduler.cached(chunk.request)
            if cached and chunk.start == cached:  # its first chunk
                sequence.answer.cached = cached
                self._totals[1] += cached

    def _next(self, row: int, sequence: _Sequence) -> Feed:
        token = sequence.answer.produced[-1]
        start = len(sequence.prompt) + len(sequence.answer.produced) - 1
        self._scheduler.places.hold(sequence.key, (token,))
        return Feed(row, start, (token,), 1)

    def _read(
        self, logits: torch.Tensor, chunk: Chunk, sequence: _Sequence
    ) -> list[tuple[_Sequence, list[Event]]]:
        """What follows from a chunk of a prompt: its scores, and the first token after the last."""
        if sequence.scored:
            self._score(logits, chunk, sequence)
        if not chunk.last:
            return []
        before: list[Event] = []
        if sequence.scored:
            before.append(PromptScored(tuple(sequence.scores)))
        if sequence.drawing.sampling.max_tokens == 0:
            return [(sequence, [*before, *sequence.answer.nothing()])]
        [(_, news)] = self._chosen(logits[-1:], [sequence])
        return [(sequence, [*before, *news])]

    def _chosen(
        self, logits: torch.Tensor, sequences: Sequence[_Sequence]
    ) -> list[tuple[_Sequence, list[Event]]]:
        """The next token of each sequence, as events."""
        if not sequences:
            return []
        tokens = sampling.choose(logits, [sequence.drawing for sequence in sequences])
        entries = self._logprobs(logits, tokens, [sequence.top for sequence in sequences])
        self._totals[2] += len(tokens)
        events = []
        for sequence, token, entry in zip(sequences, tokens, entries, strict=True):
            sequence.drawing.note(token)
            events.append((sequence, sequence.answer.accept(token, entry)))
        return events

    def _score(self, logits: torch.Tensor, chunk: Chunk, sequence: _Sequence) -> None:
        """Each row of logits tells how likely the prompt's next token was."""
        if not chunk.start:
            sequence.scores.append(TokenLogprob(self._likelihood(sequence.prompt[0], None), ()))
        following = sequence.prompt[chunk.start + 1 : chunk.start + chunk.count + 1]
        if following:
            rows = self._logprobs(
                logits[: len(following)], following, [sequence.top] * len(following)
            )
            sequence.scores += [entry for entry in rows if entry is not None]

    def _logprobs(
        self, logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int | None]
    ) -> list[TokenLogprob | None]:
        """Of each row's token, where asked for."""
        found: list[TokenLogprob | None] = [None] * len(tokens)
        rows = [row for row, top in enumerate(tops) if top is not None]
        if not rows:
            return found
        most = max(top for top in tops if top is not None)
        scored = sampling.logprobs(logits[rows], [tokens[row] for row in rows], most)
        for row, (own, (ids, values)) in zip(rows, scored, strict=True):
            ranked = list(zip(ids, values, strict=True))[: tops[row]]
            top = tuple(self._likelihood(token, value) for token, value in ranked)
            found[row] = TokenLogprob(self._likelihood(tokens[row], own), top)
        return found

    def _likelihood(self, token: int, logprob: float | None) -> Likelihood:
        text, raw = self._runner.piece(token)
        return Likelihood(token, text, raw, logprob)


def _step_back() -> None:
    """Let what takes calls in, or refuses them, go before this thread and its computing threads.

    Steps fill the cores for as long as anybody asks; a call needs little of one, and at once.
    `RAY_worker_niceness` (`cluster/proxy.py`) says how far before them the rest of Ray goes.
    """
    if sys.platform == "linux":  # where a priority is a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)


def _chunk_feed(chunk: Chunk, sequence: _Sequence) -> Feed:
    tokens = sequence.prompt[chunk.start : chunk.start + chunk.count]
    return Feed(chunk.row, chunk.start, tokens, chunk.count if sequence.scored else int(chunk.last))


def _deliver(events: Sequence[tuple[_Sequence, Sequence[Event]]]) -> None:
    """Hand all events of a step over at once: waking an event loop costs more than an event."""
    loops = {sequence.loop for sequence, news in events if news}
    for loop in loops:
        batch = [(s.mailbox, event) for s, news in events if s.loop is loop for event in news]
        try:
            loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:
            # The loop was closed with requests still running: nobody listens any more.
            continue


def _put(batch: Sequence[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in batch:
        mailbox.put(event)


def _field(prompt: Prompt) -> str:
    """Where the request had it."""
    return "messages" if isinstance(prompt, Chat) else "prompt"
