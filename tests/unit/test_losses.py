"""The loss in chunks is the loss of the whole, with less memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.families.base import IGNORED
from pipelines.families.losses import LossHead, cross_entropy

POSITIONS, WIDTH, VOCABULARY = 37, 24, 501


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def problem(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    linear = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
    hidden = torch.randn(2, POSITIONS, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, POSITIONS))
    labels[1, -9:] = IGNORED
    return linear, hidden, labels


def in_chunks(chunk: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Loss and gradients; chunk 0 is the whole."""
    linear, hidden, labels = problem(dtype)
    if chunk:
        head = LossHead(linear, chunk)
        with head.predicting(labels):
            loss = head(hidden)
    else:
        loss = cross_entropy(linear(hidden), labels)
    (0.25 * loss).backward()
    assert hidden.grad is not None and linear.weight.grad is not None
    return loss.detach(), hidden.grad, linear.weight.grad


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("chunk", [1, 8, 37, 74, 1000])
def test_loss_and_gradients_are_those_of_the_whole(chunk: int) -> None:
    for ours, whole in zip(in_chunks(chunk), in_chunks(0), strict=True):
        assert relative(ours, whole) < 1e-6


def test_positions_without_a_label_have_no_gradient() -> None:
    _, gradient, _ = in_chunks(8)
    assert float(gradient[1, -9:].abs().max()) == 0.0
    assert float(gradient[1, :-9].abs().min(dim=-1).values.max()) > 0


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_the_precision_is_that_of_the_whole(precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        ours, whole = in_chunks(8, dtype), in_chunks(0, dtype)
    assert [t.dtype for t in ours] == [t.dtype for t in whole]
    assert relative(ours[0], whole[0]) < 1e-6  # bf16 logits, fp32 softmax, in both
    assert all(relative(a, b) < 0.01 for a, b in zip(ours[1:], whole[1:], strict=True))


def test_the_logits_never_exist_whole() -> None:
    linear, hidden, labels = problem()
    with LargestMade() as whole:
        cross_entropy(linear(hidden), labels).backward()
    head = LossHead(linear, 8)
    with LargestMade() as chunked, head.predicting(labels):
        head(hidden).backward()
    assert whole.elements == 2 * POSITIONS * VOCABULARY
    assert chunked.elements == VOCABULARY * WIDTH  # the gradient of the weight


def test_evaluation_makes_no_gradients() -> None:
    linear, hidden, labels = problem()
    head = LossHead(linear, 8)
    with LargestMade() as made, torch.inference_mode(), head.predicting(labels):
        loss = head(hidden)
    assert made.elements <= linear.weight.numel()
    assert not loss.requires_grad and relative(loss, in_chunks(0)[0]) < 1e-6


def test_outside_of_training_it_is_the_layer_that_it_replaced() -> None:
    linear, hidden, labels = problem()
    head = LossHead(linear, 8)
    assert torch.equal(head(hidden), linear(hidden))
    with pytest.raises(RuntimeError, match="stop"), head.predicting(labels):
        raise RuntimeError("stop")
    assert torch.equal(head(hidden), linear(hidden))
    assert head.weight is linear.weight and list(head.state_dict()) == ["weight"]
