"""The fast path's weights: stock Llama-type models, folded and prepacked.

What could be done once is done when the model is loaded: norm weights and the attention's scale are
folded into the matrices, q and k are reordered so that the rotation is one complex product in
place, and the products that share an input are one matrix. Against `generate`, logits differ by
rounding (4e-6 where their spread is 0.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serving.engines.linear import Int8, Kind, Linear, Parameters, converted, joined
from serving.engines.llama_step import Attention, Block, LlamaStep, Pass
from serving.engines.runner import Precision

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2"})
"""Model types whose blocks are RMS norm, rotary attention without norms of its own, gated SiLU."""
ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations whose frequencies do not depend on the length of the text."""


def fits(config: Any) -> bool:
    """Whether this path computes exactly what the model's own code does.

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
    intermediate: int
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
            intermediate=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            vocabulary=config.vocab_size,
        )

    @property
    def token_floats(self) -> int:
        """Numbers that the cache holds for one token."""
        return self.layers * 2 * self.kv_heads * self.dim


@dataclass(frozen=True)
class _Folding:
    """How weights of a Hugging Face model become those of the step."""

    shape: Shape
    kind: Kind
    precision: Precision

    def linear(self, norm: Tensor | None, *parts: Parameters) -> Linear:
        """One product for parts that share an input."""
        weight, bias = self._parameters(norm, *parts)
        return self.kind(weight, bias)

    def gated(self, norm: Tensor, gate: Parameters, up: Parameters) -> nn.Module:
        return self.kind.gated(self._parameters(norm, gate), self._parameters(norm, up))

    def _parameters(self, norm: Tensor | None, *parts: Parameters) -> Parameters:
        weight, bias = joined(*parts)
        weight = weight.float()
        if norm is not None:
            # The step divides by the length of the vector, not by its root mean square.
            weight = weight * (norm.float() * math.sqrt(self.shape.hidden))
        if bias is not None:
            bias = bias.float() if self.kind is Int8 else converted(bias, self.precision)
        return converted(weight, self.precision).contiguous(), bias

    def block(self, block: Any, cache: Tensor) -> Block:
        attention, mlp = block.self_attn, block.mlp
        q, k, v = (_pair(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        scale = self.shape.dim**-0.5
        q = self._interleaved(q[0] * scale), self._interleaved(_times(q[1], scale))
        k = self._interleaved(k[0]), self._interleaved(k[1])
        norm = block.post_attention_layernorm.weight
        return Block(
            Attention(cache, self.shape.heads),
            qkv=self.linear(block.input_layernorm.weight, q, k, v),
            out=self.linear(None, _pair(attention.o_proj)),
            gated=self.gated(norm, _pair(mlp.gate_proj), _pair(mlp.up_proj)),
            down=self.linear(None, _pair(mlp.down_proj)),
            floor=self.floor(cache),
        )

    def floor(self, like: Tensor) -> Tensor:
        return like.new_tensor([math.sqrt(self.shape.hidden * self.shape.epsilon)])

    def _interleaved(self, rows: Any) -> Any:
        """Stock models turn element i of a head with element i + dim / 2: put each pair side by
        side. The product of q and k does not change when both are reordered alike."""
        if rows is None:
            return None
        halves = rows.unflatten(0, (-1, 2, self.shape.dim // 2))
        return halves.transpose(1, 2).flatten(0, 2)


def fold(model: Any, kind: Kind, precision: Precision, *, rows: int, length: int) -> LlamaStep:
    """
    Args:
        model: of Hugging Face; its weights are copied.
        rows: of the cache.
        length: tokens that a row holds.
    """
    shape = Shape.of(model.config)
    folding, inner = _Folding(shape, kind, precision), model.model
    # Zeros, because a masked place still takes part in the sum, with weight 0. Untouched pages of
    # them take no memory.
    size = (shape.layers, 2, rows, shape.kv_heads, length, shape.dim)
    cache = torch.zeros(size, device=model.device)
    with torch.inference_mode():
        embedding = inner.embed_tokens.weight.float().clone()
        whole = Pass(
            embedding,
            [folding.block(*pair) for pair in zip(inner.layers, cache.unbind(), strict=True)],
            head=folding.linear(inner.norm.weight, _pair(model.lm_head)),
            rotation=_rotation(inner.rotary_emb, length),
            floor=folding.floor(cache),
        )
        return LlamaStep(whole.eval(), cache)


def _pair(module: Any) -> Parameters:
    return module.weight, module.bias


def _times(bias: Tensor | None, factor: float) -> Tensor | None:
    return None if bias is None else bias * factor


def _rotation(rotary: Any, length: int) -> Tensor:
    frequencies = rotary.inv_freq.float()
    angles = torch.arange(length, device=frequencies.device).float().outer(frequencies)
    return torch.polar(torch.full_like(angles, float(rotary.attention_scaling)), angles)
