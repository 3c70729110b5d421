"""Will it fit, how long will it take, what will it cost. Pure: decisions over sizes and a table.

Sizes are those of DeepSpeed's ZeRO (Rajbhandari et al., arXiv:1910.02054): with 16-bit weights a
parameter costs 2 bytes, its gradient 2, and 12 for the fp32 master copy and Adam's two moments;
with fp32 weights 4, 4 and, from stage 1, 12 again. Stage 1 divides the last of these by the number
of workers, stage 2 the gradients, stage 3 the weights.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.config import RunConfig, TrainSection
from cluster.errors import UsageError
from cluster.hardware import ACCELERATORS, accelerator, price_per_device

Precision = Literal["fp32", "autocast", "bf16", "fp16"]
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces, or gathers, at once (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Parameters that stage 3 keeps gathered at most (`stage3_max_live_parameters`)."""
ROOM = 0.92
"""Share of a device's memory that a plan may fill: the rest is for the CUDA context, NCCL and holes
between allocations."""


@dataclass(frozen=True)
class Footprint:
    """One worker's forward and backward pass over a micro-batch, before anything is sharded."""

    parameters: int
    """Elements."""
    buffers: int
    """Bytes."""
    predictions: int
    """In the micro-batch."""
    rows: int
    activations: int
    """Bytes held at the peak, without parameters and their gradients."""
    logits: int
    """Bytes of them, beside the activations, as wide as the vocabulary."""
    operations: int = 0
    """Of torch's, such as one addition of two tensors, in the pass forward and backward."""


@dataclass(frozen=True)
class Machines:
    """What the workers run on, one device each."""

    nodes: int
    devices_per_node: int
    device: str
    """Such as H100; `CPU` where there is none."""
    memory: int
    """Bytes of one device; on a CPU, a worker's share of its node's memory."""
    host_memory: int | None
    """Bytes beside each device on its node; None where it is not known."""
    peak_flops: float | None
    """Of one device."""
    price: float | None
    """USD per hour of one device."""
    price_is: str = "list price on demand"
    """What kind of price that is."""

    @property
    def gpu(self) -> bool:
        return self.device != "CPU"


@dataclass(frozen=True)
class Need:
    """Bytes that one device holds at the peak, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    """The model's own, and what DeepSpeed reduces and gathers in."""
    holes: int = 0
    """Between allocations: see `HOLES`."""
    host: int = 0
    """On the node beside the device: what is offloaded, and what a checkpoint is written from."""

    @property
    def device(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.buffers
            + self.holes
        )


HOLES = 2.0
"""Of the logits, what a C library's heap holds once more: they are its largest blocks, which find
no hole, so that it grows by them. Fitted, with one bucket more from stage 1 on, to models of 37 and
55 M parameters at stages 0 to 3: docs/planning.md has how near it comes."""


def need(
    train: TrainSection,
    footprint: Footprint,
    workers: int,
    precision: Precision,
    *,
    heap: bool = False,
) -> Need:
    """What one worker holds at the peak of a step.

    Beside the paper's states DeepSpeed holds, from stage 1 on, a bucket that gradients are reduced
    in, the worker's part of the result, and that part once more in fp32 for the optimizer; with
    other workers, a second bucket for what travels.

    Args:
        heap: whether memory comes from a C library's heap, as on a CPU.
    """
    stage, elements = train.zero_stage, footprint.parameters
    weight = 2 if precision in ("bf16", "fp16") else 4
    shard = -(-elements // workers)
    weights, gradients = weight * elements, weight * elements
    # A plain optimizer works on the weights themselves; DeepSpeed's keep an fp32 copy of theirs.
    optimizer = 8 * elements
    bucket = weight * min(BUCKET, elements)
    # Stage 3 gathers into flat buffers as well.
    buckets = bucket * ((stage > 0) + (workers > 1) * (2 if stage == 3 else 1))
    if stage:
        optimizer = 12 * shard
        gradients = (weight + 4) * shard + (weight * elements if stage == 1 else 0)
    if stage == 3:
        weights = weight * (shard + min(elements, LIVE))
    found = Need(
        weights,
        gradients,
        optimizer,
        footprint.activations,
        footprint.logits,
        footprint.buffers + buckets,
        round(HOLES * footprint.logits) + bucket * (stage > 0) if heap else 0,
    )
    return _offloaded(train, found, shard, weight)


def _offloaded(train: TrainSection, found: Need, shard: int, weight: int) -> Need:
    host = found.optimizer  # a checkpoint copies the worker's part of the state before it writes
    if train.offload_optimizer != "none":
        host += found.optimizer if train.offload_optimizer == "cpu" else 0
        found = replace(found, optimizer=0)
    if train.offload_parameters != "none":
        host += weight * shard if train.offload_parameters == "cpu" else 0
        found = replace(found, parameters=found.parameters - weight * shard)
    return replace(found, host=host)


@dataclass(frozen=True)
class Verdict:
    """How a recipe stands on some machines."""

    need: Need
    misfit: str
    """Why it does not fit; empty where it does."""
    cure: "Change | None"
    """Keys of `train` that make it fit, the cheapest found; empty where none are needed, None where
    nothing helps on these machines."""


TraceOf = Callable[[TrainSection], Footprint]


def judge(config: RunConfig, machines: Machines, trace: TraceOf, precision: Precision) -> Verdict:
    """Whether the training of a recipe fits, and the cheapest change that makes it.

    Args:
        trace: the footprint of a micro-batch; asked again only where a change alters it.
    """

    def wanted(train: TrainSection) -> Need:
        return need(train, trace(train), _fewest(train), precision, heap=not machines.gpu)

    found = wanted(config.train)
    reason = misfit(found, machines)
    if not reason:
        return Verdict(found, "", {})
    for change in changes(config, machines):
        if not misfit(wanted(config.train.model_copy(update=change)), machines):
            return Verdict(found, reason, change)
    return Verdict(found, reason, None)


def _fewest(train: TrainSection) -> int:
    """The fewest workers that the run may have: then each holds most."""
    return train.world_sizes[0]


def misfit(found: Need, machines: Machines) -> str:
    """Why it does not fit, or nothing."""
    if machines.gpu:
        room = round(ROOM * machines.memory)
        if found.device > room:
            return f"a device would hold {gib(found.device)} of {gib(room)} that it has room for"
        if machines.host_memory is not None and found.host > machines.host_memory:
            return (
                f"the host would hold {gib(found.host)} per device of {gib(machines.host_memory)}"
            )
        return ""
    both = found.device + found.host
    if both > ROOM * machines.memory:
        room = round(ROOM * machines.memory)
        return f"a worker would hold {gib(both)} of {gib(room)} that it has room for"
    return ""


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"


@dataclass(frozen=True)
class Cost:
    """Of a whole training run."""

    tokens_per_second: float
    """Predictions of all workers together; tokens for a language model."""
    days: float
    dollars: float | None


UTILISATION = 0.40
"""Share of the peak that training reaches on GPUs: published runs on Hopper in bf16 reach 39 to
50 % (torchtitan, Megatron-LM, llm-foundry, OLMo); the lower end, since small models reach less."""
CPU_UTILISATION = {True: 0.7, False: 0.25}
"""Of what a matrix product alone reaches on a CPU, in fp32 and in 16 bits: what is no matrix
product is no faster in the latter. Of models of 2 to 55 million parameters (docs/planning.md)."""
OPERATION_SECONDS = 8e-6
"""What an operation of torch takes beside its arithmetic, on a CPU; a GPU computes meanwhile."""
STEP_SECONDS = 0.005
"""What a step takes beside its passes, such as the optimizer's bookkeeping. Both are of a model of
31 thousand parameters on one core of a Xeon with AMX (docs/planning.md)."""
SLOWER: dict[str, float] = {
    # Seconds per second of the plain step. ZeRO-3: benchmarks/train_cpu.py. Checkpointing: one more
    # forward pass, a third of the arithmetic. Offload: Ren et al., arXiv:2101.06840, figure 8.
    "stage_1": 0.01,
    "stage_2": 0.02,
    "stage_3": 0.15,
    "loss_chunk": 0.01,
    "halved": 0.02,
    "activation_checkpointing": 0.33,
    "offload_optimizer": 0.5,
    "offload_parameters": 1.0,
}


def slowdown(train: TrainSection, halvings: int = 0) -> float:
    """Time of a step, as a multiple of what the same step takes with none of these."""
    extra = SLOWER[f"stage_{train.zero_stage}"] if train.zero_stage else 0.0
    extra += SLOWER["halved"] * halvings
    for key in ("loss_chunk", "activation_checkpointing"):
        extra += SLOWER[key] if getattr(train, key) else 0.0
    for key in ("offload_optimizer", "offload_parameters"):
        extra += SLOWER[key] if getattr(train, key) != "none" else 0.0
    return 1.0 + extra


def cost(
    train: TrainSection,
    machines: Machines,
    flops: float | None,
    footprint: Footprint,
    precision: Precision = "bf16",
) -> Cost | None:
    """Of all steps of a run; None where the model's arithmetic or the device's peak is not known.

    Args:
        flops: of forward and backward pass, per prediction.
    """
    if flops is None or machines.peak_flops is None:
        return None
    workers = train.world_sizes[-1]
    used = UTILISATION if machines.gpu else CPU_UTILISATION[precision == "fp32"]
    used /= slowdown(train)
    predictions = footprint.predictions / footprint.rows * train.global_batch
    step = predictions * flops / (workers * machines.peak_flops * used)
    if not machines.gpu:
        passes = train.global_batch / (workers * footprint.rows)
        step += STEP_SECONDS + passes * OPERATION_SECONDS * footprint.operations
    speed = predictions / step
    hours = train.steps * step / 3600
    dollars = None if machines.price is None else hours * workers * machines.price
    return Cost(speed, hours / 24, dollars)


Change = dict[str, Any]
"""Keys of `train` and their new values."""


def changes(config: RunConfig, machines: Machines) -> Iterator[Change]:
    """What might make a recipe fit, those first that slow a step down least."""
    train = config.train
    micro = train.micro_batch or train.global_batch // train.world_sizes[0]
    found: list[tuple[float, Change]] = []
    for stage in range(train.zero_stage, 4):
        for chunk in {train.loss_chunk, train.loss_chunk or 2048}:
            for halvings in range(_halvings(micro) + 1):
                for again in {train.activation_checkpointing, True}:
                    for optimizer, parameters in _offloads(train, stage, machines):
                        change: Change = {
                            "zero_stage": stage,
                            "loss_chunk": chunk,
                            "micro_batch": micro >> halvings if halvings else train.micro_batch,
                            "activation_checkpointing": again,
                            "offload_optimizer": optimizer,
                            "offload_parameters": parameters,
                            "compile": train.compile and stage < 3,
                        }
                        if config.family == "image_classifier" and (chunk or again):
                            continue
                        changed = train.model_copy(update=change)
                        new = {k: v for k, v in change.items() if v != getattr(train, k)}
                        found.append((slowdown(changed, halvings), new))
    yield from (change for _, change in sorted(found, key=lambda item: item[0]) if change)


def _halvings(rows: int) -> int:
    """How often a micro-batch divides by two."""
    return (rows & -rows).bit_length() - 1


def _offloads(train: TrainSection, stage: int, machines: Machines) -> list[tuple[str, str]]:
    """Where optimizer and parameters may lie; in a CPU's memory they lie already."""
    kept = (train.offload_optimizer, train.offload_parameters)
    if not machines.gpu or "nvme" in kept:
        return [kept]
    ways = [kept]
    if stage >= 1:
        ways.append(("cpu", kept[1]))
    if stage == 3:
        ways.append(("cpu", "cpu"))
    return list(dict.fromkeys(ways))


def machines(text: str) -> Machines:
    """From `4xH200:8`: four nodes of eight devices each.

    Raises:
        UsageError: if that cannot be read, or the device is not in the table.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([A-Za-z0-9 -]+?)(?::(\d+))?", text)
    nodes, device, per_node = match.groups() if match else (None, "", None)
    known = accelerator(device) if match else None
    count, each = int(nodes or 1), int(per_node or 1)
    if known is None or not count or not each:
        raise UsageError(
            f"--nodes {text!r} should be NODESxDEVICE:PER_NODE, such as 4xH200:8, with a device of "
            f"{', '.join(ACCELERATORS)}"
        )
    return Machines(
        count, each, device.upper(), known.memory, None, known.peak_flops, price_per_device(device)
    )
