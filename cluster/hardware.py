"""What the machines can do."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path


@cache
def cpu_computes_bf16() -> bool:
    """Whether this CPU has bf16 arithmetic (AVX512-BF16 or AMX); without it autocast is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


PEAK_FLOPS: Mapping[str, float] = {
    # Dense bf16 tensor FLOP/s, half of what is advertised "with sparsity". NVIDIA's data sheets.
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,  # SXM
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,  # SXM and PCIe
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    # No bf16: fp16 tensor FLOP/s, which is what these train with.
    "V100": 125e12,  # SXM
    "T4": 65e12,
}


def peak_flops(device: str) -> float | None:
    """Peak of an accelerator in dense 16-bit FLOP/s by the name that its driver gives it.

    None where the table does not know it, CPUs among them: their peak follows from clock and vector
    units, which differ by model and load.
    """
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device):
            return PEAK_FLOPS[name]
    return None
