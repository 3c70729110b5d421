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
"""Take 40 ms in all at a width of 384, 1.5 s at 2,048."""
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


class Both(Linear):
    """fp32 twice: packed for several rows, and transposed for one.

    For one row a product takes as long as its weights take to be read, and MKL reads a transposed
    matrix as fast as memory gives it. Costs the weights' memory again.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.packed, self.single = Packed(weight, bias), _OneRow(weight, bias)

    @classmethod
    def gated(cls, gate: Parameters, up: Parameters) -> nn.Module:
        return _BothGate(Packed(*gate), Packed(*up), _OneRow(*joined(gate, up)))

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x) if x.shape[0] > 1 else self.single(x)

    @torch.jit.export
    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return self.packed.plus(x, other)
        return self.single(x).add_(other)


class _OneRow(nn.Module):
    """The product of one row, in as many pieces as there are threads when it is made.

    MKL leaves such a product of one matrix to one thread, and of a batch gives one matrix to each.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        threads = torch.get_num_threads()
        self.pieces = threads if len(weight) % threads == 0 else 1
        # [pieces, in, out / pieces]
        pieces = weight.view(self.pieces, -1, weight.shape[1])
        self.weight = pieces.transpose(1, 2).contiguous()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(self.pieces, 1, x.shape[1]), self.weight).view(1, -1)
        return y if self.bias is None else y.add_(self.bias)


class _BothGate(nn.Module):
    def __init__(self, gate: Packed, up: Packed, single: _OneRow) -> None:
        super().__init__()
        self.packed, self.single = _PackedGate(gate, up), single

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return self.packed(x)
        gate, up = self.single(x).chunk(2, 1)
        return functional.silu(gate).mul_(up)


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


def seconds(linears: Sequence[Callable[[Tensor], Tensor]], inputs: int) -> list[list[float]]:
    """Of one product, by way and probed batch size: the best of some, taken in turns."""
    best = [[math.inf] * len(PROBED_ROWS) for _ in linears]
    for column, rows in enumerate(PROBED_ROWS):
        x = torch.ones(rows, inputs)
        for _ in range(TRIALS):
            for linear, times in zip(linears, best, strict=True):
                began = time.perf_counter()
                linear(x)
                times[column] = min(times[column], time.perf_counter() - began)
    return best


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
