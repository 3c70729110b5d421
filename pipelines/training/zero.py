"""Our config to DeepSpeed's dictionary. Pure."""

import os
import shutil
from typing import Any, Literal

from cluster.config import TrainSection
from cluster.errors import ConfigError
from cluster.hardware import cpu_computes_bf16

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "autocast", "bf16", "fp16"]


def precision(train: TrainSection, device: Device) -> Precision:
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


def check(train: TrainSection, device: Device, *, workers: int) -> None:
    """Refuse what this device or this number of workers cannot do, before any worker starts.

    Raises:
        ConfigError: naming the setting, and what to take in its place.
    """
    group = train.zero_plus_plus.partition_size
    if workers % group:
        raise ConfigError(
            f"train.workers {workers} does not divide by train.zero_plus_plus.partition_size "
            f"{group}: take the number of workers on one node"
        )
    if device == "cuda":
        return
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(train, key) == "nvme":
            raise ConfigError(
                f"train.{key} nvme needs GPUs and the cluster has none: take cpu or none"
            )
    if train.zero_plus_plus.on:
        raise ConfigError(
            "train.zero_plus_plus needs GPUs (CUDA kernels, NCCL) and the cluster has none: leave "
            "it out"
        )
    if train.precision == "fp16":
        raise ConfigError(
            "train.precision fp16 needs GPUs and the cluster has none: take autocast, bf16 or fp32"
        )
    if train.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise ConfigError(
            "train.compile needs a C++ compiler where there is no GPU, and there is no g++: "
            "install one, or take compile false"
        )


def deepspeed_config(
    train: TrainSection, *, workers: int, precision: Precision, device: Device
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize` (https://www.deepspeed.ai/docs/config-json).

    The learning rate is not in it: the loop sets it from `schedule` before each step.
    """
    micro = micro_batch(train, workers)
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.global_batch // (micro * workers),
        "gradient_clipping": train.gradient_clip,
        "zero_optimization": _zero_optimization(train, device),
        # A client optimizer with offload would otherwise demand DeepSpeed's compiled one.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "torch_autocast": {"enabled": precision == "autocast", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _zero_optimization(train: TrainSection, device: Device) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload_optimizer != "none":
        zero["offload_optimizer"] = _offload(train.offload_optimizer, train.nvme_path, device)
    if train.zero_stage < 3:
        return zero
    # Small parameters stay whole on every rank, as DeepSpeed does by default; the gather at
    # save time is ours (fp32, from the shards), so its own 16-bit gather stays off.
    zero["stage3_gather_16bit_weights_on_model_save"] = False
    if train.offload_parameters != "none":
        zero["offload_param"] = _offload(train.offload_parameters, train.nvme_path, device)
    plus = train.zero_plus_plus
    if plus.on:
        zero["zero_hpz_partition_size"] = plus.partition_size
        zero["zero_quantized_weights"] = plus.quantized_weights
        zero["zero_quantized_gradients"] = plus.quantized_gradients
    return zero


def _offload(place: str, nvme_path: str, device: Device) -> dict[str, Any]:
    # Pinned memory serves copies to a GPU; without one, DeepSpeed would compile an op to pin it.
    where: dict[str, Any] = {"device": place, "pin_memory": device == "cuda"}
    return where | {"nvme_path": nvme_path} if place == "nvme" else where
