"""`heliostat why`: in a line, what a job waits for, or what it is at.

What Ray's dashboard knows is gathered into `Facts`; `reason` decides, purely.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.access import JOBS
from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, UsageError
from cluster.jobs import ENDED, duration, position

Resources = Mapping[str, float]
SILENT = re.compile(r"\w+: rank \d+ .*silent since .*")
"""What the driver's watchdog says of a rank (`pipelines.training.watchdog`)."""
NO_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Wish:
    """Something that waits for a place."""

    what: str
    """`a group of 2`, `task tokenise`, `actor Engine`."""
    bundles: Sequence[Resources]
    """What it wants, each part on one node."""
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Machine:
    """A node that is alive."""

    address: str
    resources: Resources
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """What is known of a job."""

    status: str
    age: float
    """Seconds since it was submitted, until now or its end."""
    message: str
    log: str
    wishes: Sequence[Wish]
    machines: Sequence[Machine]
    launching: Sequence[str] = ()
    """Nodes that the autoscaler is starting."""
    failures: Sequence[str] = ()
    """Why it could not start others."""


def reason(facts: Facts) -> str:
    """One line, the most particular thing that is known."""
    if facts.status in ENDED:
        return _ended(facts)
    if facts.status == "PENDING":
        return (
            f"set-up running for {duration(facts.age)}: {_one_line(facts.message)} If it lasts, "
            "see runtime_env_setup*.log in the Ray dashboard"
        )
    for wish in facts.wishes:
        # What wants nothing gets it once its process has started, if there is such a node.
        if _sum(wish.bundles) or _lacking(wish, facts.machines):
            return _waiting(wish, facts)
    last = _last_line(facts.log)
    if SILENT.fullmatch(last):
        return f"{last}; `heliostat journal` and the Ray dashboard show its stack"
    stage, reading = position(facts.log)
    if reading is not None:
        return (
            f"it waits for nothing: {reading.label} at {reading.done}/{reading.total} "
            f"{reading.unit}{_goodput(reading.goodput)}, {duration(facts.age)} since it began"
        )
    said = f", which last said: {last}" if last else ""
    return f"it waits for nothing that Ray knows of: in {stage or 'its beginning'}{said}"


def _ended(facts: Facts) -> str:
    if facts.status == "SUCCEEDED":
        return f"it is done, after {duration(facts.age)}"
    what = "failed" if facts.status == "FAILED" else "was stopped"
    last = _last_line(facts.log) or _one_line(facts.message)
    return f"it {what} after {duration(facts.age)}: {last}"


def _waiting(wish: Wish, facts: Facts) -> str:
    """Why a place is missing: nothing has it, something is starting, or others hold it."""
    if lacking := _lacking(wish, facts.machines):
        start = f"{wish.what} asks for {lacking}, which no node has"
        if facts.launching:
            return f"{start}; the autoscaler is starting {', '.join(facts.launching)}"
        if facts.failures:
            return f"{start}; the autoscaler could not start one: {_one_line(facts.failures[-1])}"
        return (
            f"{start} ({_told(facts.machines)}): no such accelerator or too large a part; change "
            "what it asks for, or add a node that has it"
        )
    wants = _sum(wish.bundles)
    total = _sum(machine.resources for machine in _fitting(wish, facts.machines))
    for key, amount in wants.items():
        if amount > total.get(key, 0) + 1e-6:
            return (
                f"pending placement: {wish.what} wants {_shown(wants)} at once and the cluster has "
                f"{_shown({key: total.get(key, 0)})} in all{_where(wish)}"
                + (f"; starting {', '.join(facts.launching)}" if facts.launching else "")
            )
    return (
        f"pending placement: {wish.what} wants {_shown(wants)}, which others hold now; "
        "`heliostat jobs` shows which jobs run, and a served model keeps its CPUs or GPUs"
    )


def _lacking(wish: Wish, machines: Sequence[Machine]) -> str:
    """What of a wish no single node has, however free."""
    fitting = _fitting(wish, machines)
    if not fitting:
        return f"a node{_where(wish)}"
    for bundle in wish.bundles:
        if any(_holds(machine.resources, bundle) for machine in fitting):
            continue
        for key, amount in bundle.items():
            if not any(m.resources.get(key, 0) + 1e-6 >= amount for m in fitting):
                return _shown({key: amount}) + _where(wish)
        return f"{_shown(bundle)} on one node{_where(wish)}"
    return ""


def _fitting(wish: Wish, machines: Sequence[Machine]) -> list[Machine]:
    """Those with the labels that a wish asks for."""
    return [
        machine
        for machine in machines
        if all(_matches(machine.labels.get(key, ""), value) for key, value in wish.labels.items())
    ]


def _where(wish: Wish) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in wish.labels.items())
    return f" with label {labels}" if labels else ""


def _matches(value: str, wanted: str) -> bool:
    """As Ray's label selectors do, for the forms that are common: `x`, `!x`, `in(x,y)`."""
    if wanted.startswith("in(") and wanted.endswith(")"):
        return value in [word.strip() for word in wanted[3:-1].split(",")]
    return value != wanted[1:] if wanted.startswith("!") else value == wanted


def _holds(resources: Resources, bundle: Resources) -> bool:
    return all(resources.get(key, 0) + 1e-6 >= amount for key, amount in bundle.items())


def _sum(parts: Iterable[Resources]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, amount in part.items():
            total[key] = total.get(key, 0) + amount
    return total


def _shown(resources: Resources) -> str:
    def one(key: str, amount: float) -> str:
        if key.startswith(NO_ACCELERATOR):
            return f"accelerator {key.removeprefix(NO_ACCELERATOR)}"
        if key in ("memory", "object_store_memory"):
            return f"{amount / 2**30:.1f} GiB of {key.replace('_', ' ')}"
        return f"{amount:g} {key}" + ("s" if key in ("CPU", "GPU") and amount != 1 else "")

    return " and ".join(one(key, amount) for key, amount in sorted(resources.items())) or "nothing"


def _told(machines: Sequence[Machine]) -> str:
    """The nodes, in short."""
    kinds = [
        _shown({k: v for k, v in m.resources.items() if k in ("CPU", "GPU") or NO_ACCELERATOR in k})
        for m in machines
    ]
    return "nodes: " + ", ".join(f"{kinds.count(kind)}x {kind}" for kind in dict.fromkeys(kinds))


def _goodput(share: str) -> str:
    return f", goodput {share}" if share else ""


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _one_line(text: str, most: int = 300) -> str:
    return " ".join(text.split())[:most]


def explain(dashboard: Dashboard, job: str) -> str:
    """
    Raises:
        UsageError: if the cluster knows no such job.
        ClusterError: if it does not answer.
    """
    return reason(_gather(dashboard, _known(dashboard, job)))


def _known(dashboard: Dashboard, job: str) -> Mapping[str, Any]:
    infos = dashboard.get(JOBS)
    for info in infos:
        if job in (info.get("submission_id"), info.get("job_id")):
            return dict(info)
    names = ", ".join(str(i["submission_id"]) for i in infos if i.get("submission_id")) or "none"
    raise UsageError(f"the cluster knows no job {job}: it has {names}")


def _gather(dashboard: Dashboard, info: Mapping[str, Any]) -> Facts:
    ended = (info.get("end_time") or 0) / 1000 or time.time()
    name, number = info.get("submission_id"), info.get("job_id")
    log = _log(dashboard, str(name)) if name and number else ""
    status = dashboard.get("/api/cluster_status")["data"].get("cluster_status") or {}
    report = status.get("autoscaler_report") or {}
    return Facts(
        status=str(info["status"]),
        age=max(0.0, ended - (info.get("start_time") or 0) / 1000),
        message=str(info.get("message") or ""),
        log=log,
        wishes=_wishes(dashboard, number) if number else (),
        machines=[
            Machine(row["node_ip"], _numbers(row["resources_total"]), row.get("labels") or {})
            for row in _rows(dashboard, "nodes")
            if row["state"] == "ALIVE"
        ],
        launching=_launching(report),
        failures=[str(failure[-1]) for failure in report.get("failed_nodes") or ()],
    )


def _log(dashboard: Dashboard, name: str) -> str:
    try:
        return str(dashboard.get(f"/api/jobs/{name}/logs")["logs"])
    except ClusterError:
        return ""  # it was on a node that is gone


def _launching(report: Mapping[str, Any]) -> list[str]:
    pending = [f"{kind} ({state})" for _, kind, state in report.get("pending_nodes") or ()]
    asked = [f"{n}x {kind}" for kind, n in (report.get("pending_launches") or {}).items()]
    return [*pending, *asked]


def _wishes(dashboard: Dashboard, job: str) -> list[Wish]:
    """What of a job waits for a place: groups first, which hold up what is in them."""
    found = []
    for row in _rows(dashboard, "placement_groups"):
        waits = row["state"] in ("PENDING", "RESCHEDULING")
        if row["creator_job_id"] == job and waits:
            bundles = row.get("bundles") or ()
            parts = [_numbers(part["unit_resources"]) for part in bundles]
            labels = {
                k: v for part in bundles for k, v in (part.get("label_selector") or {}).items()
            }
            found.append(Wish(f"a group of {len(parts)} workers", parts, labels))
    for kind, state, label in (
        ("actors", "PENDING_CREATION", "class_name"),
        ("tasks", "PENDING_NODE_ASSIGNMENT", "name"),
    ):
        for row in _rows(dashboard, kind, job_id=job, state=state):
            wanted = _numbers(row.get("required_resources") or {})
            name = f"{kind[:-1]} {row[label]}"
            if not row.get("placement_group_id"):
                found.append(Wish(name, [wanted], row.get("label_selector") or {}))
    return found


def _rows(dashboard: Dashboard, kind: str, **equal: str) -> list[dict[str, Any]]:
    filters = "".join(
        f"&filter_keys={key}&filter_predicates=%3D&filter_values={value}"
        for key, value in equal.items()
    )
    answer = dashboard.get(f"/api/v0/{kind}?detail=1&limit=1000{filters}")
    return list(answer["data"]["result"]["result"])


def _numbers(resources: Mapping[str, Any]) -> dict[str, float]:
    """Without what Ray adds for itself, such as a node's own name."""
    return {
        key: float(amount)
        for key, amount in resources.items()
        if not key.startswith(("node:", "bundle"))
    }
