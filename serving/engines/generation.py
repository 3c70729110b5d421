"""Continuous batching for any Hugging Face causal language model.

Requests join and leave between steps. One thread of its own runs the model; the event loop only
hands requests in and events out. Each request keeps a cache of its own, so that its tokens depend
on nothing but itself: in fp32, greedy output equals `generate` token for token.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import ServingError
from serving.engines.base import (
    OVERLOADED,
    Chat,
    Encoded,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Prompt,
    SamplingParameters,
    Started,
    Stats,
    TextRequest,
    Tokens,
    is_last,
)
from serving.engines.scheduler import Scheduler, Step
from serving.engines.text import TextStream
from serving.engines.tokenizer import PromptError, Tokenizer

if TYPE_CHECKING:
    import torch


class Runner(Protocol):
    """The model behind the engine."""

    context_length: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    end: frozenset[int]
    """Tokens that end a text."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """
        Raises:
            PromptError: for a chat that cannot be rendered.
        """
        ...

    def piece(self, token: int) -> tuple[str, bytes]:
        """A token's own text and bytes."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def new_cache(self) -> Any: ...

    def forward(self, cache: Any, tokens: Sequence[int]) -> torch.Tensor:
        """Read tokens into the cache; fp32 logits [vocabulary] after the last of them."""
        ...


@dataclass
class _Sequence:
    """A request on its way; touched by the engine's thread only, once it was accepted."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    text: TextStream
    emit: Callable[[Event], None]
    cache: Any = None
    generator: torch.Generator | None = None
    produced: list[int] = field(default_factory=list)


class GenerationEngine:
    """See `engines.base.Engine`.

    Args:
        model: id of the artifact, told with each answer.
        slots: requests that run at once; each holds a cache of up to `context_length` tokens.
    """

    def __init__(self, model: str, runner: Runner, *, slots: int, max_waiting: int) -> None:
        self.model = model
        self._runner = runner
        self._scheduler = Scheduler(slots, max_waiting)
        self._sequences: dict[str, _Sequence] = {}
        # Guards the scheduler and the table above; held for bookkeeping only, never for a step.
        self._changed = threading.Condition()
        self._closing = False
        self._fault: BaseException | None = None
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    async def submit(self, request: GenerationRequest | TextRequest) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        try:
            prompt = await loop.run_in_executor(self._tokenizing, self._encode, request.prompt)
        except PromptError as error:
            yield Failed(400, str(error), None, _field(request.prompt))
            return
        if isinstance(request, TextRequest):
            yield self._encoded(prompt)
            return
        problem = self._problem(request, prompt)
        if problem is not None:
            yield problem
            return
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        stream = TextStream(self._runner.decode, request.sampling.stop)
        refused = self._enqueue(_Sequence(request.id, prompt, request.sampling, stream, emit))
        if refused is not None:
            yield refused
            return
        try:
            yield Started(self.model, len(prompt), self._echo(request))
            async for event in _until_last(queue):
                yield event
        finally:
            self.cancel(request.id)

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._scheduler.remove(request_id)
            self._sequences.pop(request_id, None)

    def stats(self) -> Stats:
        with self._changed:
            return Stats(self._scheduler.running, self._scheduler.waiting)

    def check(self) -> None:
        if self._fault is not None or not self._thread.is_alive():
            raise ServingError(f"the generation thread of {self.model} stopped: {self._fault!r}")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._tokenizing.shutdown(wait=False)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt if isinstance(prompt, tuple) else self._runner.encode(prompt)

    def _encoded(self, ids: tuple[int, ...]) -> Event:
        outside = self._outside(ids)
        if outside is not None:
            return outside
        pieces = tuple(self._runner.piece(token)[0] for token in ids)
        return Encoded(ids, pieces, self._runner.decode(ids))

    def _outside(self, ids: tuple[int, ...]) -> Failed | None:
        outside = [token for token in ids if not 0 <= token < self._runner.vocabulary]
        if not outside:
            return None
        return Failed(
            400,
            f"prompt holds token {outside[0]} and this model's vocabulary ends at "
            f"{self._runner.vocabulary - 1}",
            None,
            "prompt",
        )

    def _echo(self, request: GenerationRequest) -> str:
        if not request.echo:
            return ""
        prompt = request.prompt
        return prompt if isinstance(prompt, str) else self._runner.decode(self._encode(prompt))

    def _problem(self, request: GenerationRequest, prompt: tuple[int, ...]) -> Failed | None:
        """Why a request can never be answered."""
        limit, wanted = self._runner.context_length, request.sampling.max_tokens
        if not prompt:
            return Failed(400, "prompt is empty: give at least one token", None, "prompt")
        outside = self._outside(prompt)
        if outside is not None:
            return outside
        if len(prompt) + wanted > limit:
            return Failed(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(prompt) + wanted} tokens ({len(prompt)} in the prompt, {wanted} for the "
                "completion): shorten the prompt or max_tokens.",
                "context_length_exceeded",
                _field(request.prompt),
            )
        return None

    def _enqueue(self, sequence: _Sequence) -> Failed | None:
        with self._changed:
            if self._fault is not None or self._closing:
                return Failed(503, "the model is being replaced", "unavailable", retry_after=1)
            if not self._scheduler.submit(sequence.id):
                return OVERLOADED
            self._sequences[sequence.id] = sequence
            self._changed.notify()
        return None

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as fault:
            # The thread's border: the fault goes to every caller and to the health check.
            with self._changed:
                self._fault = fault
                lost = list(self._sequences.values())
            for sequence in lost:
                sequence.emit(Failed(500, "the model failed on this request", "engine_fault"))
            raise

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._sequences or self._closing)
            return bool(self._sequences)

    def _step(self) -> None:
        """Schedule, run, post-process: one prompt and one token for each running request."""
        with self._changed:
            step: Step = self._scheduler.next_step()
        for request_id in (*step.decode, step.prefill):
            sequence = self._sequences.get(request_id or "")
            if sequence is None:
                continue  # cancelled since
            unread = sequence.produced[-1:] or sequence.prompt
            if sequence.cache is None:
                sequence.cache = self._runner.new_cache()
            logits = self._runner.forward(sequence.cache, unread)
            if self._accept(sequence, choose(logits, sequence)):
                self.cancel(sequence.id)

    def _accept(self, sequence: _Sequence, token: int) -> bool:
        """Emit a token; True where it was the last one."""
        sequence.produced.append(token)
        count = len(sequence.produced)
        if token in self._runner.end:
            sequence.emit(Tokens(sequence.text.flush(), (token,)))
            sequence.emit(Finished("stop", count))
            return True
        text, stopped = sequence.text.push(token)
        out_of_tokens = count >= sequence.sampling.max_tokens
        if out_of_tokens and not stopped:
            text += sequence.text.flush()
        sequence.emit(Tokens(text, (token,)))
        if stopped or out_of_tokens:
            sequence.emit(Finished("stop" if stopped else "length", count))
        return stopped or out_of_tokens


def _field(prompt: Prompt) -> str:
    """Where the request had it."""
    return "messages" if isinstance(prompt, Chat) else "prompt"


async def _until_last(queue: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    """Events in order; tokens that a slow reader has let pile up come as one."""
    while True:
        event = await queue.get()
        while isinstance(event, Tokens) and not queue.empty():
            following = queue.get_nowait()
            if isinstance(following, Tokens):
                event = Tokens(event.text + following.text, event.ids + following.ids)
            else:
                yield event
                event = following
        yield event
        if is_last(event):
            return


def choose(logits: torch.Tensor, sequence: _Sequence) -> int:
    """The next token from logits [vocabulary]."""
    sampling = sequence.sampling
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sequence.generator is None:
        sequence.generator = _generator(sampling.seed)
    return draw(logits, sampling, sequence.generator)


def draw(logits: torch.Tensor, sampling: SamplingParameters, generator: torch.Generator) -> int:
    """Sample from softmax(logits / temperature), cut to the top k, then to the top p.

    The nucleus is the smallest set of likeliest tokens with at least `top_p` of the probability
    (Holtzman et al. 2020); the likeliest token always remains.
    """
    import torch

    count = min(sampling.top_k or logits.numel(), logits.numel())
    values, tokens = logits.cpu().topk(count)
    # The largest becomes 0 before the division, so that a tiny temperature cannot overflow.
    probabilities = torch.softmax((values - values[0]) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < max(sampling.top_p, 1e-9))
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _generator(seed: int | None) -> torch.Generator:
    import torch

    # manual_seed takes 64 bits; a request without a seed gets one that nobody can guess.
    chosen = secrets.randbits(63) if seed is None else seed
    return torch.Generator().manual_seed(chosen)


class CausalRunner:
    """A published causal language model, in fp32 on a CPU or its own precision on a GPU."""

    def __init__(self, folder: Path, context_length: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer(folder)
        self.encode, self.decode, self.piece = tokenizer.encode, tokenizer.decode, tokenizer.piece
        dtype: Any = "auto" if self._device.type == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(self._device).eval()
        self._last_only: dict[str, Any] = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        self.context_length = context_length
        self.vocabulary = int(model.config.vocab_size)
        ends = model.generation_config.eos_token_id
        self.end = frozenset([ends] if isinstance(ends, int) else ends or [])

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def forward(self, cache: Any, tokens: Sequence[int]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self._device)
            answer = self._model(
                input_ids=ids, past_key_values=cache, use_cache=True, **self._last_only
            )
            return answer.logits[0, -1].float()
