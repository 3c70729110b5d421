"""A published language model, opened with the runner that suits it and this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from cluster.errors import CapacityError, ServingError
from serving.engines import parity
from serving.engines.fast import FastRunner
from serving.engines.general import GeneralRunner
from serving.engines.generation import GenerationEngine
from serving.engines.linear import (
    SAME,
    Both,
    Int8,
    Kind,
    Packed,
    Pieces,
    Plain,
    converted,
    cost,
    layer,
    one_thread,
    seconds,
)
from serving.engines.llama import Shape, fits
from serving.engines.runner import Precision, Runner

Asked = Literal["auto", "fp32", "bf16", "int8"]
TWICE = 0.05
"""Share of the machine's memory that a second copy of the weights may take."""
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How a language model is served."""

    slots: int
    """Requests that run at once."""
    max_waiting: int = 0
    threads: int = 1
    context: int | None = None
    """Most tokens of prompt and answer; None for all that the model can."""
    prefixes: int = 4
    """Beginnings of prompts that are kept for those that begin alike."""
    precision: Asked = "auto"
    """auto is exact: fp32 on a CPU, the published precision on a GPU."""
    constant_shape: bool = False
    """Same seed, same text, whoever else is served: see `FastRunner`; keeps no prefixes."""
    stream_interval_ms: float = 20
    """See `Mailbox`."""
    fast: bool = True
    """Whether the fast path is taken where the model fits it."""


def open_generation(
    model: str,
    folder: Path,
    options: Options,
    *,
    context_length: int,
    records: Sequence[Mapping[str, Any]] = (),
) -> GenerationEngine:
    """The engine of a published folder, proved against what publishing recorded.

    Args:
        model: id of the artifact.
        context_length: that the model was made for.
        records: see `parity.check`.

    Raises:
        ServingError: if the model does not answer as it did when it was published.
    """
    runner = apart(
        options.threads, lambda: _proved(model, folder, options, context_length, records)
    )
    return GenerationEngine(
        model,
        runner,
        max_waiting=options.max_waiting,
        stream_interval=options.stream_interval_ms / 1000,
    )


def _proved(
    model: str,
    folder: Path,
    options: Options,
    context_length: int,
    records: Sequence[Mapping[str, Any]],
) -> Runner:
    runner = open_runner(folder, context_length, options)
    try:
        parity.check(model, runner, records)
    except ServingError:
        if options.precision in ("auto", "fp32") or runner.precision == "fp32":
            raise
        log.warning("%s of %s leaves the bounds: fp32 it is", runner.precision, model)
        runner = open_runner(folder, context_length, replace(options, precision="fp32"))
        parity.check(model, runner, records)
    if not records:
        log.warning("%s was published without prompts to replay: it is served unproved", model)
    return runner


def apart(threads: int, load: Callable[[], T]) -> T:
    """Load in a thread that ends, with as many threads as threads that begin later compute on.

    Each thread that computes has a pool of its own. With more threads in all pools than there are
    cores, libgomp lets those that wait sleep (`do_spin` in its config/linux/wait.h): with the pool
    of the one that loaded beside it, every step would wake its own again and again.
    """
    import torch

    with ThreadPoolExecutor(1, "loading", torch.set_num_threads, (threads,)) as once:
        return once.submit(load).result()


def open_runner(folder: Path, context_length: int, options: Options) -> Runner:
    """Load a published folder.

    Args:
        context_length: that the model was made for.

    Raises:
        CapacityError: if the cache does not fit into the machine's memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if options.precision not in get_args(Asked):
        raise ValueError(f"precision {options.precision}: give one of {', '.join(get_args(Asked))}")
    gpu = torch.cuda.is_available()
    dtype: Any = "auto" if gpu else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model = model.to("cuda" if gpu else "cpu").eval()
    length = min(context_length, options.context or context_length)
    if not options.fast or not fits(model.config):
        general = GeneralRunner(
            model, folder, slots=options.slots, length=length, constant=options.constant_shape
        )
        log.warning(
            "general path, a pass for %s: %d sequences x %d tokens at most",
            "each" if general.constant else "all", options.slots, length,
        )  # fmt: skip
        return general
    spare = 0 if options.constant_shape else options.prefixes
    _check_room(Shape.of(model.config), options.slots + spare, length, gpu)
    precision, kind = _held_as(model, options, gpu)
    runner = FastRunner(
        model,
        folder,
        slots=options.slots,
        length=length,
        spare=spare,
        kind=kind,
        precision=precision,
        constant=options.constant_shape,
    )
    log.warning(
        "fast path, %s (%s): cache of %d sequences and %d prefixes x %d tokens, %.2f GB at most",
        precision, kind.__name__, runner.slots, runner.spare, length, runner.cache_bytes / 1e9,
    )  # fmt: skip
    return runner


def _check_room(shape: Shape, rows: int, length: int, gpu: bool) -> None:
    """What never fits is refused; what is free at the moment says little before it is used."""
    import psutil
    import torch

    wanted = 4 * shape.token_floats * rows * length
    there = torch.cuda.mem_get_info()[1] if gpu else psutil.virtual_memory().total
    if wanted > there:
        raise CapacityError(
            f"a cache of {rows} sequences x {length} tokens takes {wanted / 1e9:.1f} GB and there "
            f"are {there / 1e9:.1f} GB: lower serve.max_concurrent, serve.engine.prefixes or "
            "serve.engine.context"
        )


def _held_as(model: Any, options: Options, gpu: bool) -> tuple[Precision, Kind]:
    import psutil
    import torch

    if gpu:
        wanted = options.precision if options.precision in ("fp32", "bf16") else None
        published: Precision = "fp32" if model.dtype == torch.float32 else "bf16"
        return wanted or published, Plain
    precision: Precision = "fp32" if options.precision == "auto" else options.precision
    shape = Shape.of(model.config)
    if options.constant_shape and precision == "fp32":
        # What is timed may differ from replica to replica, and so would their rounding.
        return "fp32", Packed if _checked(Packed, _weights(shape)[0], "fp32") else Plain
    twice = 4 * model.num_parameters() < TWICE * psutil.virtual_memory().total
    return choose_kind(shape, precision, twice=twice)


def choose_kind(shape: Shape, precision: Precision, *, twice: bool) -> tuple[Precision, Kind]:
    """What holds the weights on this machine: right first, then fast.

    A way counts only if a product of the model's comes out right; a lower precision only if
    it is faster than fp32 at one of the probed batch sizes or more.

    Args:
        twice: whether there is room for the weights in two layouts.
    """
    import torch

    weights = _weights(shape)
    candidates: list[tuple[Precision, Kind]] = [("fp32", Packed), ("fp32", Plain), ("fp32", Pieces)]
    candidates += [("fp32", Both)] if twice else []
    if precision != "fp32":
        candidates += [(precision, Int8)] if precision == "int8" else [("bf16", Packed)]
    with one_thread(), torch.inference_mode():
        right = [pair for pair in candidates if _checked(pair[1], weights[0], pair[0])]
        ways = [layer(kind, [converted(one, held) for one in weights]) for held, kind in right]
        times = dict(zip(right, seconds(ways, shape.hidden), strict=True))
    exact = min(
        (pair for pair in times if pair[0] == "fp32"), key=lambda pair: cost(pair[1], times[pair])
    )
    lower = [pair for pair in times if pair[0] != "fp32" and sum(times[pair]) < sum(times[exact])]
    if precision != "fp32" and not lower:
        log.warning("%s is not faster than fp32 on this machine: fp32 it is", precision)
    return lower[0] if lower else exact


def _weights(shape: Shape) -> list[Any]:
    """See `linear.layer`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    width = shape.heads * shape.dim
    sizes = [
        (width + 2 * shape.kv_heads * shape.dim, shape.hidden),
        (shape.hidden, width),
        *[(shape.intermediate, shape.hidden)] * 2,
        (shape.hidden, shape.intermediate),
    ]
    return [torch.randn(size, generator=generator) * size[1] ** -0.5 for size in sizes]


def _checked(kind: Kind, weight: Any, precision: Precision) -> bool:
    """Whether the operator is there and right."""
    import torch

    with torch.inference_mode():
        x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(1))
        # The largest sums that there can be: on a CPU without VNNI instructions, products of
        # 8 bits are added up in 16, which these leave.
        x[0], weight = 1.0, torch.cat([weight, weight.new_ones(1, weight.shape[1])])
        exact = torch.nn.functional.linear(x, weight)
        try:
            linear = kind(converted(weight, precision), None)
            apart = float((linear(x) - exact).abs().max() / exact.abs().max())
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            log.info("%s does not run here: %s", kind.__name__, error)
            return False
    return apart <= SAME[precision]
