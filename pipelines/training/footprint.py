"""What a training step of a model holds in memory, found out without the memory: the step runs on
tensors that have shapes and no content (torch's fake tensors), and every storage that is made or
given back is counted. It works for any family and takes seconds, whatever the size of the model.
The tensors claim to be on a CPU, which every build of torch knows; GPUs hold the same sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.config import RunConfig
from cluster.planner import Footprint
from pipelines.families.base import Facts, Family
from pipelines.training.zero import Precision


def trace(
    config: RunConfig, family: Family, facts: Facts, rows: int, precision: Precision
) -> Footprint:
    """Of one forward and backward pass over a micro-batch of `rows` rows."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with _weights_in(precision):
            model: Any = family.build_model(config, facts)
        if config.train.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        batch = family.blank(config, facts, rows)
        # Views of parameters pass by as results too.
        known = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        ledger = _Ledger(facts.get("vocab_size"), known)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"), ledger:
            loss = family.loss(model, batch)
        with ledger:
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        activations, logits = ledger.peak({_key(gradient) for gradient in gradients})
    return Footprint(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        predictions=family.count(family.blank(config, facts, 1)) * rows,
        rows=rows,
        activations=activations,
        logits=logits,
        operations=ledger.operations,
    )


@contextmanager
def _weights_in(precision: Precision) -> Iterator[None]:
    """New tensors in the type that the weights have; fake ones cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype({"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down when each storage appears and goes."""

    def __init__(self, vocabulary: int | None, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary, self._known = vocabulary, known
        self.operations = 0
        """Seen so far."""
        self._events: list[tuple[int, int]] = []
        """(number of the storage, +1 or -1)."""
        self._sizes: list[int] = []
        self._logits: set[int] = set()
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return made

    def _note(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._live or key in self._known:
            return
        number = self._live[key] = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._events.append((number, 1))
        if self._vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            self._logits.add(number)
        weakref.finalize(storage, self._gone, key, number)

    def _gone(self, key: int, number: int) -> None:
        if self._live.get(key) == number:
            del self._live[key]
        self._events.append((number, -1))

    def peak(self, gradients: set[int]) -> tuple[int, int]:
        """Bytes at the time at which most was held: of logits, and of everything else.

        Args:
            gradients: keys of the storages that ended as gradients of parameters: not counted.
        """
        kept = {self._live[key] for key in gradients if key in self._live}
        activations = logits = 0
        most = (0, 0)
        for number, sign in list(self._events):
            size = sign * self._sizes[number]
            if number in self._logits:
                logits += size
            elif number not in kept:
                activations += size
            most = max(most, (activations, logits), key=sum)
        return most


def _key(tensor: torch.Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    key: int = storage._cdata
    return key
