"""One pass for several texts, through a Hugging Face model's own code.

The texts stand side by side in one cache, each ending in its last column; what lies before a
shorter one is masked, as `generate` does for a batch of prompts of different lengths. That is right
for every cache of keys and values alone. Caches that hold something else (windows, recurrent
states) stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Text:
    """What one row of the engine holds.

    Args:
        cache: its own, of Hugging Face; None while it stands beside others.
    """

    cache: Any


def joinable(cache: Any) -> bool:
    """Whether texts with caches like this one can stand side by side."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


class Together:
    """The texts that decode.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._texts: list[Text] = []
        self._lengths: list[int] = []
        self._cache: Any = None

    def leave(self) -> None:
        """Nobody decodes any more."""
        self._texts, self._lengths, self._cache = [], [], None

    def cache(self, texts: Sequence[Text], lengths: Sequence[int]) -> Any:
        """The cache of these texts, in this order, for a pass that adds a token to each.

        Args:
            lengths: tokens that each text holds.
        """
        if len(texts) != len(self._texts) or any(
            one is not other for one, other in zip(texts, self._texts, strict=True)
        ):
            self._gather(texts, lengths)
        self._lengths = [length + 1 for length in lengths]
        return self._cache

    def _gather(self, texts: Sequence[Text], lengths: Sequence[int]) -> None:
        """Copy everything once, because somebody came or went."""
        import torch
        from transformers import DynamicCache

        width, count = max(lengths), len(texts)
        gathered = DynamicCache(config=self._config)
        for number in range(len((texts[0].cache or self._cache).layers)):
            found = [self._held(text, number) for text in texts]
            keys, values = (
                torch.zeros((count, one.shape[0], width, one.shape[2]), dtype=one.dtype).to(
                    one.device
                )
                for one in found[0]
            )
            for row, (length, (own_keys, own_values)) in enumerate(
                zip(lengths, found, strict=True)
            ):
                keys[row, :, width - length :], values[row, :, width - length :] = (
                    own_keys,
                    own_values,
                )
            gathered.update(keys, values, number)
        self._cache, self._texts = gathered, list(texts)
        for text in texts:
            text.cache = None

    def _held(self, text: Text, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a text in one layer, [heads, length, dim]."""
        if text.cache is not None:
            layer = text.cache.layers[number]
            return layer.keys[0], layer.values[0]
        row = next(row for row, one in enumerate(self._texts) if one is text)
        layer, length = self._cache.layers[number], self._lengths[row]
        return layer.keys[row, :, -length:], layer.values[row, :, -length:]


def mask(lengths: Sequence[int], device: Any) -> torch.Tensor | None:
    """int64 [texts, longest + 1]: 1 where a text has tokens, the new one included; None where all
    are as long."""
    import torch

    if len(set(lengths)) == 1:
        return None
    columns = torch.arange(max(lengths) + 1, device=device)
    begins = max(lengths) - torch.tensor(lengths, device=device)
    return (columns >= begins.unsqueeze(1)).long()
