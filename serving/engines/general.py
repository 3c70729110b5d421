"""Any Hugging Face causal language model, through its own code.

A prompt is read in one pass of its own; running texts get their next tokens in one pass together
where the model can do that (see `together`), and in a pass each where it cannot. Which of the two
is tried out when the model is loaded, so that what the fast path cannot hold runs here with the
same results.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engines.parity import TOLERANCE
from serving.engines.runner import Feed, Precision
from serving.engines.together import Text, Together, joinable, mask
from serving.engines.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

TRIED = (3, 7)
"""Tokens of the two texts with which decoding together is tried out."""
log = logging.getLogger(__name__)


class GeneralRunner:
    """See `runner.Runner`.

    Args:
        model: a causal language model of Hugging Face, in evaluation mode.
        length: most tokens of prompt and answer together.
        constant: a pass for each text, so that its tokens depend on nothing but itself.
    """

    spare = 0
    chunk: int | None = None

    def __init__(
        self, model: Any, folder: Path, *, slots: int, length: int, constant: bool = False
    ) -> None:
        tokenizer = Tokenizer(folder)
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.piece, self.pieces = tokenizer.piece, tokenizer.pieces
        self._model = model
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._texts: list[Text] = [Text(None)] * slots
        self._together = Together(model.config)
        self.slots, self.context_length = slots, length
        self.vocabulary, self.end = int(model.config.vocab_size), ends(model)
        self.precision: Precision = "fp32" if str(model.dtype) == "torch.float32" else "bf16"
        self.constant = constant or not self._agrees()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """A row only ever moves as a whole: there are no prefixes here."""
        self._texts[target], self._texts[source] = self._texts[source], Text(None)

    def forward(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            if not decode:
                self._together.leave()
            if self.constant or not decode:
                parts = [self._one(feed) for feed in decode]
            else:
                parts = [self._all(decode)]
            return torch.cat([*parts, *map(self._one, prompts)])

    def _one(self, feed: Feed) -> torch.Tensor:
        """Logits after one text's tokens, [wanted, vocabulary]."""
        from transformers import DynamicCache

        if feed.start == 0:
            self._texts[feed.row] = Text(DynamicCache(config=self._model.config))
        kept = {"logits_to_keep": max(feed.wanted, 1)} if "logits_to_keep" in self._takes else {}
        logits = self._pass([feed.tokens], self._texts[feed.row].cache, **kept)[0]
        return logits[len(logits) - feed.wanted :]

    def _all(self, decode: Sequence[Feed]) -> torch.Tensor:
        """Logits after the next token of each text, [texts, vocabulary]."""
        import torch

        lengths = [feed.start for feed in decode]
        cache = self._together.cache([self._texts[feed.row] for feed in decode], lengths)
        given = {"attention_mask": mask(lengths, self._model.device)}
        if "position_ids" in self._takes:
            given["position_ids"] = torch.tensor(lengths, device=self._model.device).unsqueeze(1)
        return self._pass([feed.tokens for feed in decode], cache, **given)[:, -1]

    def _pass(self, tokens: Sequence[Sequence[int]], cache: Any, **given: Any) -> torch.Tensor:
        import torch

        answer = self._model(
            input_ids=torch.tensor([list(row) for row in tokens], device=self._model.device),
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        logits: torch.Tensor = answer.logits.float()
        return logits

    def _agrees(self) -> bool:
        """Whether two texts of different lengths get the logits together that they get alone."""
        if self.slots < 2 or self.context_length < max(TRIED) + 2:
            return False
        if "attention_mask" not in self._takes:
            return False
        try:
            alone, together = self._tried(alone=True), self._tried(alone=False)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            log.info("texts cannot be decoded together: %s", error)
            return False
        finally:
            self._texts = [Text(None)] * self.slots
            self._together.leave()
        if together is None or alone is None:
            return False
        bound = TOLERANCE[self.precision] * float(alone.std())
        return float((alone - together).abs().max()) <= bound

    def _tried(self, *, alone: bool) -> torch.Tensor | None:
        """Logits of two steps of two texts; None where their caches must stay apart."""
        import torch

        found = []
        with torch.inference_mode():
            for row, length in enumerate(TRIED):
                tokens = [(5 * n + row) % self.vocabulary for n in range(length)]
                self._one(Feed(row, 0, tokens, 1))
            if not all(joinable(self._texts[row].cache) for row in range(len(TRIED))):
                return None
            for step in range(2):
                feeds = [
                    Feed(row, length + step, ((row + step) % self.vocabulary,), 1)
                    for row, length in enumerate(TRIED)
                ]
                found.append(
                    torch.cat([self._one(f) for f in feeds]) if alone else self._all(feeds)
                )
        return torch.cat(found)


def ends(model: Any) -> frozenset[int]:
    """Tokens that end a text."""
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])
