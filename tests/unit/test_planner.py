from dataclasses import replace
from pathlib import Path

import pytest

from cluster import loading, planner
from cluster.config import TrainSection
from cluster.errors import UsageError
from cluster.planner import Footprint, Machines
from pipelines.plan import of_launcher

GB = 10**9
# Seven billion parameters in 16 bits; 10 GB of activations for each row, 1 GB of logits.
SEVEN_BILLION = 7 * GB


def traced(train: TrainSection) -> Footprint:
    rows = train.micro_batch or train.global_batch // train.world_sizes[0]
    activations = rows * (1 if train.activation_checkpointing else 10) * GB
    logits = 0 if train.loss_chunk else rows * GB
    return Footprint(SEVEN_BILLION, 0, rows * 4096, rows, activations, logits)


def config(**train: object) -> loading.RunConfig:
    given = {"workers": 8, "global_batch": 64, "micro_batch": 1, "precision": "bf16"} | train
    return loading.load("gpt-1b", [f"train.{k}={str(v).lower()}" for k, v in given.items()])


H100 = planner.machines("1xH100:8")


@pytest.mark.parametrize(("stage", "billions"), [(1, 2 * 7 + 12 * 7 / 8), (3, 16 * 7 / 8)])
def test_states_are_those_of_the_zero_paper(stage: int, billions: float) -> None:
    """arXiv:1910.02054, section 5: 2 + 2 + 12 bytes, divided by the workers as the stage says."""
    train = config(zero_stage=stage, compile=False).train
    found = planner.need(train, traced(train), 8, "bf16")
    states = found.parameters + found.optimizer
    if stage == 3:  # what it gathers comes on top
        states += 2 * SEVEN_BILLION // 8 - 2 * planner.LIVE
    assert states / GB == pytest.approx(billions, rel=1e-3)


def test_higher_stages_never_need_more() -> None:
    needs = [
        planner.need(
            config(zero_stage=stage, compile=False).train, traced(config().train), 8, "bf16"
        )
        for stage in (1, 2, 3)
    ]
    # The third gathers up to a billion parameters beside its shard.
    sizes = [need.device for need in needs]
    sizes[2] -= 2 * planner.LIVE
    assert sizes == sorted(sizes, reverse=True)


def test_says_that_it_fits() -> None:
    verdict = planner.judge(config(), H100, traced, "bf16")
    assert verdict.misfit == "" and verdict.cure == {}


def test_cheapest_change_is_taken_and_fits() -> None:
    tight = config(micro_batch=8)  # 88 GB of activations and logits
    verdict = planner.judge(tight, H100, traced, "bf16")
    assert "a device would hold" in verdict.misfit
    assert verdict.cure is not None
    cured = tight.train.model_copy(update=verdict.cure)
    assert not planner.misfit(planner.need(cured, traced(cured), 8, "bf16"), H100)
    # Smaller micro-batches cost less than doing a third of the arithmetic twice.
    assert verdict.cure["micro_batch"] in (2, 4)
    assert "activation_checkpointing" not in verdict.cure


def test_nothing_helps_on_one_small_device() -> None:
    small = Machines(1, 1, "T4", 15 * GB, 10 * GB, 65e12, None)
    verdict = planner.judge(config(workers=1), small, traced, "bf16")
    assert verdict.misfit and verdict.cure is None


def test_offload_is_the_last_resort_and_fills_the_host() -> None:
    one = Machines(1, 1, "H100", 81 * GB, 1000 * GB, 989e12, None)
    verdict = planner.judge(config(workers=1, compile=False), one, traced, "bf16")
    assert verdict.cure is not None and verdict.cure["offload_optimizer"] == "cpu"
    cured = config().train.model_copy(update=verdict.cure)
    found = planner.need(cured, traced(cured), 1, "bf16")
    assert found.optimizer == 0 and found.host >= 12 * SEVEN_BILLION


def test_cost_follows_devices_and_steps() -> None:
    train = config(steps=2000).train
    one = planner.cost(train, H100, 6e9, traced(train))
    assert one is not None and one.dollars is not None
    speed = 8 * 989e12 * planner.UTILISATION / planner.slowdown(train) / 6e9
    assert one.tokens_per_second == pytest.approx(speed)
    assert one.days == pytest.approx(2000 * 64 * 4096 / speed / 86400)
    assert one.dollars == pytest.approx(one.days * 24 * 8 * 55.04 / 8)
    assert planner.cost(train, replace(H100, peak_flops=None), 6e9, traced(train)) is None
    assert planner.cost(train, H100, None, traced(train)) is None


def test_a_small_model_is_no_faster_than_its_operations() -> None:
    """On a CPU; a GPU computes while it is told what is next."""
    small_run = {"workers": 1, "global_batch": 8, "micro_batch": 4, "zero_stage": 0}
    train = config(**small_run, precision="fp32", compile=False).train
    small = Footprint(31_392, 0, 128, 4, GB, 0, operations=1000)
    cpu = Machines(1, 1, "CPU", GB, None, 1e12, None)
    found = planner.cost(train, cpu, 2e5, small, "fp32")
    told = 2 * 1000 * planner.OPERATION_SECONDS + planner.STEP_SECONDS
    assert found is not None and 256 / found.tokens_per_second == pytest.approx(told, rel=0.01)
    # Sixteen bits are what a CPU is further from its peak in.
    large = replace(small, operations=0)
    one, other = (planner.cost(train, cpu, 1e12, large, kind) for kind in ("fp32", "autocast"))
    assert one is not None and other is not None
    assert one.tokens_per_second > 1.5 * other.tokens_per_second


@pytest.mark.parametrize(
    ("text", "nodes", "device", "each"),
    [("4xH200:8", 4, "H200", 8), ("a100", 1, "A100", 1), ("2xH100 NVL:2", 2, "H100 NVL", 2)],
)
def test_machines_are_read(text: str, nodes: int, device: str, each: int) -> None:
    found = planner.machines(text)
    assert (found.nodes, found.device, found.devices_per_node) == (nodes, device, each)


@pytest.mark.parametrize("text", ["", "8", "0xH100:8", "4xH100:0", "4xXYZ:8", "4x", "H100:-1"])
def test_machines_that_nobody_has_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="such as 4xH200:8"):
        planner.machines(text)


REPOSITORY = Path(__file__).parents[2]


def test_machines_of_a_launcher_are_read() -> None:
    machines = of_launcher(REPOSITORY / "cluster.yaml")
    assert (machines.nodes, machines.device, machines.devices_per_node) == (16, "L4", 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("provider: {type: local, head_ip: 10.0.0.1}", "names no types of nodes"),
        ("- 1", "names no types of nodes"),
        ("available_node_types: [head]", "names no types of nodes"),
        ("available_node_types: {机: 4}", "no instance with accelerators"),
        ("{", "is no cluster launcher's file"),
    ],
)
def test_a_launcher_that_tells_no_machines_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "launcher.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=says):
        of_launcher(path)
