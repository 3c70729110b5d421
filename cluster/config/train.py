"""`train`: how the model learns."""

from typing import Annotated, Literal

from pydantic import Field

from cluster.config.base import OPERATIONAL, Fraction, Positive, Section


class TrainSection(Section):
    steps: Positive = 600
    """Optimizer steps of the whole run."""
    global_batch: Positive = 32
    """Rows per optimizer step, over all workers."""
    micro_batch: Annotated[int, OPERATIONAL, Field(ge=0)] = 0
    """Rows that one worker runs at once; 0 takes its whole share of the global batch."""
    workers: Annotated[int, OPERATIONAL, Field(ge=1, le=100_000)] = 2
    """Training processes; each owns one GPU, or one CPU where the cluster has none."""
    threads_per_worker: Annotated[int, OPERATIONAL, Field(ge=1, le=1024)] = 1
    """CPU threads of each worker, reserved from the cluster."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Peak of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps of linear rise from zero to the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from the peak to `final_learning_rate` times it."""
    final_learning_rate: Fraction = 0.1
    """Share of the peak that remains at the last step."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW: decay per step of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW: decay per step of the mean squared gradient."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW: added to the root of the mean squared gradient."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Applied to matrices only; vectors (norms, biases) are exempt."""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    precision: Literal["auto", "fp32", "autocast", "bf16"] = "auto"
    """`autocast`: fp32 weights, bf16 arithmetic. `bf16`: bf16 weights with an fp32 master copy.
    `auto`: bf16 on GPUs, autocast on CPUs that compute bf16 in hardware, else fp32. ZeRO stage 0
    keeps no fp32 master copy, so there `auto` is autocast and `bf16` is refused."""
    shuffle_window: Positive = 16
    """Row groups whose rows are shuffled together; a reader holds this many."""
    checkpoint_every: Annotated[Positive, OPERATIONAL] = 200
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[Positive, OPERATIONAL] = 2
    """Newest checkpoints of a run that are kept."""
    max_failures: Annotated[int, OPERATIONAL, Field(ge=0, le=10_000)] = 3
    """Times that lost workers are replaced before the run is given up."""
