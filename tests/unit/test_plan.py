"""What `heliostat plan` says: to a person, to a program, of machines that are there or may be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import cli, loading, planner, progress
from cluster.config import RunConfig, TrainSection
from cluster.errors import UsageError
from cluster.planner import Footprint, Machines, Need, Verdict
from pipelines import plan
from tests.hunting import TINY

GIB = 1 << 30
L4 = {"CPU": 48.0, "GPU": 4.0, "memory": 160.0 * GIB, "accelerator_type:L4": 1.0}
HEAD = {"CPU": 0.0, "memory": 8.0 * GIB}


def config(root: Path, *changes: str) -> RunConfig:
    return loading.load("gpt-demo", [f"storage.root={root}", *TINY, *changes])


def test_a_person_is_told_in_lines(tmp_path: Path) -> None:
    made = plan.run(config(tmp_path, "train.workers=8"), "2xH100:4", None)
    first, each, host, verdict, time, served = made.lines()
    assert first.startswith("gpt-demo: ") and "8 workers on 2 x 4 H100 (8 in all)" in first
    assert each.startswith("each device holds ") and "of 80 GiB: parameters " in each
    assert "per device while a checkpoint is written" in host and verdict == "it fits"
    assert "tokens/s" in time and time.endswith(
        "6.88 per device and hour, list price on demand), as computed"
    )
    assert served.startswith(
        "served on one device: 16 requests at once and 4 kept beginnings of 16"
    )
    assert not any("None" in line or "\n" in line for line in made.lines())


def test_a_program_is_told_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(progress._state, "console", None)
    monkeypatch.setitem(progress._state, "stderr", False)
    words = ["plan", "gpt-demo", f"storage.root={tmp_path}", *TINY, "--nodes", "1xH100:2"]
    cli.app([*words, "--price", "2.5", "--json"], standalone_mode=False)
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert tree["status"] == "planned" and tree["fits"] and tree["cure"] == {}
    assert (tree["machines"]["device"], tree["machines"]["price"]) == ("H100", 2.5)
    assert tree["machines"]["price_is"] == "as given"
    assert tree["need"]["parameters"] > 0 < tree["cost"]["tokens_per_second"]
    hours = tree["cost"]["days"] * 24
    assert tree["cost"]["dollars"] == pytest.approx(hours * 2 * 2.5)
    assert tree["serving"]["concurrent"] == tree["serving"]["slots"] == 16
    assert len(err.splitlines()) == 6


def test_what_does_not_fit_is_cured_and_the_cure_is_what_it_costs(tmp_path: Path) -> None:
    """Some rows too many for a T4's 15 GiB."""
    wide = ("data.sequence_length=512", "train.workers=1", "train.global_batch=1024")
    made = plan.run(config(tmp_path, *wide), "1xT4", None)
    verdict, time = made.lines()[3:5]
    assert made.verdict.misfit and made.verdict.cure
    assert verdict.startswith("it does not fit: a device would hold ")
    for key, value in made.verdict.cure.items():
        assert f"train.{key}={str(value).lower()}" in verdict
    assert time.startswith("with that, about ")
    tree = made.tree()
    assert not tree["fits"] and tree["cure"] == made.verdict.cure
    # The change that it names does what it says.
    cured = [f"train.{key}={str(value).lower()}" for key, value in made.verdict.cure.items()]
    after = plan.run(config(tmp_path, *wide, *cured), "1xT4", None)
    assert not after.verdict.misfit and after.cost == made.cost


NEED = Need(1, 1, 1, 1, 1, 1)
TRACED = Footprint(10**9, 0, 2048, 1, GIB, 0)
H100 = planner.machines("1xH100:8")


def test_a_slower_cure_costs_more_and_what_nothing_cures_costs_nothing(tmp_path: Path) -> None:
    train = config(tmp_path).train

    def cost(cure: planner.Change | None) -> planner.Cost | None:
        return plan._cost(train, H100, Verdict(NEED, "too much", cure), 6e9, traced, "bf16")

    def traced(train: TrainSection) -> Footprint:
        return TRACED

    plain, slow = cost({}), cost({"activation_checkpointing": True})
    assert plain is not None and slow is not None
    assert slow.days > 1.3 * plain.days and slow.dollars > 1.3 * plain.dollars
    assert cost(None) is None
    hopeless = plan.Plan(
        config(tmp_path), H100, "bf16", 10**9, Verdict(NEED, "too much", None), None, None
    )
    assert "take more or larger devices" in hopeless.lines()[-1]
    assert hopeless.tree()["cost"] is None


def test_a_served_cache_is_places_of_a_whole_context(tmp_path: Path) -> None:
    """A token's keys and values: 2 x 2 layers x 2 heads x 16 wide, of 2 bytes each on a GPU."""
    gpu = Machines(1, 1, "T4", GIB, None, 1e12, None)
    found = plan.serving(config(tmp_path), gpu, 1000)
    assert found is not None
    assert found.room == int((planner.ROOM * GIB - 2 * 1000) // (2 * 2 * 2 * 16 * 2))
    assert (found.slots, found.prefixes, found.context) == (16, 4, 16)
    assert found.tokens == 20 * 16 and found.concurrent == 16
    cpu = plan.serving(config(tmp_path), replace(gpu, device="CPU"), 1000)
    assert cpu is not None and found.room == pytest.approx(2 * cpu.room, rel=1e-4)
    small = ("serve.max_concurrent=2", "serve.engine.prefixes=1", "serve.engine.context=8")
    changed = plan.serving(config(tmp_path, *small), gpu, 1000)
    assert changed is not None and changed.tokens == 3 * 8
    constant = plan.serving(config(tmp_path, "serve.engine.constant_shape=true"), gpu, 1000)
    assert constant is not None and constant.prefixes == 0
    assert plan.serving(loading.load("digits-cnn"), gpu, 1000) is None


@pytest.mark.parametrize(
    ("room", "concurrent", "says"),
    [
        (0, 0, "its weights leave no room"),
        (100, 0, "it does with a smaller serve.engine.context or fewer prefixes"),
        (700, 3, "it does with serve.max_concurrent=3"),
        (10_000, 16, "so serve.max_concurrent could be 96"),
    ],
)
def test_concurrency_is_what_has_room(room: int, concurrent: int, says: str) -> None:
    found = plan.Serving(room, slots=16, prefixes=4, context=100)
    assert found.concurrent == concurrent and says in found.line()


def test_a_live_cluster_is_planned_by_its_devices() -> None:
    train = loading.load("gpt-demo").train

    def never(train: TrainSection) -> float:
        raise AssertionError("no CPU is measured for GPUs")

    found = plan.of_cluster([HEAD, L4, {**L4, "GPU": 8.0}], train, never)
    # Of unlike nodes the smallest counts, so that every worker has what it is told.
    assert (found.nodes, found.devices_per_node, found.device) == (2, 4, "L4")
    assert found.host_memory == 40 * GIB and found.price == pytest.approx(0.805)
    nameless = {key: value for key, value in L4.items() if ":" not in key}
    with pytest.raises(UsageError, match="accelerators are none that says which"):
        plan.of_cluster([nameless], train, never)
    other = {**nameless, "accelerator_type:H100": 1.0}
    with pytest.raises(UsageError, match="accelerators are H100, L4"):
        plan.of_cluster([L4, other], train, never)


def test_a_live_cluster_without_devices_shares_its_memory() -> None:
    train = loading.load("gpt-demo", ["train.workers=3", "train.global_batch=33"]).train
    node = {"CPU": 2.0, "memory": 6.0 * GIB}
    found = plan.of_cluster([node, node], train, lambda train: 1e11)
    assert (found.nodes, found.devices_per_node, found.device) == (2, 2, "CPU")
    assert (found.memory, found.peak_flops, found.price) == (4 * GIB, 1e11, None)


def test_spot_nodes_are_said_to_be_priced_on_demand() -> None:
    root = Path(__file__).parents[2]
    for name in ("cluster.yaml", "cluster/launchers/gcp.yaml"):
        machines = plan.of_launcher(root / name)
        assert (machines.nodes, machines.device, machines.devices_per_node) == (16, "L4", 4)
        assert machines.host_memory == 48 << 30 and machines.price is not None
        assert machines.price_is.startswith("list price on demand; spot nodes cost less")
