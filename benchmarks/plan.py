"""What `heliostat plan` says of pretraining on CPUs, against what the training does.

Memory: the peak of a worker after three steps, of the nine configurations that the constants of
`cluster/planner.py` were fitted to. Speed: the median of all steps but the first, of these and of
small models, around which the process weighs more than they do. Each configuration trains as
processes of its own, one configuration after the other, a thread for each worker. Figures are
planned over found; `near` counts those within a tenth.

`python benchmarks/plan.py [ROUNDS]`, on two cores that do nothing else; ten minutes for a round.
Medians of all rounds.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests are

from tests.forecasts import CASES, Case, Forecasted, forecasted

TIMED = 5
"""Steps more of the small models, which are over in a moment."""
NEAR = 0.1
TINY = ("model.hidden_size=32", "model.heads=2", "model.kv_heads=1", "model.intermediate_size=64")
TINY += ("data.vocab_size=400", "data.sequence_length=64", "train.global_batch=8")
MIDDLE = ("model.hidden_size=384", "model.layers=8", "model.heads=6", "model.kv_heads=6")
MIDDLE += ("model.intermediate_size=1024", "data.sequence_length=256", "train.global_batch=8")
AUTOCAST = "train.precision=autocast"
SMALL = {
    "31 thousand": Case(TINY),
    "31 thousand, autocast": Case((*TINY, AUTOCAST)),
    "gpt-demo": Case(()),
    "gpt-demo, autocast": Case((AUTOCAST,)),
    "gpt-demo, ZeRO 3": Case(("train.zero_stage=3",)),
    "16 M, ZeRO 2": Case(MIDDLE),
    "16 M, ZeRO 2, autocast": Case((*MIDDLE, AUTOCAST)),
}


def measure(name: str, case: Case) -> Forecasted:
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        found = forecasted(Path(folder), case, TIMED if name in SMALL else 0)
    print(
        f"{name:<40} {found.planned_peak / 1e6:>7,.0f} of {found.found_peak / 1e6:>6,.0f} MB, "
        f"{found.planned_speed:>9,.0f} of {found.found_speed:>8,.0f}/s",
        flush=True,
    )
    return found


def figures(found: dict[str, list[Forecasted]]) -> dict[str, float]:
    """Planned over found, and how many are within a tenth."""
    memory = {
        name: median(run.planned_peak / run.found_peak for run in found[name]) for name in CASES
    }
    speed = {
        name: median(run.planned_speed / run.found_speed for run in runs)
        for name, runs in found.items()
    }
    told = {f"memory, {name}": ratio for name, ratio in memory.items()}
    told |= {f"speed, {name}": ratio for name, ratio in speed.items()}
    for kind, ratios in (("memory", memory), ("speed", speed)):
        told[f"{kind}, near"] = sum(abs(ratio - 1) <= NEAR for ratio in ratios.values())
        told[f"{kind}, of"] = len(ratios)
    return {name: round(value, 3) for name, value in told.items()}


def main(rounds: int) -> None:
    cases = CASES | SMALL
    found: dict[str, list[Forecasted]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(measure(name, case))
    told = figures(found)
    for name, value in told.items():
        print(f"{name:<48} {value:>7.2f}")
    print(json.dumps({"figures": told}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
