"""Training and preparing on hosts of one CPU core each: on 1, 2 and 4, as far as there are cores.

Hosts are those of `tests/lab.py`: network namespaces with an sshd in each, made one cluster by
`ray up`, every host pinned to a core of its own, at most four. The peer is one of them, by its
label, measured in the same cluster, in turn; the ideal is its rate times the number of hosts. The
global batch stays the same, and so does the pile. The head's own processes share the first core.

`python benchmarks/scale.py [ROUNDS]`, as root; seven minutes for one round on two cores, three more
for each that follows.
"""

import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests are

from cluster.storage import Store
from pipelines.training.checkpoint import read_history
from tests.lab import STORE, lab, missing
from tests.launched import Launched, launched

SIZES = (1, 2, 4)
SETTINGS = (
    "data.sources=[builtin:python-stdlib]",
    "train.steps=80",
    "train.warmup_steps=4",
    "train.checkpoint_every=80",
    "train.precision=fp32",
)
WARM = 20
"""Steps before those that are counted."""


def measure(cluster: Launched, hosts: int, number: int) -> dict[str, float]:
    """Rates of one run of `prepare` and `pretrain`."""
    name = f"scale-{number}-{hosts}"
    words = ("submit", "up", "gpt-demo", "--to", "pretrain", "--name", name)
    changes = [f"name={name}", f"storage.root={STORE}/root", f"train.workers={hosts}", *SETTINGS]
    labels = f"{{role: {selector(hosts, len(cluster.lab.hosts))}}}"
    changes += [f"prepare.labels={labels}", f"train.labels={labels}"]
    done = cluster.heliostat(*words, *changes, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    store = Store(str(cluster.lab.store / "root"))
    corpus, trained = store.latest("corpus", name), store.latest("checkpoint", name)
    assert corpus is not None and trained is not None
    seconds = next(
        float(line.split("│")[2].split()[0])
        for line in done.stdout.splitlines()
        if line.startswith("│ prepare")
    )
    rates = [row["predictions_per_second"] for row in read_history(trained)[WARM:]]
    return {
        "train_tokens_per_second": statistics.median(rates),
        "prepare_rows_per_second": corpus.manifest.metrics["train_rows"] / seconds,
    }


def selector(hosts: int, there: int) -> str:
    """Of so many: the last ones, which have none of the head's processes beside their work."""
    return f"'in({','.join(f'host{number}' for number in range(there - hosts + 1, there + 1))})'"


def figures(found: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """Medians, and their share of the ideal."""
    told: dict[str, float] = {}
    for key in found[1][0]:
        alone = statistics.median(row[key] for row in found[1])
        for size, rows in found.items():
            rate = statistics.median(row[key] for row in rows)
            told[f"{key}_{size}"] = round(rate, 1)
            told[f"{key}_{size}_of_ideal"] = round(rate / (size * alone), 3)
    return told


def main(rounds: int) -> None:
    if reason := missing():
        sys.exit(f"benchmarks/scale.py: {reason}")
    sizes = [size for size in SIZES if size <= (os.cpu_count() or 1)]
    most = sizes[-1]
    if most == 1:
        sys.exit("benchmarks/scale.py: one CPU core leaves nothing to scale over")
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    roles = [f"host{number}" for number in range(1, most + 1)]
    with lab(most, pinned=True) as hosts, launched(hosts, roles, brief=True) as cluster:
        cluster.wait_for_nodes(most)
        for number in range(rounds):
            for size in found:
                found[size].append(measure(cluster, size, number))
                print(f"round {number}, {size} host(s): {found[size][-1]}", flush=True)
    told = figures(found)
    for name, value in told.items():
        print(f"{name:<44} {value:>12}")
    print(json.dumps({"figures": told}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
