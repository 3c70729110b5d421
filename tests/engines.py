"""Engines under one contract: each with the model that says what is right.

A subject pairs a runner with `reference(ids) -> logits`, computed the plain way: the whole text
anew for every token.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engines import loading
from serving.engines.base import (
    Event,
    GenerationRequest,
    Prompt,
    SamplingParameters,
    Started,
    TextRequest,
    Tokens,
)
from serving.engines.generation import GenerationEngine
from serving.engines.linear import Kind
from serving.engines.runner import Feed, Precision, Runner
from serving.engines.text import BytePieces, Pieces
from serving.engines.tokenizer import PromptError


def need(kind: Kind, precision: Precision) -> None:
    """Skip where this machine has no right products of that kind: 8 bits take VNNI instructions,
    packed bf16 those of AVX-512."""
    if loading._checked(kind, torch.eye(64), precision) is None:
        pytest.skip(f"this machine has no {precision} products")


Logits = Callable[[Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    runner: Callable[..., Runner]
    """Takes `slots` and `spare`."""
    reference: Logits
    """fp32 logits [len(ids), vocabulary] of a whole text."""


class TableRunner:
    """No model at all: the logits are looked up by the last two tokens, which its rows remember."""

    context_length, vocabulary, end = 256, 257, frozenset([256])
    precision: Precision = "fp32"
    constant = False

    def __init__(self, slots: int = 4, spare: int = 2, chunk: int | None = 16) -> None:
        self.slots, self.spare, self.chunk = slots, spare, chunk
        self.rows: list[list[int]] = [[] for _ in range(slots + spare)]
        self.steps = 0

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        if not isinstance(prompt, str):
            raise PromptError("no chat template")
        return tuple(prompt.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")

    def pieces(self) -> Pieces:
        return BytePieces(lambda token: self.piece(token)[1])

    def piece(self, token: int) -> tuple[str, bytes]:
        raw = bytes([token]) if token < 256 else b""
        return raw.decode("utf-8", errors="replace"), raw

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.rows[target] = self.rows[source][:tokens]

    def forward(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        self.steps += 1
        assert [feed.row for feed in decode] == list(range(len(decode)))
        found = [torch.empty(0, self.vocabulary)]
        for feed in (*decode, *prompts):
            row = self.rows[feed.row][: feed.start]
            assert len(row) == feed.start
            self.rows[feed.row] = [*row, *feed.tokens]
            found.append(table(self.rows[feed.row])[feed.start :][-feed.wanted or len(row) + 999 :])
        return torch.cat(found)


def table(ids: Sequence[int]) -> torch.Tensor:
    rows = []
    for at in range(len(ids)):
        before = ids[at - 1] if at else 0
        rows.append(
            torch.randn(257, generator=torch.Generator().manual_seed(ids[at] * 300 + before))
        )
    logits = 2 * torch.stack(rows) if rows else torch.empty(0, 257)
    logits[:, 256] = -20.0
    return logits


def reference_of(folder: Path) -> Logits:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([list(ids)])).logits[0].float()

    return logits


def anew(runner: Runner) -> Logits:
    """What a lower precision is held to: its own products over the whole text at once, alone. How
    far they are from fp32 is what `parity` bounds."""

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return runner.forward([], [Feed(0, 0, tuple(ids), len(ids))]).float().cpu()

    return logits


def request(prompt: Any = "a", name: str = "r", echo: bool = False, **sampling: Any) -> Any:
    parameters = SamplingParameters(**({"max_tokens": 4, "temperature": 0} | sampling))
    return GenerationRequest(name, prompt, parameters, echo)


async def answer(
    engine: GenerationEngine, asked: GenerationRequest | TextRequest, delay: float = 0
) -> list[Event]:
    await asyncio.sleep(delay)
    return [event async for event in engine.submit(asked)]


def run(
    runner: Runner,
    *asked: GenerationRequest | TextRequest,
    waiting: int = 16,
    delays: Sequence[float] = (),
) -> list[list[Event]]:
    """All requests at once, or each after its delay in seconds."""
    engine = GenerationEngine("model/fake@1", runner, max_waiting=waiting)
    late = list(delays) or [0.0] * len(asked)

    async def all_of_them() -> list[list[Event]]:
        return await asyncio.gather(
            *(answer(engine, one, delay) for one, delay in zip(asked, late, strict=True))
        )

    try:
        return asyncio.run(all_of_them())
    finally:
        engine.close()


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Started | Tokens))


def ids_of(events: Sequence[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.ids]


def greedy(reference: Logits, prompt: Sequence[int], count: int, end: frozenset[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference(ids)[-1].argmax()))
        if ids[-1] in end:
            break
    return ids[len(prompt) :]
