"""Matrix products with fixed weights: several ways to hold them, one of which fits the machine.

Generation reads every weight for every token, so the layout of the weights decides its speed. The
operators that take prepacked weights are private to PyTorch: they are probed when a model is
loaded, and what does not run there, or is no faster, is not used.

All of this is written in what TorchScript understands: see `llama_step`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.engines.runner import Precision

PROBED_ROWS = (1, 8, 32)
"""Batch sizes at which the ways are timed."""
TRIALS = 10
BUDGET = 0.3
"""Seconds for each of them, after which three trials are enough."""
SAME = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}
"""Largest error of a product that counts as rounding, relative to the largest result."""
Parameters = tuple[Tensor, Tensor | None]
"""Weight [out, in], and bias [out]."""


class Linear(nn.Module):
    """y = x W^T + b for x [rows, in]; fp32 [rows, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        """A module that computes silu(gate(x)) * up(x)."""
        raise NotImplementedError

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other, in the same pass where that is free."""
        raise NotImplementedError


Kind = type[Linear]
"""A way to hold weights."""


class Plain(Linear):
    """PyTorch's own product, in the weight's precision; on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.weight = weight

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        return _PlainGate(cls(*gate), cls(*up))

    def raw(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.raw(x).float()

    @torch.jit.export
    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return other + self.raw(x)


class _PlainGate(nn.Module):
    def __init__(self, gate: Plain, up: Plain) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.gate.raw(x)).mul_(self.up.raw(x))


class Packed(Linear):
    """oneDNN's product with weights in its blocked layout, fp32 or bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.exact, self.dtype = weight.dtype == torch.float32, weight.dtype
        # 1.9 to 3.1x of the plain product at 8 rows in fp32, measured on AMD.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        return _PackedGate(cls(*gate), cls(*up))

    def raw(self, x: Tensor, after: str) -> Tensor:
        """
        Args:
            after: what follows in the same pass: none, swish.
        """
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, after, [], ""
        )

    def with_other(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """
        Args:
            other: of the weights' precision.
            how: it is joined in the same pass: add, mul.
        """
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), other, self.weight, self.bias, how
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.raw(x, "none").float()

    @torch.jit.export
    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        if self.exact:
            return self.with_other(x, other, "add")
        return other + self.raw(x, "none")


class _PackedGate(nn.Module):
    def __init__(self, gate: Packed, up: Packed) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    def forward(self, x: Tensor) -> Tensor:
        return self.up.with_other(x, self.gate.raw(x, "swish"), "mul")


class Pieces(Linear):
    """fp32 in transposed pieces of some outputs each, which one batched product multiplies.

    MKL leaves a small product of one matrix to one thread, and of a batch gives some to each. Costs
    no more memory than the weights; on Intel as fast as any other way from one row to hundreds.
    """

    WIDEST = 128
    """Outputs of a piece; 32 to 512 differ by a tenth."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.outputs = weight.shape[0]
        self.split = _Split([(weight, bias)], self.WIDEST)

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        return _PiecesGate(_Split([gate, up], cls.WIDEST), len(gate[0]))

    def forward(self, x: Tensor) -> Tensor:
        return _beside(self.split(x), self.outputs)

    @torch.jit.export
    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return other + self.forward(x)


class _PiecesGate(nn.Module):
    def __init__(self, split: _Split, outputs: int) -> None:
        super().__init__()
        self.split, self.outputs = split, outputs

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.split(x).chunk(2)
        return _beside(functional.silu(gate).mul_(up), self.outputs)


class _Split(nn.Module):
    """Products of one input, each in the same number of pieces."""

    def __init__(self, parts: Sequence[Parameters], widest: int) -> None:
        super().__init__()
        outputs = len(parts[0][0])
        count, width = _cut(outputs, widest)

        def cut_up(rows: Tensor) -> Tensor:
            """[parts * outputs, in] -> [pieces, in, width]; what is missing at an end is 0."""
            apart = rows.view(len(parts), outputs, -1)
            padded = functional.pad(apart, (0, 0, 0, count * width - outputs))
            return padded.view(len(parts) * count, width, -1).transpose(1, 2).contiguous()

        weight, bias = joined(*parts)
        self.weight = cut_up(weight)
        self.bias = None if bias is None else cut_up(bias.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] -> [pieces, rows, width]."""
        each = x.expand(self.weight.shape[0], x.shape[0], x.shape[1])
        if self.bias is None:
            return torch.bmm(each, self.weight)
        return torch.baddbmm(self.bias, each, self.weight)


def _cut(outputs: int, widest: int) -> tuple[int, int]:
    """How many pieces, as many for each thread, and how wide: a multiple of 8, as vectors are."""
    threads = torch.get_num_threads()
    fewest = math.ceil(outputs / widest / threads) * threads
    for count in range(fewest, 2 * fewest, threads):
        if outputs % (8 * count) == 0:
            return count, outputs // count
    return fewest, math.ceil(outputs / fewest / 8) * 8


def _beside(pieces: Tensor, outputs: int) -> Tensor:
    """[count, rows, width] -> [rows, outputs]."""
    return pieces.transpose(0, 1).reshape(pieces.shape[1], -1)[:, :outputs]


class Both(Linear):
    """fp32 twice: packed for several rows, and a piece for each thread for one.

    For one row a product takes as long as its weights take to be read, and MKL reads a transposed
    matrix as fast as memory gives it. Costs the weights' memory again.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.packed, self.single = Packed(weight, bias), _OneRow(weight, bias)

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        return _BothGate(Packed.gated(gate, up), _OneRow.gated(gate, up))

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x) if x.shape[0] > 1 else self.single(x)

    @torch.jit.export
    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self.packed.plus(x, other) if x.shape[0] > 1 else self.single.plus(x, other)


class _OneRow(Pieces):
    WIDEST = 1 << 30


class _BothGate(nn.Module):
    def __init__(self, packed: nn.Module, single: nn.Module) -> None:
        super().__init__()
        self.packed, self.single = packed, single

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x) if x.shape[0] > 1 else self.single(x)


class Int8(Linear):
    """8-bit weights with a scale per output, 8-bit inputs with a scale per row.

    The operator that PyTorch offers for this takes one scale for the whole batch, so that a row's
    result would depend on its neighbours. Here every row is brought to its own scale before; the
    integer product is exact, and a request's tokens depend on nothing but the request.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        scales = (weight.abs().amax(1).clamp_(min=1e-12) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the type is to go in a later release
            held = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(held, None)

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        return _Int8Gate(cls(*joined(gate, up)), len(gate[0]))

    def product(self, x: Tensor) -> Tensor:
        """For x with values from -1 to 1; without the bias."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, 1 / 127, 127, self.weight
        )

    def forward(self, x: Tensor) -> Tensor:
        largest = _largest(x)
        y = self.product(x / largest).mul_(largest)
        return y if self.bias is None else y.add_(self.bias)

    @torch.jit.export
    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        largest = _largest(x)
        y = torch.addcmul(other, self.product(x / largest), largest)
        return y if self.bias is None else y.add_(self.bias)


class _Int8Gate(nn.Module):
    """One product for both: the scaling of its input and the start of a product count here."""

    def __init__(self, joined: Int8, width: int) -> None:
        super().__init__()
        self.joined, self.width = joined, width

    def forward(self, x: Tensor) -> Tensor:
        y = self.joined(x)
        return functional.silu(y[:, : self.width]).mul_(y[:, self.width :])


def joined(*parts: Parameters) -> Parameters:
    """One product for parts that share an input."""
    weight = torch.cat([weight for weight, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
    return weight, torch.cat(biases)


def _largest(x: Tensor) -> Tensor:
    """Each row's largest absolute value; `vector_norm` takes five times as long."""
    return x.abs().amax(-1, True).clamp_(min=1e-12)


def converted(weight: Tensor, precision: Precision) -> Tensor:
    return weight.bfloat16() if precision == "bf16" else weight.float()


def layer(kind: Kind, weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The products of one layer: a single one stays in the cache, where every way is fast.

    Args:
        weights: of queries, keys and values together, of the output, of gate, up and down.
    """
    first, second, gate, up, third = weights
    qkv, out = kind(first, None), kind(second, None)
    gated, down = kind.gated((gate, None), (up, None)), kind(third, None)

    def products(x: Tensor) -> Tensor:
        x = out.plus(qkv(x)[:, : second.shape[1]].contiguous(), x)
        return down.plus(gated(x), x)

    return products


def seconds(ways: Sequence[Callable[[Tensor], Tensor]], inputs: int) -> list[list[float]]:
    """Of one call, by way and probed batch size: the best of some, taken in turns."""
    best = [[math.inf] * len(PROBED_ROWS) for _ in ways]
    for column, rows in enumerate(PROBED_ROWS):
        x, ends = torch.ones(rows, inputs), time.perf_counter() + BUDGET
        for trial in range(TRIALS):
            if trial >= 3 and time.perf_counter() > ends:
                break
            for way, times in zip(ways, best, strict=True):
                began = time.perf_counter()
                way(x)
                times[column] = min(times[column], time.perf_counter() - began)
    return best


RELUCTANCE: dict[Kind, float] = {Packed: 1.0, Both: 1.03, Pieces: 1.1, Plain: 1.2}
"""What other processes do at this moment must not decide between equals. `Both` costs memory; one
layer flatters `Pieces`, which a whole model of 90 M parameters is no faster with."""


def cost(kind: Kind, times: Sequence[float]) -> float:
    """By which ways of one precision compare: one row counts as much as 32.

    Args:
        times: of `seconds`.
    """
    return RELUCTANCE[kind] * math.prod(times) ** (1 / len(times))


@contextmanager
def one_thread() -> Iterator[None]:
    """Where other processes take a core, two threads that wait for each other can be held up in
    each trial of a way, and the replica would keep the slower one for as long as it lives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
