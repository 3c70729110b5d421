"""One pass of a Llama-type model over the rows of a step, and the cache that it reads and writes.

On a CPU the pass is compiled by TorchScript: the same operators in the same order, without the
interpreter between them, so that neither the step nor the process's other threads wait for Python's
lock. Where TorchScript, which PyTorch calls deprecated, is no longer there, the modules run as they
stand.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.engines.linear import Linear
from serving.engines.runner import Feed

BUCKET = 32
"""Attention covers the longest running text, rounded up to this many tokens."""
log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """A piece of a prompt within a step."""

    first: int
    """Of the step's rows."""
    length: int
    start: int
    """Tokens that its row of the cache holds before."""
    row: int


class Marks(NamedTuple):
    """What all layers of one step share."""

    where: Tensor
    """int64 [rows * 2 * kv heads]: where in the cache each key, then each value goes."""
    rotation: Tensor
    """complex64 [rows, 1, dim / 2]."""
    decoding: int
    """Rows at the front that read one token each, of the cache's rows of the same number."""
    mask: Tensor
    """fp32 [decoding * kv heads, 1, bucket]: 0 or minus infinity."""
    chunks: list[Chunk]
    masks: list[Tensor]
    """Of each chunk: fp32 [length * group, keys]."""


class Attention(nn.Module):
    """Of one layer, with its part of the cache.

    Args:
        cache: fp32 [2, rows, kv heads, length, dim]; keys, then values.
    """

    def __init__(self, cache: Tensor, heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, cache.shape[2], cache.shape[4]
        self.width = heads * self.dim
        # The positions of one head lie together, and all keys before all values: the heads of all
        # rows are one batch of products.
        self.places = cache.view(-1, self.dim)
        self.cache = cache
        self.keys, self.values = cache.flatten(1, 2).unbind()

    def forward(self, qkv: Tensor, marks: Marks) -> Tensor:
        """
        Args:
            qkv: [rows, (heads + 2 * kv heads) * dim], interleaved; turned in place.

        Returns:
            [rows, heads * dim].
        """
        rows = qkv.shape[0]
        pairs = qkv.view(rows, -1, self.dim // 2, 2)[:, : self.heads + self.kv_heads]
        torch.view_as_complex(pairs).mul_(marks.rotation)
        fresh = qkv[:, self.width :].reshape(-1, self.dim)
        self.places.index_copy_(0, marks.where, fresh)
        q = qkv[:, : self.width]
        if not marks.chunks:
            return self.one_each(q, marks.mask)
        parts: list[Tensor] = []
        if marks.decoding:
            parts.append(self.one_each(q[: marks.decoding], marks.mask))
        for number, chunk in enumerate(marks.chunks):
            mine = q[chunk.first : chunk.first + chunk.length]
            parts.append(self.several(mine, chunk, marks.masks[number]))
        return torch.cat(parts)

    def one_each(self, q: Tensor, mask: Tensor) -> Tensor:
        """One query a row; the heads that share keys stand where positions would.

        Three products in place of the fused kernel, which takes half as long again for so few
        queries (8 and 32 rows over 64 to 256 tokens on two AMD cores).
        """
        lanes, bucket = q.shape[0] * self.kv_heads, mask.shape[2]
        keys, values = self.keys[:lanes, :bucket], self.values[:lanes, :bucket]
        heads = q.reshape(lanes, -1, self.dim)
        weights = torch.softmax(torch.baddbmm(mask, heads, keys.transpose(1, 2)), -1)
        return torch.bmm(weights, values).view(q.shape[0], self.width)

    def several(self, q: Tensor, chunk: Chunk, mask: Tensor) -> Tensor:
        """Consecutive queries of one row."""
        row = self.cache[:, chunk.row, :, : chunk.start + chunk.length].unsqueeze(1)
        # [kv heads, count * group, dim]
        heads = q.view(chunk.length, self.kv_heads, -1, self.dim).transpose(0, 1).flatten(1, 2)
        out = functional.scaled_dot_product_attention(
            heads.unsqueeze(0), row[0], row[1], mask, scale=1.0
        )
        out = out.view(self.kv_heads, chunk.length, -1, self.dim).transpose(0, 1)
        return out.reshape(chunk.length, self.width)


class Block(nn.Module):
    """The norms before its two halves are folded into their products.

    Args:
        qkv: interleaved q, then k, then v.
        gated: see `Linear.gated`.
        floor: sqrt(hidden * epsilon).
    """

    def __init__(
        self,
        attention: Attention,
        qkv: Linear,
        out: Linear,
        gated: nn.Module,
        down: Linear,
        floor: Tensor,
    ) -> None:
        super().__init__()
        self.attention, self.qkv, self.out = attention, qkv, out
        self.gated, self.down, self.floor = gated, down, floor

    def forward(self, x: Tensor, marks: Marks) -> Tensor:
        x = self.out.plus(self.attention(self.qkv(_normed(x, self.floor)), marks), x)
        return self.down.plus(self.gated(_normed(x, self.floor)), x)


def _normed(x: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + hidden * epsilon): RMS norm up to the factor that folding moved away."""
    return x / torch.hypot(torch.ops.aten.linalg_vector_norm(x, 2, [-1], True), floor)


class Pass(nn.Module):
    """
    Args:
        embedding: fp32 [vocabulary, hidden].
        rotation: complex64 [length, dim / 2]: position p turns pair i by p * frequency i.
        floor: see `Block`.
    """

    def __init__(
        self,
        embedding: Tensor,
        blocks: Sequence[Block],
        head: Linear,
        rotation: Tensor,
        floor: Tensor,
    ) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = embedding, nn.ModuleList(blocks), head
        self.rotation, self.floor = rotation, floor
        attention = blocks[0].attention
        _, rows, self.kv_heads, self.length, _ = attention.cache.shape
        self.group = attention.heads // self.kv_heads
        lanes = torch.arange(self.kv_heads, device=embedding.device) * self.length
        self.lanes = torch.cat([lanes, lanes + rows * self.kv_heads * self.length])
        # Row k of this view hides the last k keys.
        hidden = torch.zeros(2 * self.length, device=embedding.device)
        hidden[self.length :] = -math.inf
        self.masks = hidden.as_strided((self.length + 1, self.length), (1, 1))

    def forward(
        self, fed: Tensor, decoding: int, bucket: int, chunks: list[Chunk], wanted: Tensor | None
    ) -> Tensor:
        """
        Args:
            fed: int64 [3, rows]: token, position, and the place of position and row in a lane.
            decoding: rows at the front that read one token each.
            bucket: places that their attention covers.
            wanted: int64: rows whose logits are asked for; None for all.
        """
        x = functional.embedding(fed[0], self.embedding)
        marks = self.marks(fed, decoding, bucket, chunks)
        for block in self.blocks:
            x = block(x, marks)
        if wanted is not None:
            x = x[wanted]
        if not x.shape[0]:
            return x.new_empty((0, self.embedding.shape[0]))
        return self.head(_normed(x, self.floor))

    def marks(self, fed: Tensor, decoding: int, bucket: int, chunks: list[Chunk]) -> Marks:
        unseen = self.length - 1 - fed[1]
        # Every head of a row sees the same.
        mask = self.masks[unseen[:decoding].repeat_interleave(self.kv_heads), :bucket].unsqueeze(1)
        masks: list[Tensor] = []
        for chunk in chunks:
            mine = unseen[chunk.first : chunk.first + chunk.length].repeat_interleave(self.group)
            masks.append(self.masks[mine, : chunk.start + chunk.length])
        where = (fed[2].unsqueeze(1) + self.lanes).flatten()
        rotation = self.rotation[fed[1]].unsqueeze(1)
        return Marks(where, rotation, decoding, mask, chunks, masks)


class LlamaStep:
    """
    Args:
        cache: fp32 [layers, 2, rows, kv heads, length, dim], which the blocks of `whole` share.
    """

    def __init__(self, whole: Pass, cache: Tensor) -> None:
        self.cache = cache
        self._row = cache.shape[3] * cache.shape[4]
        self._length = cache.shape[4]
        self._pass = whole if cache.is_cuda else scripted(whole)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.cache[:, :, target, :, :tokens] = self.cache[:, :, source, :, :tokens]

    def __call__(self, decode: Sequence[Feed], prompts: Sequence[Feed]) -> Tensor:
        """See `runner.Runner.forward`."""
        feeds = [*decode, *prompts]
        positions = [p for f in feeds for p in range(f.start, f.start + len(f.tokens))]
        places = [f.row * self._row + f.start + n for f in feeds for n in range(len(f.tokens))]
        tokens = [token for f in feeds for token in f.tokens]
        longest = max((f.start + 1 for f in decode), default=0)
        bucket = min(-(-longest // BUCKET) * BUCKET, self._length)
        with torch.inference_mode():
            fed = torch.tensor([tokens, positions, places], device=self.cache.device)
            wanted = self._wanted(feeds) if prompts else None
            logits: Tensor = self._pass(fed, len(decode), bucket, _chunks(decode, prompts), wanted)
            return logits

    def _wanted(self, feeds: Sequence[Feed]) -> Tensor:
        rows: list[int] = []
        at = 0
        for feed in feeds:
            at += len(feed.tokens)
            rows += range(at - feed.wanted, at)
        return torch.tensor(rows, dtype=torch.long, device=self.cache.device)


def _chunks(decode: Sequence[Feed], prompts: Sequence[Feed]) -> list[Chunk]:
    chunks, at = [], len(decode)
    for feed in prompts:
        chunks.append(Chunk(at, len(feed.tokens), feed.start, feed.row))
        at += len(feed.tokens)
    return chunks


def scripted(module: nn.Module) -> Any:
    """The module as TorchScript, or itself where that does not take it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(module)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.warning("the pass is not compiled, and slower for small models: %s", error)
        return module
