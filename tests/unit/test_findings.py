"""What the doctor says of what the nodes tell."""

from dataclasses import replace

import pytest

from cluster.examination import Row, ranks_of
from cluster.findings import Finding, Node, Port, Reduce, full, quick, worst

SOUND = Node(
    name="10.0.0.1",
    versions={"Python": "3.11.7", "Ray": "2.60.0"},
    skew=0.01,
    skew_error=0.01,
    disk_free=50 << 30,
    disk_total=100 << 30,
    files=65536,
    gpus=8,
    devices=8,
    write_rate=500e6,
    read_rate=900e6,
    ports=(
        Port(22, "sshd"),
        Port(8000, "haproxy -f x"),
        Port(10002, "ray::IDLE"),
        Port(19339, "python up"),
        Port(10001, "python -m ray.util.client.server --mode=proxy"),
    ),
    token_mode=0o600,
    start_seconds=2.0,
)
OTHER = replace(SOUND, name="10.0.0.2")
CLOSED = Finding("ok", "dashboard", "401 without the token")
FAST = Reduce("nccl", 2, 40e9)


def findings(*nodes: Node, reduce: Reduce | None = FAST) -> list[Finding]:
    return full(nodes, reduce, 8000, CLOSED)


def test_a_sound_cluster_has_nothing_to_cure() -> None:
    found = findings(SOUND, OTHER)
    assert worst(found) == "ok" and all(not finding.cure for finding in found)
    subjects = {"dashboard", "versions", "clock", "disk", "devices", "storage", "token", "start"}
    assert {finding.subject for finding in found} == subjects | {"network"}
    assert "the same on 2 node(s): Python 3.11.7, Ray 2.60.0" in found[1].text


@pytest.mark.parametrize(
    ("wrong", "level", "says"),
    [
        ({"versions": {"Python": "3.11.7", "Ray": "2.59"}}, "bad", "Ray is 2.59 on 10.0.0.2, 2.60"),
        ({"versions": {"Python": "3.11.7"}}, "bad", "missing on 10.0.0.2"),
        ({"skew": -9.0}, "bad", "10.0.0.2 is -9.0 s from the driver"),
        ({"disk_free": 1 << 30}, "bad", "1.0 GiB free (1%)"),
        ({"files": 1024}, "warn", "allows 1024 open files"),
        ({"devices": 7}, "bad", "Ray counts 8 GPUs on 10.0.0.2 and torch sees 7"),
        ({"gpus": 0.0}, "warn", "--num-gpus=8"),
        ({"storage_error": "Access Denied"}, "bad", "10.0.0.2 cannot use the storage root"),
        ({"write_rate": 1e6}, "warn", "writes 1 MB/s"),
        ({"token_given": False}, "bad", "Ray on 10.0.0.2 runs without one"),
        ({"token_mode": 0o644}, "bad", "has mode 0644"),
        ({"ports": (Port(8265, "python dashboard"),)}, "bad", "--dashboard-host=127.0.0.1"),
        ({"ports": (Port(5432, "postgres"),)}, "warn", "postgres on 10.0.0.2 listens on 5432"),
        ({"ports": (Port(5432, ""),)}, "warn", "something on 10.0.0.2 listens on 5432"),
        ({"start_seconds": 90.0}, "warn", "after 90.0 s"),
    ],
)
def test_each_fault_is_one_line_with_its_cure(
    wrong: dict[str, object], level: str, says: str
) -> None:
    found = findings(SOUND, replace(OTHER, **wrong))  # type: ignore[arg-type]
    faults = [finding for finding in found if finding.level != "ok"]
    assert [finding.level for finding in faults] == [level] and worst(found) == level
    assert says in faults[0].line() and faults[0].cure and "\n" not in faults[0].line()


def test_a_head_without_gpus_is_not_asked_for_what_only_gpus_have() -> None:
    """As `cluster.yaml` makes them: a head, and nodes with GPUs beside it."""
    head = replace(SOUND, gpus=0, devices=0)
    versions = {**SOUND.versions, "driver": "570.1", "NCCL": "2.27.5"}
    one, other = (replace(SOUND, name=name, versions=versions) for name in ("10.0.0.2", "10.0.0.3"))
    found = findings(head, one, other)
    assert worst(found) == "ok" and worst(quick([head, one])) == "ok"
    assert "the same on 3 node(s)" in found[1].text
    assert "driver 570.1 on 2 of them, NCCL 2.27.5 on 2 of them" in found[1].text
    # Between those that have them they must be equal all the same.
    older = replace(other, versions={**versions, "driver": "550.9"})
    assert [f.text for f in quick([head, one, older]) if f.level == "bad"] == [
        "driver is 550.9 on 10.0.0.3, 570.1 on 10.0.0.2"
    ]
    # What every node has is asked of every node.
    old = replace(head, versions={"Python": "3.11.7", "Ray": "2.59"})
    assert worst(quick([old, one])) == "bad"


def row(address: str, gpus: float = 0) -> Row:
    return {"NodeManagerAddress": address, "Resources": {"CPU": 8.0, "GPU": gpus}}


def test_gradients_are_tried_between_the_nodes_that_have_gpus() -> None:
    head, data, one, other = row("1"), row("2"), row("3", 4), row("4", 4)
    assert ranks_of([head, data, one, other]) == ("nccl", [one, other])
    assert ranks_of([one, other]) == ("nccl", [one, other])
    # A single one has nobody to exchange with; the network is tried all the same.
    assert ranks_of([head, one]) == ("gloo", [head, one])
    assert ranks_of([head, data]) == ("gloo", [head, data])
    said = findings(SOUND, OTHER, reduce=Reduce("nccl", 2, 40e9))[-1].text
    assert said == "an all-reduce over 2 nodes with GPUs (nccl) moves 40.00 GB/s"


def test_a_clock_is_not_blamed_for_a_slow_answer() -> None:
    assert worst(quick([replace(SOUND, skew=3.0, skew_error=2.0)])) == "ok"


def test_the_network_is_judged_between_nodes_only() -> None:
    assert not [f for f in findings(SOUND, reduce=None) if f.subject == "network"]
    slow = findings(SOUND, OTHER, reduce=Reduce("gloo", 2, 20e6))
    assert "(gloo) moves 0.02 GB/s" in slow[-1].text and slow[-1].level == "warn"
    broken = findings(SOUND, OTHER, reduce=Reduce("gloo", 2, 0.0, "connection refused"))
    assert broken[-1].level == "bad" and "connection refused" in broken[-1].text


def test_many_nodes_stay_one_line() -> None:
    nodes = [replace(SOUND, name=f"n{n}", versions={"Ray": str(n % 2)}) for n in range(64)]
    told = quick(nodes)[0].text
    assert told == "Ray is 0 on n0, n2, n4 and 29 more, 1 on n1, n3, n5 and 29 more"
