"""What the generation engine asks of a model: rows of a cache, tokens in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from serving.engines.base import Prompt
from serving.engines.text import Pieces

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "int8"]
"""In which weights are held and multiplied; everything between the products is fp32."""


@dataclass(frozen=True)
class Feed:
    """Tokens that a row reads in one step."""

    row: int
    start: int
    """Tokens that the row holds already."""
    tokens: Sequence[int]
    wanted: int
    """Logits are asked for after each of this many last tokens."""


class Runner(Protocol):
    context_length: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    end: frozenset[int]
    """Tokens that end a text."""
    precision: Precision
    slots: int
    """Requests at once, in rows 0 to slots - 1."""
    spare: int
    """Rows behind them, which keep prefixes; 0 where rows cannot be copied in part."""
    chunk: int | None
    """Prompt tokens to read beside running requests; None where a prompt is read in one piece."""
    constant: bool
    """Whether what is computed for a request has the same shape whatever runs beside it."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """
        Raises:
            PromptError: for a chat that cannot be rendered.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def pieces(self) -> Pieces:
        """What decodes one answer while it comes."""
        ...

    def piece(self, token: int) -> tuple[str, bytes]:
        """A token's own text and bytes."""
        ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The target row holds the first tokens of the source row from now on."""
        ...

    def forward(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        """Read tokens.

        Args:
            decode: one token each; the first lies in row 0, and so on.
            prompts: chunks of prompts, in the rows behind.

        Returns:
            fp32 logits [wanted, vocabulary], in the order of the feeds and their tokens.
        """
        ...
