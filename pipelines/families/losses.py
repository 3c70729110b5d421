"""Cross entropy of a large vocabulary, a few positions at a time.

The logits of a batch are `positions x vocabulary`: for 16 thousand positions and a vocabulary of
128 thousand 8 GB in fp32, and their gradient as much again. Here they exist for one chunk of
positions, which gives its part of the gradients at once and is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that all of PyTorch's users know)

from pipelines.families.base import IGNORED


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Scalar, fp32: nats summed over the positions that have a label.

    Args:
        logits: [..., vocabulary].
        labels: int64 [...].
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


class LossHead(torch.nn.Linear):
    """The output layer of a language model, which gives the loss in place of logits on request.

    A layer of the model, not a function beside it, so that what wraps modules holds for it too:
    autocast, and ZeRO-3, which gathers the weight once for all chunks.
    """

    def __init__(self, linear: torch.nn.Linear, chunk: int) -> None:
        """
        Args:
            linear: the layer that this one takes the place of; the weight stays the same tensor.
            chunk: positions whose logits exist at once.
        """
        # On `meta` it costs nothing to be given a weight that is replaced at once.
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.chunk = chunk
        self._labels: torch.Tensor | None = None

    @contextmanager
    def predicting(self, labels: torch.Tensor) -> Iterator[None]:
        """Within: `forward` gives what `cross_entropy(logits, labels)` would."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._labels is None:
            return super().forward(hidden)
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.weight.dtype
        loss: torch.Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, -2), self.weight, self._labels.flatten(), self.chunk, dtype
        )
        return loss


class _Chunked(torch.autograd.Function):
    """Gradients are made in forward, while a chunk's logits are there, and scaled in backward.

    Nothing is computed twice, unlike with a checkpoint per chunk; the gradient of the weight, which
    a backward pass ends with anyway, exists from the end of forward on. The arithmetic is that of
    the whole: products in `dtype`, softmax in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        chunk: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            into_hidden = torch.empty_like(hidden) if wanted else None
            into_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            for begin in range(0, len(hidden), chunk):
                part = slice(begin, begin + chunk)
                piece = hidden[part].to(dtype)
                loss, slope = _loss_and_slope(F.linear(piece, cast), labels[part], wanted=wanted)
                total += loss
                if into_hidden is not None and into_weight is not None:
                    slope = slope.to(dtype)
                    into_hidden[part] = slope @ cast
                    _add_product(into_weight, slope.T, piece)
        if into_weight is not None:
            ctx.save_for_backward(into_hidden, into_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        into_hidden, into_weight = ctx.saved_tensors
        return into_hidden * outer[0], (into_weight * outer[0]).to(ctx.weight_dtype), *[None] * 3


def _loss_and_slope(
    logits: torch.Tensor, labels: torch.Tensor, *, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk, and where wanted its derivative by the logits: softmax - one-hot."""
    log_probabilities = logits.float().log_softmax(-1)
    loss = F.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum")
    if not wanted:
        return loss, loss
    slope = log_probabilities.exp_()
    real = labels != IGNORED
    slope[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= 1.0
    slope *= real.unsqueeze(-1)
    return loss, slope


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, summed in fp32 over chunks whatever the factors are."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
