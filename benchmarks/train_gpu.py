"""Training on GPUs: speed against a plain PyTorch loop, model FLOP/s utilisation, and what eats the
rest.

    python benchmarks/train_gpu.py [--recipes gpt-124m,gpt-1b] [--gpus N] [--pairs 7] [--steps 20]
    python benchmarks/train_gpu.py --smoke      # tiny, on a CPU: does it run

For each recipe, on the GPUs of one machine, each of ours in turns with the plain loop:

    plain         autocast, compiled, DDP between GPUs: the loop that one would write
    equal         ours in the same precision, ZeRO 0
    recommended   ours as the recipe has it (bf16 weights with an fp32 master copy)

Utilisation counts the FLOPs of the model's formula (`flops_per_prediction`), without what is
computed twice, over the dense bf16 peak of `cluster/hardware.py`. Goal: 0.50, then 0.55.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass

from sides import Side, make_corpus
from turns import Block, Ratio, machine, rounds, running, tokens_per_second

from cluster.config import TextData
from cluster.hardware import peak_flops
from pipelines import families

# Rows per GPU at once, such that the plain loop's whole logits fit beside everything else in 80 GB.
MICRO_BATCH = {"gpt-124m": 32, "gpt-1b": 4}
TINY = [
    "data.vocab_size=512",
    "data.sequence_length=32",
    "model.hidden_size=64",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "model.intermediate_size=96",
    "train.compile=false",
]
Figures = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    gpus: int
    pairs: int
    steps: int
    micro_batch: int
    smoke: bool

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"


def sides(recipe: str, root: str, asked: Asked) -> list[Side]:
    micro = 2 if asked.smoke else asked.micro_batch or MICRO_BATCH[recipe]
    common = [f"train.global_batch={micro * asked.gpus}", f"train.micro_batch={micro}"]
    common += TINY if asked.smoke else []
    # The plain loop has no chunked loss, so that equal means without.
    equal = [*common, "train.precision=autocast", "train.zero_stage=0", "train.loss_chunk=0"]
    loops = {"plain": ("plain", equal), "equal": ("heliostat", equal)}
    loops["recommended"] = ("heliostat", common)
    return [
        Side(
            name,
            loop,
            overrides,
            recipe=recipe,
            ranks=asked.gpus,
            threads=1 if asked.smoke else 4,
            device=asked.device,
            corpus={"root": root},
        )
        for name, (loop, overrides) in loops.items()
    ]


def measure(recipe: str, asked: Asked) -> Figures:
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as root:
        plain, *ours = sides(recipe, root, asked)
        make_corpus(plain.config, 2048)
        # Two at a time: the memory of one GPU holds no third model of this size.
        for side in ours:
            with running([plain, side]) as alive:
                blocks = rounds(alive, steps=asked.steps, pairs=asked.pairs)
                profile = alive[1].profile(asked.steps)
            figures |= _report(recipe, side, blocks, asked)
            _print_profile(recipe, side, profile)
            figures |= {
                f"{recipe}.{side.name}.share.{kind}": share
                for kind, share in profile["share"].items()
            }
    return figures


def _report(recipe: str, side: Side, blocks: dict[str, list[Block]], asked: Asked) -> Figures:
    ratio = Ratio.of(blocks[side.name], blocks["plain"])
    print(f"{recipe:<10} {side.name:<12} / plain  {ratio}")
    label = f"{recipe}.{side.name}"
    figures = {
        f"{label}_over_plain": ratio.middle,
        f"{label}_over_plain.low": ratio.low,
        f"{label}_over_plain.high": ratio.high,
    }
    for name in ("plain", side.name):
        speed, used = _speed_and_mfu(side, blocks[name], asked)
        figures[f"{label}.{name}_tokens_per_second_per_device"] = speed
        told = f"{speed:,.0f} tokens/s per device"
        if used is not None:
            figures[f"{label}.{name}_mfu"] = used
            told += f", MFU {used:.3f}"
        print(f"{'':<10} {name:<12} {told}")
    return figures


def _speed_and_mfu(side: Side, blocks: list[Block], asked: Asked) -> tuple[float, float | None]:
    """Tokens per second per device; MFU where the device's peak is known."""
    config = side.config
    assert isinstance(config.data, TextData)
    tokens = config.train.global_batch * config.data.sequence_length
    speed = tokens_per_second(blocks, tokens, asked.steps) / asked.gpus
    facts = {"vocab_size": config.data.vocab_size}
    flops = families.load(config.family).flops_per_prediction(config, facts)
    peak = peak_flops(machine().get("gpu", ""))
    return speed, flops * speed / peak if flops and peak else None


def _print_profile(recipe: str, side: Side, profile: dict[str, dict[str, float]]) -> None:
    print(f"{recipe:<10} {side.name:<12} of the time:")
    for kind, share in profile["share"].items():
        print(f"{'':<23} {share:6.1%}  {kind}")
    for name, share in profile["longest"].items():
        print(f"{'':<23} {share:6.1%}    {name[:70]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(MICRO_BATCH))
    parser.add_argument("--gpus", type=int, default=0, help="of this machine; 0 takes all")
    parser.add_argument("--pairs", type=int, default=7, help="rounds of one block per side")
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows per GPU; 0: the recipe's")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    given = parser.parse_args()
    described = machine()
    gpus = 1 if given.smoke else given.gpus or described.get("gpus", 0)
    if not gpus:
        raise SystemExit("there is no GPU here: --smoke shows whether this script runs")
    pairs, steps = (2, 2) if given.smoke else (given.pairs, given.steps)
    asked = Asked(gpus, pairs, steps, given.micro_batch, given.smoke)
    print(json.dumps(described))
    figures: Figures = {}
    for recipe in given.recipes.split(","):
        figures |= measure(recipe, asked)
    print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
