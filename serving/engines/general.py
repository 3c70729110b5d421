"""Any Hugging Face causal language model, through its own code.

Each request has a cache of its own and each token a pass of its own, so that a request's tokens
depend on nothing but itself. Nothing is gained by neighbours; what the fast path cannot hold runs
here with the same results.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engines.linear import Precision
from serving.engines.runner import Feed
from serving.engines.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class GeneralRunner:
    """See `runner.Runner`.

    Args:
        model: a causal language model of Hugging Face, in evaluation mode.
        length: most tokens of prompt and answer together.
    """

    spare = 0
    chunk: int | None = None
    constant = True

    def __init__(self, model: Any, folder: Path, *, slots: int, length: int) -> None:
        tokenizer = Tokenizer(folder)
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.piece, self.pieces = tokenizer.piece, tokenizer.pieces
        self._model = model
        self._takes_count = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._caches: list[Any] = [None] * slots
        self.slots, self.context_length = slots, length
        self.vocabulary, self.end = int(model.config.vocab_size), ends(model)
        self.precision: Precision = "fp32" if str(model.dtype) == "torch.float32" else "bf16"

    def copy(self, source: int, target: int, tokens: int) -> None:
        """A row only ever moves as a whole: there are no prefixes here."""
        self._caches[target], self._caches[source] = self._caches[source], None

    def forward(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return torch.cat([self._one(feed) for feed in (*decode, *prompts)])

    def _one(self, feed: Feed) -> torch.Tensor:
        import torch
        from transformers import DynamicCache

        if feed.start == 0:
            self._caches[feed.row] = DynamicCache(config=self._model.config)
        answer = self._model(
            input_ids=torch.tensor([list(feed.tokens)], device=self._model.device),
            past_key_values=self._caches[feed.row],
            use_cache=True,
            **({"logits_to_keep": max(feed.wanted, 1)} if self._takes_count else {}),
        )
        logits: torch.Tensor = answer.logits[0].float()
        return logits[len(logits) - feed.wanted :]


def ends(model: Any) -> frozenset[int]:
    """Tokens that end a text."""
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])
