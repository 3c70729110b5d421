"""What a block of steps spends its time on, by torch's profiler."""

import re
import time
from collections.abc import Iterable
from typing import Any

# First match wins; names of CUDA kernels and of PyTorch's operators.
KINDS = {
    "communication": r"nccl|gloo|c10d|all_?reduce|reduce_?scatter|all_?gather|broadcast",
    "attention": r"flash|fmha|attention|attn",
    "matrices": r"gemm|cutlass|cublas|nvjet|xmma|::mm|addmm|bmm|linear|matmul",
    "optimizer": r"adam|multi_tensor|foreach",
    "loss": r"softmax|nll|cross_entropy",
    "copies": r"memcpy|memset|copy",
}
LONGEST = 12


class Profiler:
    """From its making to `finish`."""

    def __init__(self, device: str) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._device = device
        activities = [ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.__enter__()
        self._began = time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """`share` of the time by kind, and the `longest` single kernels or operators with theirs.

        On a GPU of the device's time, with `idle` for when no kernel ran; on a CPU of the seconds
        inside operators.
        """
        wall = time.perf_counter() - self._began
        self._profile.__exit__(None, None, None)
        spent = dict(self._by_name(self._profile.key_averages()))
        busy = sum(spent.values())
        whole = max(busy, wall if self._device == "cuda" else 0.0) or 1.0
        share: dict[str, float] = {"idle": 1 - busy / whole} if self._device == "cuda" else {}
        for name, seconds in spent.items():
            share[kind_of(name)] = share.get(kind_of(name), 0.0) + seconds / whole
        longest = sorted(spent, key=lambda name: -spent[name])[:LONGEST]
        return {
            "share": dict(sorted(share.items(), key=lambda pair: -pair[1])),
            "longest": {name: spent[name] / whole for name in longest},
        }

    def _by_name(self, events: Iterable[Any]) -> Iterable[tuple[str, float]]:
        from torch.autograd import DeviceType

        for event in events:
            if self._device != "cuda":
                yield event.key, event.self_cpu_time_total / 1e6
            elif event.device_type == DeviceType.CUDA:
                yield event.key, event.self_device_time_total / 1e6


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lowered)), "rest")
