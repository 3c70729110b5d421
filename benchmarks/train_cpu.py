"""Training on CPUs: `heliostat pretrain` against a plain PyTorch loop and Hugging Face's Trainer.

    pip install -r benchmarks/requirements.txt      # for the Trainer; left out without it
    python benchmarks/train_cpu.py [--pairs 24] [--steps N] [--shapes 10m,demo] [--stages 0,3]
                                    [--groups fp32,ranks,autocast,recommended] [--smoke]

Three questions, each for a model of 10 M parameters and for the demo's, on two cores:

    equal         ours at ZeRO 0 to 3 in the plain loop's precision: one process of two threads
                  (`fp32`, and bf16 `autocast` where the CPU has it), and two gloo `ranks` of one
                  thread against DDP
    recommended   ours with bf16 autocast and compile against the plain loop in fp32
    waiting       the share of our steps that waits for data

Ratios are of speed: 0.9 is nine tenths of the peer's tokens per second.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec

from sides import Side, make_corpus
from turns import Block, Ratio, machine, same_losses, take_turns, tokens_per_second

from cluster.config import TextData
from cluster.hardware import cpu_computes_bf16

SHAPES = {
    # A Llama of 10 M parameters: small enough for a CPU, large enough that matrices rule.
    "10m": [
        "data.vocab_size=8192",
        "data.sequence_length=256",
        "model.hidden_size=256",
        "model.layers=10",
        "model.intermediate_size=688",
        "model.initializer_range=0.02",
        "train.global_batch=8",
        "train.learning_rate=0.001",
    ],
    "demo": [],
}
# Steps of a block: seconds each, so that what disturbs the machine for longer disturbs all sides.
STEPS = {"10m": 1, "demo": 8}
GROUPS = ("fp32", "ranks", "autocast", "recommended")
GOALS = {0: 0.90, 1: 0.90, 2: 0.90, 3: 0.80}
# Two stages and their peers at a time: short rounds, and 1 to 2 GB of memory for each process.
TOGETHER = 2
Figures = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    pairs: int
    steps: int
    smoke: bool
    stages: tuple[int, ...]

    def steps_of(self, shape: str) -> int:
        return self.steps or (2 if self.smoke else STEPS[shape])


def equal(asked: Asked, shape: str, root: str, *, ranks: int, precision: str) -> Figures:
    """Ours at every ZeRO stage, and the Trainer, against the plain loop."""
    figures: Figures = {}
    for start in range(0, len(asked.stages), TOGETHER):
        stages = asked.stages[start : start + TOGETHER]
        figures |= _equal(asked, shape, root, stages, ranks=ranks, precision=precision)
    return figures


def _equal(
    asked: Asked, shape: str, root: str, stages: tuple[int, ...], *, ranks: int, precision: str
) -> Figures:
    common = [*SHAPES[shape], f"train.precision={precision}"]
    place = {"ranks": ranks, "threads": 2 // ranks, "corpus": {"root": root}}
    sides = [Side("plain", "plain", [*common, "train.zero_stage=0"], **place)]
    sides += [
        Side(f"zero {stage}", "heliostat", [*common, f"train.zero_stage={stage}"], **place)
        for stage in stages
    ]
    if 0 in stages and ranks == 1 and find_spec("accelerate"):
        sides.append(Side("trainer", "trainer", [*common, "train.zero_stage=0"], **place))
    blocks = take_turns(sides, steps=asked.steps_of(shape), pairs=asked.pairs)
    if precision == "fp32":
        same_losses(blocks, ["plain", *(f"zero {stage}" for stage in stages)], 1e-3)
    label = f"{shape}.{precision}.{ranks}x{2 // ranks}"
    figures = {}
    for stage in stages:
        ratio = Ratio.of(blocks[f"zero {stage}"], blocks["plain"])
        print(f"{label:<18} ZeRO {stage} / plain      {ratio}   goal {GOALS[stage]:.2f}")
        figures |= _named(f"{label}.zero{stage}_over_plain", ratio)
    if "trainer" in blocks:
        ratio = Ratio.of(blocks["zero 0"], blocks["trainer"])
        print(f"{label:<18} ZeRO 0 / Trainer    {ratio}")
        figures |= _named(f"{label}.zero0_over_trainer", ratio)
    figures |= _speeds(label, sides, blocks, asked.steps_of(shape))
    waiting = _waiting(label, [block for stage in stages for block in blocks[f"zero {stage}"]])
    return figures | {f"{label}.zero{''.join(map(str, stages))}_data_wait": waiting}


def recommended(asked: Asked, shape: str, root: str) -> Figures:
    """bf16 autocast, fused AdamW, sdpa and compile against the plain fp32 loop."""
    place = {"ranks": 1, "threads": 2, "corpus": {"root": root}}
    plain = Side("plain", "plain", [*SHAPES[shape], "train.precision=fp32"], **place)
    ours = Side(
        "recommended",
        "heliostat",
        [*SHAPES[shape], "train.precision=autocast", "train.compile=true", "train.zero_stage=0"],
        **place,
    )
    blocks = take_turns([plain, ours], steps=asked.steps_of(shape), pairs=asked.pairs)
    ratio = Ratio.of(blocks["recommended"], blocks["plain"])
    label = f"{shape}.recommended"
    print(f"{label:<18} bf16, compiled / plain fp32   {ratio}   goal 2")
    speeds = _speeds(label, [plain, ours], blocks, asked.steps_of(shape))
    return _named(f"{label}_over_plain_fp32", ratio) | speeds


def _named(name: str, ratio: Ratio) -> Figures:
    return {name: ratio.middle, f"{name}.low": ratio.low, f"{name}.high": ratio.high}


def _speeds(label: str, sides: list[Side], blocks: dict[str, list[Block]], steps: int) -> Figures:
    config = sides[0].config
    assert isinstance(config.data, TextData)
    tokens = config.train.global_batch * config.data.sequence_length
    named = {side.name: tokens_per_second(blocks[side.name], tokens, steps) for side in sides}
    print(f"{'':<18} " + ", ".join(f"{name} {speed:,.0f}" for name, speed in named.items()))
    return {
        f"{label}.{name.replace(' ', '')}_tokens_per_second": speed for name, speed in named.items()
    }


def _waiting(label: str, ours: list[Block]) -> float:
    share = sum(block.waited for block in ours) / sum(block.seconds for block in ours)
    print(f"{label:<18} waiting for data    {share:.4f} of a step   goal below 0.01")
    return share


def measure(asked: Asked, shape: str, groups: list[str]) -> Figures:
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as root:
        side = Side("corpus", "plain", SHAPES[shape], corpus={"root": root})
        make_corpus(side.config, 512)
        if "fp32" in groups:
            figures |= equal(asked, shape, root, ranks=1, precision="fp32")
        if "ranks" in groups:
            figures |= equal(asked, shape, root, ranks=2, precision="fp32")
        if "autocast" in groups and cpu_computes_bf16():
            figures |= equal(asked, shape, root, ranks=1, precision="autocast")
        if "recommended" in groups:
            figures |= recommended(asked, shape, root)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24, help="rounds of one block per side")
    parser.add_argument("--steps", type=int, default=0, help="of a block; 0 takes the shape's")
    parser.add_argument("--shapes", default="10m,demo", help="of " + ", ".join(SHAPES))
    parser.add_argument("--groups", default=",".join(GROUPS), help="of " + ", ".join(GROUPS))
    parser.add_argument("--stages", default="0,1,2,3", help="of ZeRO, for equal")
    parser.add_argument("--smoke", action="store_true", help="two rounds of two steps: does it run")
    given = parser.parse_args()
    stages = tuple(map(int, given.stages.split(",")))
    asked = Asked(2 if given.smoke else given.pairs, given.steps, given.smoke, stages)
    print(json.dumps(machine()))
    figures: Figures = {}
    for shape in given.shapes.split(","):
        figures |= measure(asked, shape, given.groups.split(","))
    print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
