"""The fast path: stock Llama-type weights, prepacked, over a static cache of slots.

One step is one pass over the rows of all running requests and of the prompts that are being read.
What could be done once is done when the model is loaded: norm weights and the attention's scale are
folded into the matrices, q and k are reordered so that the rotation is one complex product in
place, and the products that share an input are one matrix. Against `generate`, logits differ by
rounding (4e-6 where their spread is 0.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.engines.linear import Int8, Kind, Linear, Precision, converted
from serving.engines.runner import Feed

if TYPE_CHECKING:
    import torch

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2"})
"""Model types whose blocks are RMS norm, rotary attention without norms of its own, gated SiLU."""
ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations whose frequencies do not depend on the length of the text."""
BUCKET = 32
"""Attention covers the longest running text, rounded up to this many tokens."""


def fits(config: Any) -> bool:
    """Whether this module computes exactly what the model's own code does.

    Args:
        config: of Hugging Face.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    windowed = (
        config.use_sliding_window
        if config.model_type == "qwen2"
        else getattr(config, "sliding_window", None)
    )
    return (
        config.model_type in ARCHITECTURES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not windowed
    )


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    epsilon: float
    vocabulary: int

    @staticmethod
    def of(config: Any) -> Shape:
        heads = config.num_attention_heads
        return Shape(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden=config.hidden_size,
            epsilon=config.rms_norm_eps,
            vocabulary=config.vocab_size,
        )

    @property
    def token_floats(self) -> int:
        """Numbers that the cache holds for one token."""
        return self.layers * 2 * self.kv_heads * self.dim


@dataclass(frozen=True)
class Layer:
    """One block; the norms before its two halves are folded in."""

    qkv: Linear
    """Interleaved q, then k, then v."""
    out: Linear
    gated: Callable[[torch.Tensor], torch.Tensor]
    down: Linear


@dataclass(frozen=True)
class Weights:
    embedding: torch.Tensor
    """fp32 [vocabulary, hidden]."""
    layers: tuple[Layer, ...]
    head: Linear
    rotation: torch.Tensor
    """complex64 [context, dim / 2]: position p turns pair i by p * frequency i."""


def fold(model: Any, context: int, kind: Kind, precision: Precision) -> Weights:
    """Weights of a Hugging Face model as the step wants them."""
    import torch

    shape = Shape.of(model.config)
    # The step divides by the length of the vector, not by its root mean square.
    root = math.sqrt(shape.hidden)

    def made(norm: torch.Tensor | None, *parts: tuple[torch.Tensor, torch.Tensor | None]) -> Any:
        weight = torch.cat([part.float() for part, _ in parts])
        if norm is not None:
            weight = weight * (norm.float() * root)
        biases = [
            torch.zeros(len(part), device=part.device) if bias is None else bias.float()
            for part, bias in parts
        ]
        plain = all(bias is None for _, bias in parts)
        bias = None if plain else torch.cat(biases)
        if bias is not None and kind is not Int8:
            bias = converted(bias, precision)
        return kind(converted(weight, precision).contiguous(), bias)

    def layer(block: Any) -> Layer:
        attention, mlp, before = block.self_attn, block.mlp, block.post_attention_layernorm.weight
        q, k, v = (_pair(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        scale = shape.dim**-0.5
        q = _interleaved(q[0] * scale, shape), _interleaved(_times(q[1], scale), shape)
        k = _interleaved(k[0], shape), _interleaved(k[1], shape)
        gate, up = made(before, _pair(mlp.gate_proj)), made(before, _pair(mlp.up_proj))
        return Layer(
            made(block.input_layernorm.weight, q, k, v),
            made(None, _pair(attention.o_proj)),
            lambda x: gate.gated(x, up),
            made(None, _pair(mlp.down_proj)),
        )

    with torch.inference_mode():
        inner = model.model
        return Weights(
            embedding=inner.embed_tokens.weight.float().clone(),
            layers=tuple(layer(block) for block in inner.layers),
            head=made(inner.norm.weight, _pair(model.lm_head)),
            rotation=_rotation(inner.rotary_emb, context),
        )


def _pair(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.weight, module.bias


def _times(bias: torch.Tensor | None, factor: float) -> torch.Tensor | None:
    return None if bias is None else bias * factor


def _interleaved(rows: Any, shape: Shape) -> Any:
    """Stock models turn element i of a head with element i + dim / 2: put each pair side by side.

    The product of q and k does not change when both are reordered alike.
    """
    if rows is None:
        return None
    halves = rows.unflatten(0, (-1, 2, shape.dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _rotation(rotary: Any, context: int) -> torch.Tensor:
    import torch

    frequencies = rotary.inv_freq.float()
    angles = torch.arange(context, device=frequencies.device).float().outer(frequencies)
    return torch.polar(torch.full_like(angles, float(rotary.attention_scaling)), angles)


@dataclass(frozen=True)
class _Chunk:
    """A piece of a prompt within a step."""

    rows: slice
    """Of the step's rows."""
    keys: int
    """Tokens in its row of the cache once it is written."""
    row: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What all layers of one step share."""

    tokens: torch.Tensor
    """int64 [rows]."""
    where: torch.Tensor
    """int64 [rows * 2 * kv heads]: where in the cache each key, then each value goes."""
    rotation: torch.Tensor
    """complex64 [rows, 1, dim / 2]."""
    decoding: int
    mask: torch.Tensor | None
    """fp32 [decoding * kv heads, 1, bucket]: 0 or minus infinity."""
    chunks: tuple[_Chunk, ...]
    wanted: torch.Tensor | None
    """int64: rows whose logits are asked for; None for all."""


class LlamaStep:
    """
    Args:
        rows: of the cache.
        length: tokens that a row holds.
    """

    def __init__(self, shape: Shape, weights: Weights, rows: int, length: int) -> None:
        import torch
        from torch.nn.functional import embedding, scaled_dot_product_attention

        self._shape, self._weights, self._length = shape, weights, length
        self._device = weights.embedding.device
        # Zeros, because a masked place still takes part in the sum, with weight 0. Untouched pages
        # of them take no memory.
        self.cache = torch.zeros(
            (shape.layers, 2, rows, shape.kv_heads, length, shape.dim), device=self._device
        )
        # The positions of one head lie together, and all keys before all values: the heads of all
        # rows are one batch of products.
        self._places = [layer.view(-1, shape.dim) for layer in self.cache]
        self._row = shape.kv_heads * length
        lanes = torch.arange(shape.kv_heads, device=self._device) * length
        self._lanes = torch.cat([lanes, lanes + rows * self._row])
        # Row k of this view hides the last k keys.
        hidden = torch.zeros(2 * length, device=self._device)
        hidden[length:] = -math.inf
        self._masks = hidden.as_strided((length + 1, length), (1, 1))
        self._floor = torch.tensor([math.sqrt(shape.hidden * shape.epsilon)], device=self._device)
        self._norm, self._hypot = torch.linalg.vector_norm, torch.hypot
        self._embedding, self._attention = embedding, scaled_dot_product_attention
        self._weighed, self._softmax, self._product = torch.baddbmm, torch.softmax, torch.bmm
        self._complex = torch.view_as_complex
        self._views: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.cache[:, :, target, :, :tokens] = self.cache[:, :, source, :, :tokens]

    def __call__(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> torch.Tensor:
        """See `runner.Runner.forward`."""
        import torch

        with torch.inference_mode():
            plan = self._plan(decode, prompts)
            x = self._embedding(plan.tokens, self._weights.embedding)
            bucket = 0 if plan.mask is None else plan.mask.shape[-1]
            views = self._decoded(plan.decoding, bucket)
            for number, layer in enumerate(self._weights.layers):
                x = self._layer(x, layer, plan, number, views)
            rows = x if plan.wanted is None else x[plan.wanted]
            if not len(rows):
                return x.new_empty((0, self._shape.vocabulary))
            return self._weights.head(self._normed(rows))

    def _layer(
        self,
        x: torch.Tensor,
        layer: Layer,
        plan: _Plan,
        number: int,
        views: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        shape = self._shape
        qkv = layer.qkv(self._normed(x))
        turned = shape.heads + shape.kv_heads
        pairs = qkv.view(qkv.shape[0], -1, shape.dim // 2, 2)[:, :turned]
        self._complex(pairs).mul_(plan.rotation)
        fresh = qkv[:, shape.heads * shape.dim :].reshape(-1, shape.dim)
        self._places[number].index_copy_(0, plan.where, fresh)
        q = qkv[:, : shape.heads * shape.dim]
        seen = self._attend(q, plan, number, views)
        x = layer.out.plus(seen, x)
        return layer.down.plus(layer.gated(self._normed(x)), x)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(|x|^2 + hidden * epsilon): RMS norm up to the factor that `fold` moved away."""
        return x / self._hypot(self._norm(x, 2, -1, True), self._floor)

    def _attend(
        self,
        q: torch.Tensor,
        plan: _Plan,
        number: int,
        views: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """[rows, heads * dim] -> the same."""
        import torch

        parts = []
        if plan.mask is not None:
            keys, values = views[number]
            parts.append(self._one_each(q[: plan.decoding], keys, values, plan.mask))
        parts += [self._several(q[c.rows], self.cache[number, :, c.row], c) for c in plan.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one_each(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """One query a row; the heads that share keys stand where positions would.

        Three products in place of the fused kernel, which takes half as long again for so few
        queries (8 and 32 rows over 64 to 256 tokens on two AMD cores).
        """
        rows = q.shape[0]
        q = q.reshape(rows * self._shape.kv_heads, -1, self._shape.dim)
        weights = self._softmax(self._weighed(mask, q, keys), -1)
        return self._product(weights, values).view(rows, -1)

    def _several(self, q: torch.Tensor, row: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """Consecutive queries of one row; [count, heads * dim]."""
        shape, count = self._shape, len(q)
        keys, values = row[:, :, : chunk.keys].unsqueeze(1)
        # [kv heads, count * group, dim]
        q = q.view(count, shape.kv_heads, -1, shape.dim).transpose(0, 1).flatten(1, 2)
        out = self._attention(
            q.unsqueeze(0), keys, values, chunk.mask, is_causal=chunk.mask is None, scale=1.0
        )
        return out.view(shape.kv_heads, count, -1, shape.dim).transpose(0, 1).reshape(count, -1)

    def _decoded(self, rows: int, bucket: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By layer: keys of the rows that decode, [rows * kv heads, dim, bucket], and their values,
        [rows * kv heads, bucket, dim]."""
        key = rows, bucket
        if key not in self._views:
            parts = self.cache[:, :, :rows].flatten(2, 3)[..., :bucket, :]
            keys, values = parts[:, 0].transpose(-1, -2), parts[:, 1]
            self._views[key] = list(zip(keys.unbind(), values.unbind(), strict=True))
        return self._views[key]

    def _plan(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> _Plan:
        import torch

        feeds = [*decode, *prompts]
        positions = [p for f in feeds for p in range(f.start, f.start + len(f.tokens))]
        places = [f.row * self._row + f.start + n for f in feeds for n in range(len(f.tokens))]
        tokens = [token for f in feeds for token in f.tokens]
        packed = torch.tensor([tokens, positions, places], device=self._device)
        mask = None
        if decode:
            longest = max(f.start for f in decode) + 1
            bucket = min(-(-longest // BUCKET) * BUCKET, self._length)
            unseen = self._length - 1 - packed[1, : len(decode)]
            # Every head of a row sees the same.
            unseen = unseen.repeat_interleave(self._shape.kv_heads)
            mask = self._masks[unseen, :bucket].unsqueeze(1)
        return _Plan(
            tokens=packed[0],
            where=(packed[2].unsqueeze(1) + self._lanes).flatten(),
            rotation=self._weights.rotation[packed[1]].unsqueeze(1),
            decoding=len(decode),
            mask=mask,
            chunks=tuple(self._chunks(len(decode), prompts)),
            wanted=self._wanted(feeds) if prompts else None,
        )

    def _chunks(self, at: int, prompts: Sequence[Feed]) -> list[_Chunk]:
        import torch

        chunks = []
        group = self._shape.heads // self._shape.kv_heads
        for feed in prompts:
            count, keys = len(feed.tokens), feed.start + len(feed.tokens)
            mask = None
            if feed.start or group > 1:
                first = self._length - 1 - feed.start
                unseen = torch.arange(first, first - count, -1, device=self._device)
                mask = self._masks[unseen.repeat_interleave(group), :keys]
            chunks.append(_Chunk(slice(at, at + count), keys, feed.row, mask))
            at += count
        return chunks

    def _wanted(self, feeds: Sequence[Feed]) -> torch.Tensor:
        import torch

        rows: list[int] = []
        at = 0
        for feed in feeds:
            at += len(feed.tokens)
            rows += range(at - feed.wanted, at)
        return torch.tensor(rows, dtype=torch.long, device=self._device)
