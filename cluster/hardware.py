"""What the machines can do, and what they cost: data with sources.

Memory: what `nvidia-smi` reports as the total of a device. Bandwidth and peak: NVIDIA's pages and
data sheets; the peak is of dense bf16 tensor FLOP/s, half of what is advertised "with sparsity":
https://www.nvidia.com/en-us/data-center/dgx-b200/ (a system of eight B200), and below
https://www.nvidia.com/en-us/data-center/ the pages h200/, h100/, a100/, a40/, l40s/, l40/, l4/,
v100/, tesla-t4/, products/a10-gpu/. AWS alone has the A10G:
https://aws.amazon.com/ec2/instance-types/g5/.

Prices, in USD per hour, Linux, on demand, list prices of the second half of 2025:
https://aws.amazon.com/ec2/pricing/on-demand/ (us-east-1) and
https://cloud.google.com/compute/vm-instance-pricing (us-central1). Spot nodes and contracts cost
less, by how much changes with the hour and the customer: `heliostat plan --price` takes yours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Accelerator:
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second between the device and its memory."""
    peak_flops: float
    """FLOP/s that training with 16 bits can reach at most."""


@dataclass(frozen=True)
class Instance:
    """A cloud's machine."""

    device: str
    devices: int
    host_memory: int
    """Bytes."""
    price: float
    """USD per hour."""


ACCELERATORS: Mapping[str, Accelerator] = {
    "B200": Accelerator(183_359 * MIB, 8.0e12, 2250e12),
    "H200": Accelerator(143_771 * MIB, 4.8e12, 989e12),
    "H100": Accelerator(81_559 * MIB, 3.35e12, 989e12),  # SXM
    "H100 NVL": Accelerator(95_830 * MIB, 3.9e12, 835e12),
    "H100 PCIe": Accelerator(81_559 * MIB, 2.0e12, 756e12),
    "A100": Accelerator(40_960 * MIB, 1.555e12, 312e12),  # SXM and PCIe
    "A100-80GB": Accelerator(81_920 * MIB, 2.039e12, 312e12),
    "A40": Accelerator(46_068 * MIB, 0.696e12, 149.7e12),
    "A10": Accelerator(23_028 * MIB, 0.6e12, 125e12),
    "A10G": Accelerator(23_028 * MIB, 0.6e12, 70e12),
    "L40S": Accelerator(46_068 * MIB, 0.864e12, 362e12),
    "L40": Accelerator(46_068 * MIB, 0.864e12, 181e12),
    "L4": Accelerator(23_034 * MIB, 0.3e12, 121e12),
    # No bf16: fp16 tensor FLOP/s, which is what these train with.
    "V100": Accelerator(16_384 * MIB, 0.9e12, 125e12),  # SXM
    "T4": Accelerator(15_360 * MIB, 0.3e12, 65e12),
}

INSTANCES: Mapping[str, Instance] = {
    "p6-b200.48xlarge": Instance("B200", 8, 2048 << 30, 113.93),
    "p5en.48xlarge": Instance("H200", 8, 2048 << 30, 63.30),
    "p5.48xlarge": Instance("H100", 8, 2048 << 30, 55.04),
    "p4de.24xlarge": Instance("A100-80GB", 8, 1152 << 30, 27.45),
    "p4d.24xlarge": Instance("A100", 8, 1152 << 30, 21.96),
    "g6e.48xlarge": Instance("L40S", 8, 1536 << 30, 30.13),
    "g6e.12xlarge": Instance("L40S", 4, 384 << 30, 10.49),
    "g6e.xlarge": Instance("L40S", 1, 32 << 30, 1.861),
    "g6.48xlarge": Instance("L4", 8, 768 << 30, 13.35),
    "g6.12xlarge": Instance("L4", 4, 192 << 30, 4.60),
    "g6.xlarge": Instance("L4", 1, 16 << 30, 0.805),
    "g5.48xlarge": Instance("A10G", 8, 768 << 30, 16.29),
    "g5.12xlarge": Instance("A10G", 4, 192 << 30, 5.67),
    "g5.xlarge": Instance("A10G", 1, 16 << 30, 1.006),
    "g4dn.12xlarge": Instance("T4", 4, 192 << 30, 3.91),
    "g4dn.xlarge": Instance("T4", 1, 16 << 30, 0.526),
    "p3.2xlarge": Instance("V100", 1, 61 << 30, 3.06),
    # Google bills CPUs, memory and devices one by one: 48 x 0.02499 + 192 x 0.00293 + 4 x 0.56.
    "g2-standard-48": Instance("L4", 4, 192 << 30, 4.00),
}


def instance(node_config: Mapping[str, object]) -> Instance | None:
    """Of a node type of a launcher's file, as AWS or Google is asked for it; None where the table
    does not know it, those without accelerators among them."""
    return INSTANCES.get(str(node_config.get("InstanceType") or node_config.get("machineType")))


@cache
def cpu_computes_bf16() -> bool:
    """Whether this CPU has bf16 arithmetic (AVX512-BF16 or AMX); without it autocast is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def accelerator(device: str) -> Accelerator | None:
    """By the name that the driver, Ray (`accelerator_type:H100`) or a person gives it.

    None where the table does not know it, CPUs among them: their peak follows from clock and vector
    units, which differ by model and load.
    """
    for name in sorted(ACCELERATORS, key=len, reverse=True):
        if re.search(rf"\b{re.escape(name)}\b", device, re.IGNORECASE):
            # Drivers tell the two A100 apart by their gigabytes only.
            if name == "A100" and re.search(r"80 ?G", device, re.IGNORECASE):
                return ACCELERATORS["A100-80GB"]
            return ACCELERATORS[name]
    return None


def peak_flops(device: str) -> float | None:
    """Peak of an accelerator in dense 16-bit FLOP/s, or None: see `accelerator`."""
    known = accelerator(device)
    return known.peak_flops if known else None


def price_per_device(device: str) -> float | None:
    """USD per hour of one device in the cheapest of the known instances that have it."""
    known = accelerator(device)
    prices = [
        instance.price / instance.devices
        for instance in INSTANCES.values()
        if ACCELERATORS[instance.device] is known
    ]
    return min(prices, default=None)
