"""Sides run in turn, and the ratio of their speeds with its interval."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any

from sides import Side

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Block:
    """Some steps of one side: the slowest rank's seconds."""

    seconds: float
    waited: float
    loss: float
    step: int


@dataclass(frozen=True)
class Ratio:
    """How much faster one side is than another, from pairs of blocks; geometric."""

    middle: float
    low: float
    high: float
    pairs: int

    @staticmethod
    def of(ours: Sequence[Block], peer: Sequence[Block]) -> "Ratio":
        """Hodges and Lehmann's estimate over the logarithms of the pairs' ratios, and its 95 %
        interval by Wilcoxon's signed ranks (Hollander and Wolfe, Nonparametric Statistical
        Methods, 3.2 and 3.3): on a shared machine a few blocks take twice as long for no reason of
        theirs, which would rule a mean.
        """
        logs = [math.log(p.seconds / o.seconds) for o, p in zip(ours, peer, strict=True)]
        pairs = len(logs)
        averages = sorted((logs[i] + logs[j]) / 2 for i in range(pairs) for j in range(i, pairs))
        # Rank of the interval's ends among them, by the normal approximation.
        spread = 1.96 * math.sqrt(pairs * (pairs + 1) * (2 * pairs + 1) / 24)
        end = max(0, math.floor(len(averages) / 2 - spread))
        low, high = averages[end], averages[len(averages) - 1 - end]
        return Ratio(math.exp(median(averages)), math.exp(low), math.exp(high), pairs)

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


class Running:
    """The processes of one side."""

    def __init__(self, side: Side, folder: Path, log: IO[bytes]) -> None:
        self.side, self._log = side, log
        self._ranks = [self._start(rank, folder) for rank in range(side.ranks)]
        self._said()  # standing at the gate

    def block(self, steps: int) -> Block:
        said = self._asked(f"{steps}")
        return Block(
            max(one["seconds"] for one in said),
            max(one["waited"] for one in said),
            # DDP's ranks know only the loss of their own rows, of which each has as many.
            fmean(one["loss"] for one in said),
            int(said[0]["step"]),
        )

    def profile(self, steps: int) -> dict[str, Any]:
        """What rank 0 spends a block on: see `spent`."""
        profile: dict[str, Any] = self._asked(f"{steps} profile")[0]["profile"]
        return profile

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()

    def _asked(self, wish: str) -> list[dict[str, Any]]:
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(f"{wish}\n")
            process.stdin.flush()
        return self._said()

    def _said(self) -> list[dict[str, Any]]:
        lines = []
        for process in self._ranks:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self._log.seek(0)
                tail = self._log.read().decode(errors="replace")[-4000:]
                raise SystemExit(f"{tail}\n{self.side.name} ended with {process.wait()}")
            lines.append(json.loads(line))
        return lines

    def _start(self, rank: int, folder: Path) -> subprocess.Popen[str]:
        environment = (
            os.environ
            | _workers_environment(self.side)
            | {
                "SIDE_RANK": str(rank),
                "RENDEZVOUS": str(folder / f"{self.side.name.replace(' ', '-')}.rendezvous"),
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join(
                    [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
            }
        )
        return subprocess.Popen(
            [sys.executable, str(HERE / "sides.py"), json.dumps(asdict(self.side))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )


def _workers_environment(side: Side) -> dict[str, str]:
    """What `heliostat pretrain` gives to its workers, given to all sides alike: glibc that keeps
    freed memory is worth more than most differences that are measured here."""
    from pipelines.pretrain import _environment

    return dict(_environment(side.threads, gpu=side.device == "cuda"))


@contextmanager
def running(sides: Sequence[Side]) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="heliostat-sides-")))
        alive = []
        for side in sides:
            log = stack.enter_context(tempfile.TemporaryFile())
            alive.append(Running(side, folder, log))
            stack.callback(alive[-1].end)
        yield alive


def take_turns(
    sides: Sequence[Side], *, steps: int, pairs: int, warm: int = 3
) -> dict[str, list[Block]]:
    with running(sides) as alive:
        return rounds(alive, steps=steps, pairs=pairs, warm=warm)


def rounds(
    alive: Sequence[Running], *, steps: int, pairs: int, warm: int = 3
) -> dict[str, list[Block]]:
    """`pairs` rounds of one block per side, in an order that turns with each round.

    Args:
        warm: rounds before them that do not count.
    """
    blocks: dict[str, list[Block]] = {one.side.name: [] for one in alive}
    for number in range(warm + pairs):
        turn = number % len(alive)
        for one in [*alive[turn:], *alive[:turn]]:
            block = one.block(steps)
            if number >= warm:
                blocks[one.side.name].append(block)
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return blocks


def same_losses(blocks: dict[str, list[Block]], names: Sequence[str], tolerance: float) -> None:
    """At the first block that counts: dozens of steps later rounding alone has led them apart.

    Raises:
        SystemExit: if sides that compute the same do not come to the same losses.
    """
    expected = blocks[names[0]][0]
    for name in names[1:]:
        found = blocks[name][0]
        if not math.isclose(found.loss, expected.loss, rel_tol=tolerance):
            raise SystemExit(
                f"{name} has loss {found.loss:.6f} before step {found.step} where {names[0]} has "
                f"{expected.loss:.6f}: they do not train the same"
            )


def tokens_per_second(blocks: Sequence[Block], tokens: int, steps: int) -> float:
    return tokens * steps / median(block.seconds for block in blocks)


def machine() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    import platform
    from importlib.metadata import version

    import torch

    names = ("torch", "deepspeed", "transformers", "ray", "numpy")
    described: dict[str, Any] = {name: version(name) for name in names}
    described["off_pin"] = _off_pin(described)
    described["python"] = platform.python_version()
    described["cpu"] = _cpu_name()
    described["cpus"] = os.cpu_count()
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name(0)
        described["gpus"] = torch.cuda.device_count()
        described["cuda"] = torch.version.cuda
    return described


def _off_pin(versions: Mapping[str, str]) -> list[str]:
    """Packages whose version is not the one in constraints.txt, local build tags aside."""
    lines = (HERE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    return [name for name, found in versions.items() if pins.get(name) != found.split("+")[0]]


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "unknown"
