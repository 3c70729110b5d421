"""Matrix products with fixed weights: several ways to hold them, one of which fits the machine.

Generation reads every weight for every token, so the layout of the weights decides its speed. The
operators that take prepacked weights are private to PyTorch: they are probed when a model is
loaded, and what does not run there, or is no faster, is not used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "int8"]
PROBED_ROWS = (1, 8, 32)
"""Batch sizes at which the ways are timed."""
SAME = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}
"""Largest error of a product that counts as rounding, relative to the largest result."""


class Linear(Protocol):
    """y = x W^T + b for x [rows, in], with what follows it in the same pass where that is free."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, out]."""
        ...

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """y + other, fp32."""
        ...


class Plain:
    """PyTorch's own product, in the weight's precision; on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import torch.nn.functional

        self._product = torch.nn.functional.linear
        self._silu = torch.nn.functional.silu
        self._weight, self._bias = weight, bias

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x.to(self._weight.dtype), self._weight, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._raw(x).float()

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other + self._raw(x)

    def gated(self, x: torch.Tensor, up: Plain) -> torch.Tensor:
        return self._silu(self._raw(x)).mul_(up._raw(x))


class Packed:
    """oneDNN's product with weights in its blocked layout, fp32 or bf16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import torch

        self._dtype = weight.dtype
        self._exact = weight.dtype == torch.float32
        # 1.9 to 3.1x of the plain product at 8 rows in fp32, measured on AMD.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._combined = torch.ops.mkldnn._linear_pointwise.binary

    def _raw(self, x: torch.Tensor, after: str = "none") -> torch.Tensor:
        return self._product(x.to(self._dtype), self._weight, self._bias, after, [], "")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._raw(x).float()

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if self._exact:
            return self._combined(x, other, self._weight, self._bias, "add")
        return other + self._raw(x)

    def gated(self, x: torch.Tensor, up: Packed) -> torch.Tensor:
        x = x.to(self._dtype)
        return up._combined(x, self._raw(x, "swish"), up._weight, up._bias, "mul")


class Both(Packed):
    """fp32 twice: packed for several rows, and transposed for one.

    For one row a product takes as long as its weights take to be read, and MKL reads a transposed
    matrix as fast as memory gives it. Costs the weights' memory again.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import torch

        super().__init__(weight, bias)
        self._transposed = weight.t().contiguous()
        self._mm, self._addmm, self._silu = torch.mm, torch.addmm, torch.nn.functional.silu

    def _one(self, x: torch.Tensor) -> torch.Tensor:
        if self._bias is None:
            return self._mm(x, self._transposed)
        return self._addmm(self._bias, x, self._transposed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._one(x) if x.shape[0] == 1 else super().__call__(x)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:
            return super().plus(x, other)
        if self._bias is not None:
            other = other + self._bias
        return self._addmm(other, x, self._transposed)

    def gated(self, x: torch.Tensor, up: Both) -> torch.Tensor:  # type: ignore[override]
        if x.shape[0] > 1:
            return super().gated(x, up)
        return self._silu(self._one(x), inplace=True).mul_(up._one(x))


class Int8:
    """8-bit weights with a scale per output, 8-bit inputs with a scale per row.

    The operator that PyTorch offers for this takes one scale for the whole batch, so that a row's
    result would depend on its neighbours. Here every row is brought to its own scale before; the
    integer product is exact, and a request's tokens depend on nothing but the request.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import torch

        scales = (weight.abs().amax(1).clamp_(min=1e-12) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the type is to go in a later release
            held = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._weight = torch.ops.quantized.linear_prepack(held, None)
        self._bias = bias
        self._product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._silu = torch.nn.functional.silu
        self._addcmul = torch.addcmul
        self._step, self._middle = 1 / 127, 127

    def _scaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x with values from -1 to 1, and each row's largest absolute value."""
        largest = x.abs().amax(-1, True).clamp_(min=1e-12)  # `vector_norm` takes five times as long
        return x / largest, largest

    def _raw(self, x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._product(x, self._step, self._middle, self._weight)
        y = y.mul_(largest)
        return y if self._bias is None else y.add_(self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._raw(*self._scaled(x))

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        x, largest = self._scaled(x)
        y = self._addcmul(other, self._product(x, self._step, self._middle, self._weight), largest)
        return y if self._bias is None else y.add_(self._bias)

    def gated(self, x: torch.Tensor, up: Int8) -> torch.Tensor:
        scaled = self._scaled(x)
        return self._silu(self._raw(*scaled), inplace=True).mul_(up._raw(*scaled))


Kind = type[Plain] | type[Packed] | type[Both] | type[Int8]


def converted(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    return weight.bfloat16() if precision == "bf16" else weight.float()


def seconds(linear: Callable[[torch.Tensor], torch.Tensor], inputs: int) -> list[float]:
    """Of one product at each of the probed batch sizes, the best of a few."""
    import torch

    found = []
    for rows in PROBED_ROWS:
        x = torch.ones(rows, inputs)
        linear(x)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            linear(x)
            times.append(time.perf_counter() - began)
        found.append(min(times))
    return found
