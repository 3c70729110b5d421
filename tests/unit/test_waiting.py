"""Why a job waits, in a line."""

from dataclasses import replace

import pytest

from cluster.dashboard import Dashboard
from cluster.errors import UsageError
from cluster.storage import Store
from cluster.telemetry import Sign
from cluster.waiting import Facts, Machine, Wish, explain, reason
from pipelines.training.watchdog import Watchdog
from tests.dashboards import dashboard

CPU2 = Machine("10.0.0.1", {"CPU": 2.0, "memory": 1e9}, {"ray.io/node-group": "head"})
H200 = Machine("10.0.0.2", {"CPU": 16.0, "GPU": 8.0, "accelerator_type:H200": 1.0}, {"role": "gpu"})
RUNNING = Facts("RUNNING", 100.0, "", "pretrain: nothing made yet\n", (), (CPU2,))


def waiting(*bundles: dict[str, float], machines: tuple[Machine, ...] = (CPU2,)) -> Facts:
    group = Wish(f"a group of {len(bundles)} workers", bundles, {})
    return replace(RUNNING, wishes=(group,), machines=machines)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (waiting({"CPU": 1}, {"CPU": 1}), "wants 2 CPUs, which others hold now"),
        (
            waiting({"CPU": 1}, {"CPU": 2}),
            "pending placement: a group of 2 workers wants 3 CPUs at once and the cluster has 2",
        ),
        (waiting({"GPU": 1, "CPU": 1}), "asks for 1 GPU, which no node has (nodes: 1x 2 CPUs)"),
        (waiting({"CPU": 4}), "asks for 4 CPUs, which no node has"),
        (
            waiting({"accelerator_type:H100": 0.001}, machines=(H200,)),
            "asks for accelerator H100, which no node has",
        ),
        (
            waiting({"CPU": 4, "GPU": 1}, machines=(replace(H200, resources={"GPU": 8}), CPU2)),
            "asks for 4 CPUs, which no node has",
        ),
        (
            waiting({"CPU": 2, "GPU": 1}, machines=(replace(H200, resources={"GPU": 8}), CPU2)),
            "asks for 2 CPUs and 1 GPU on one node",
        ),
    ],
)
def test_a_missing_place_is_named(facts: Facts, says: str) -> None:
    assert says in reason(facts) and "\n" not in reason(facts)


def test_labels_count() -> None:
    task = Wish("task read", [{"CPU": 1}], {"role": "data"})
    facts = replace(RUNNING, wishes=(task,), machines=(H200,))
    assert "task read asks for a node with label role=data" in reason(facts)
    for selector in ("gpu", "!data", "in(gpu, tpu)"):
        fitting = replace(facts, wishes=(replace(task, labels={"role": selector}),))
        assert "which others hold now" in reason(fitting)


def test_a_group_counts_the_nodes_of_its_label_only() -> None:
    group = Wish("a group of 3 workers", [{"CPU": 1}] * 3, {"role": "train"})
    nodes = [Machine(f"10.0.0.{n}", {"CPU": 1.0}, {"role": "train"}) for n in (1, 2)]
    other = Machine("10.0.0.3", {"CPU": 8.0}, {"role": "data"})
    facts = replace(RUNNING, wishes=(group,), machines=(*nodes, other))
    assert (
        "a group of 3 workers wants 3 CPUs at once and the cluster has 2 CPUs in all with label "
        "role=train" in reason(facts)
    )
    large = replace(facts, wishes=(replace(group, bundles=[{"CPU": 4}]),))
    assert "asks for 4 CPUs with label role=train, which no node has" in reason(large)


def test_what_the_autoscaler_does_is_told() -> None:
    facts = replace(waiting({"GPU": 1}), launching=("gpu-spot (setting-up)",))
    assert "the autoscaler is starting gpu-spot (setting-up)" in reason(facts)
    failed = replace(waiting({"GPU": 1}), failures=("InsufficientInstanceCapacity",))
    assert "could not start one: InsufficientInstanceCapacity" in reason(failed)


def test_set_up_ends_and_work_are_told_apart() -> None:
    pending = Facts("PENDING", 42.0, "Waiting for the\nruntime environment.", "", (), ())
    assert reason(pending).startswith("set-up running for 42 s: Waiting for the runtime environ")
    log = "pretrain: 5/30 steps, 1.0 steps/s, 25 s left loss 1.0  goodput 88%\n"
    assert "pretrain at 5/30 steps, goodput 88%" in reason(replace(RUNNING, log=log))
    assert "in pretrain, which last said: pretrain: nothing made yet" in reason(RUNNING)
    assert reason(replace(RUNNING, status="SUCCEEDED")) == "it is done, after 1 m 40 s"
    failed = replace(RUNNING, status="FAILED", log="x\nheliostat: no such file\n\n")
    assert reason(failed) == "it failed after 1 m 40 s: heliostat: no such file"


def test_a_silent_rank_is_told() -> None:
    line = "pretrain: rank 1 (process 7 on node ab12) at step 5, step, silent since 2026-11-22 UTC"
    assert reason(replace(RUNNING, log=f"{RUNNING.log}{line}\n")).startswith(line)
    later = f"{line}\npretrain: 6/30 steps, 1.0 steps/s, 24 s left\n"
    assert "silent" not in reason(replace(RUNNING, log=later))


def test_what_the_watchdog_says_of_a_silent_rank_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The two agree on one line, the only way from a worker to who asks why."""
    watch = Watchdog(board=None, store=Store("/nowhere"), run="run", hang_seconds=25)
    sign = Sign("start", 1, 2, 7, 1.0, "ab12cd34ef", 0, 5, "step", 5, 0.1, 0.1, 0.1)
    watch._tell_silent([(sign, 20.0, 20.0)])
    said = capsys.readouterr().out
    assert reason(replace(RUNNING, log=RUNNING.log + said)).startswith(
        "pretrain: rank 1 (process 7 on node ab12cd34) at step 5, step, silent since "
    )


def rows(*found: object) -> object:
    return {"data": {"result": {"result": list(found)}}}


def test_the_dashboard_is_asked_for_all_of_it() -> None:
    job = {"submission_id": "mine", "job_id": "02", "status": "RUNNING", "start_time": 1}
    group = {
        "creator_job_id": "02",
        "state": "PENDING",
        "bundles": [{"unit_resources": {"GPU": 1}}],
    }
    node = {
        "node_ip": "10.0.0.1",
        "state": "ALIVE",
        "resources_total": {"CPU": 2.0, "node:10.0.0.1": 1.0},
        "labels": {},
    }
    answers = {
        "/api/jobs/": [job],
        "/api/jobs/mine/logs": {"logs": "prepare: nothing made yet\n"},
        "/api/cluster_status": {"data": {"cluster_status": None}},
        "/api/v0/nodes": rows(node, {**node, "state": "DEAD", "resources_total": {"GPU": 1}}),
        "/api/v0/placement_groups": rows({**group, "creator_job_id": "01"}, group),
        "/api/v0/actors": rows(),
        "/api/v0/tasks": rows(),
    }
    with dashboard(answers, "t") as address:
        said = explain(Dashboard(address, "t"), "mine")
        assert said.startswith("a group of 1 workers asks for 1 GPU, which no node has")
        with pytest.raises(UsageError, match="knows no job other: it has mine"):
            explain(Dashboard(address, "t"), "other")
    starting = {"name": "sees", "required_resources": {}, "placement_group_id": None}
    there = {"class_name": "Board", "label_selector": {"ray.io/node-id": "ab"}}
    node |= {"labels": {"ray.io/node-id": "ab"}}
    answers |= {"/api/v0/placement_groups": rows(), "/api/v0/nodes": rows(node)}
    answers |= {"/api/v0/actors": rows(there), "/api/v0/tasks": rows(starting)}
    with dashboard(answers, "t") as address:
        assert explain(Dashboard(address, "t"), "mine").startswith("it waits for nothing")
