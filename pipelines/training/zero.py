"""Our config to DeepSpeed's dictionary. Pure."""

from typing import Any, Literal

from cluster.config import TrainSection
from cluster.hardware import cpu_computes_bf16

Precision = Literal["fp32", "autocast", "bf16"]


def precision(train: TrainSection, device: Literal["cpu", "cuda"]) -> Precision:
    """What `train.precision: auto` means on a device."""
    if train.precision != "auto":
        return train.precision
    if device == "cuda" and train.zero_stage > 0:
        return "bf16"
    if device == "cuda":
        return "autocast"
    return "autocast" if cpu_computes_bf16() else "fp32"


def micro_batch(train: TrainSection, workers: int) -> int:
    """Rows that one worker runs at once."""
    return train.micro_batch or train.global_batch // workers


def deepspeed_config(train: TrainSection, *, workers: int, precision: Precision) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize` (https://www.deepspeed.ai/docs/config-json).

    The learning rate is not in it: the loop sets it from `schedule` before each step.
    """
    micro = micro_batch(train, workers)
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        # Small parameters stay whole on every rank, as DeepSpeed does by default; the gather at
        # save time is ours (fp32, from the shards), so its own 16-bit gather stays off.
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.global_batch // (micro * workers),
        "gradient_clipping": train.gradient_clip,
        "zero_optimization": zero,
        # A client optimizer with offload would otherwise demand DeepSpeed's compiled one.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "torch_autocast": {"enabled": precision == "autocast", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
