"""`heliostat plan`: what a recipe needs of each device, if that fits, how long and how much."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import planner
from cluster.config import LlamaModel, RunConfig, TextData, TrainSection
from cluster.errors import ArtifactError, UsageError
from cluster.placement import reachable_resources
from cluster.planner import Cost, Footprint, Machines, Verdict
from cluster.session import joined_address, session
from cluster.storage import Store
from pipelines import families
from pipelines.families.base import Facts, Family
from pipelines.training import zero
from pipelines.training.meter import product_flops


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    machines: Machines
    precision: zero.Precision
    parameters: int
    verdict: Verdict
    cost: Cost | None
    """With the cure, where one is needed; None where nothing helps or it cannot be known."""
    serving: Serving | None
    """None for families without a cache."""

    def lines(self) -> list[str]:
        """For a person."""
        train, machines, need = self.config.train, self.machines, self.verdict.need
        devices = machines.nodes * machines.devices_per_node
        micro = zero.micro_batch(train, train.world_sizes[0])
        parts = ", ".join(
            f"{name} {planner.gib(size)}" for name, size in asdict(need).items() if name != "host"
        )
        lines = [
            f"{self.config.name}: {self.parameters / 1e6:,.1f} M parameters, ZeRO "
            f"{train.zero_stage}, {self.precision}, {micro} rows at once, {_workers(train)} on "
            f"{machines.nodes} x {machines.devices_per_node} {machines.device} ({devices} in all)",
            f"each device holds {planner.gib(need.device)} of {planner.gib(machines.memory)}: "
            f"{parts}",
            f"each host holds {planner.gib(need.host)} per device while a checkpoint is written",
            self._verdict(),
        ]
        if self.verdict.cure is not None:
            lines.append(self._time())
        if self.serving is not None:
            lines.append(self.serving.line())
        return lines

    def _verdict(self) -> str:
        verdict = self.verdict
        if not verdict.misfit:
            return "it fits"
        if verdict.cure is None:
            return (
                f"it does not fit: {verdict.misfit}, and no setting changes that: take more or "
                "larger devices"
            )
        return f"it does not fit: {verdict.misfit}; it does with " + " ".join(
            f"train.{key}={str(value).lower()}" for key, value in verdict.cure.items()
        )

    def _time(self) -> str:
        if self.cost is None:
            return "how long: unknown, the peak of this device is in no table of ours"
        machines, speed = self.machines, self.cost.tokens_per_second
        money = (
            ""
            if self.cost.dollars is None
            else f", {self.cost.dollars:,.0f} USD ({machines.price:.2f} per device and hour, "
            f"{machines.price_is})"
        )
        days = f"{self.cost.days:,.1f} days" if self.cost.days >= 1 else _hours(self.cost.days)
        then = "with that, about" if self.verdict.misfit else "about"
        return f"{then} {speed:,.0f} tokens/s, {days}{money}, as computed"

    def tree(self) -> dict[str, Any]:
        """For a program: plain JSON."""
        return {
            "parameters": self.parameters,
            "precision": self.precision,
            "machines": asdict(self.machines),
            "need": asdict(self.verdict.need),
            "fits": not self.verdict.misfit,
            "misfit": self.verdict.misfit,
            "cure": self.verdict.cure,
            "cost": None if self.cost is None else asdict(self.cost),
            "serving": None
            if self.serving is None
            else asdict(self.serving) | {"concurrent": self.serving.concurrent},
        }


@dataclass(frozen=True)
class Serving:
    """What one device holds of a served model's cache."""

    room: int
    """Tokens that the cache may have beside the weights."""
    slots: int
    """Requests that a replica is to run at once (`serve.max_concurrent`)."""
    prefixes: int
    """Beginnings that it keeps beside them."""
    context: int
    """Tokens of each of these."""

    @property
    def tokens(self) -> int:
        """Of the cache that the service would make."""
        return (self.slots + self.prefixes) * self.context

    @property
    def concurrent(self) -> int:
        """Requests that run at once, as many as have room."""
        return max(0, min(self.slots, self.room // self.context - self.prefixes))

    def line(self) -> str:
        """For a person."""
        if not self.room:
            return "served on one device: its weights leave no room for a cache"
        most = self.room // self.context - self.prefixes
        kept = f"{self.slots} requests at once and {self.prefixes} kept beginnings"
        start = (
            f"served on one device: {kept} of {self.context:,} tokens each take a cache of "
            f"{self.tokens:,} tokens, with room for {self.room:,}"
        )
        if most >= self.slots:
            return f"{start}, so serve.max_concurrent could be {most:,}"
        if most >= 1:
            return f"{start}: it does with serve.max_concurrent={most}"
        return f"{start}: it does with a smaller serve.engine.context or fewer prefixes"


def _workers(train: TrainSection) -> str:
    sizes = train.world_sizes
    return f"{sizes[0]} to {sizes[-1]} workers" if len(sizes) > 1 else f"{sizes[0]} workers"


def _hours(days: float) -> str:
    hours = days * 24
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.0f} minutes"


def run(config: RunConfig, nodes: str | None, price: float | None) -> Plan:
    """
    Args:
        nodes: `NODESxDEVICE:PER_NODE`, such as 4xH200:8, or a cluster launcher's YAML file. Without
            it: the cluster that `ray.address` names, else this machine.
        price: USD per hour of a device, in place of the table's.

    Raises:
        UsageError: for machines that cannot be understood or are fewer than the workers.
    """
    family = families.load(config.family)
    machines = _machines(config, nodes, price)
    workers = config.train.world_sizes[-1]
    if machines.gpu and workers > machines.nodes * machines.devices_per_node:
        have = machines.nodes * machines.devices_per_node
        raise UsageError(
            f"train.workers {workers} needs as many devices, not {have}: take train.workers={have} "
            "or more machines"
        )
    device: zero.Device = "cuda" if machines.gpu else "cpu"
    precision = zero.precision(config.train, device)
    facts = _facts(config, family)
    tracer = Tracer(config, family, facts, precision)
    verdict = planner.judge(config, machines, tracer, precision)
    flops = family.flops_per_prediction(config, facts)
    parameters = tracer(config.train).parameters
    return Plan(
        config,
        machines,
        precision,
        parameters,
        verdict,
        _cost(config.train, machines, verdict, flops, tracer, precision),
        serving(config, machines, parameters),
    )


def _cost(
    train: TrainSection,
    machines: Machines,
    verdict: Verdict,
    flops: float | None,
    tracer: Tracer,
    precision: zero.Precision,
) -> Cost | None:
    """Of what would run: with the cure, where there is one."""
    if verdict.cure is None:
        return None
    cured = train.model_copy(update=verdict.cure)
    return planner.cost(cured, machines, flops, tracer(cured), precision)


class Tracer:
    """Footprints of a recipe's micro-batches, each traced once."""

    def __init__(
        self,
        config: RunConfig,
        family: Family,
        facts: Facts,
        precision: zero.Precision,
    ) -> None:
        self._config, self._family, self._facts = config, family, facts
        self._precision = precision
        self._known: dict[tuple[Any, ...], Footprint] = {}

    def __call__(self, train: TrainSection) -> Footprint:
        from pipelines.training import footprint

        rows = zero.micro_batch(train, train.world_sizes[0])
        key = (rows, train.activation_checkpointing, train.loss_chunk)
        if key not in self._known:
            config = self._config.model_copy(update={"train": train})
            self._known[key] = footprint.trace(
                config, self._family, self._facts, rows, self._precision
            )
        return self._known[key]


def _facts(config: RunConfig, family: Family) -> Facts:
    """Of the prepared corpus where there is one, else what is to be expected."""
    try:
        newest = Store(config.storage.root).latest("corpus", config.name)
    except (OSError, ArtifactError):
        newest = None
    facts: Facts | None = newest.manifest.detail.get("facts") if newest else None
    return facts or family.expected_facts(config)


def serving(config: RunConfig, machines: Machines, parameters: int) -> Serving | None:
    """Keys and values of a token take 2 x layers x key-value heads x width of a head, in the type
    that the engine holds weights in: 16 bits on GPUs, 32 on CPUs."""
    model, data, serve = config.model, config.data, config.serve
    if not isinstance(model, LlamaModel) or not isinstance(data, TextData):
        return None
    width = 2 if machines.gpu else 4
    head = model.hidden_size // model.heads
    token = 2 * model.layers * model.kv_heads * head * width
    room = planner.ROOM * machines.memory - width * parameters
    engine = serve.engine
    context = min(data.sequence_length, engine.context or data.sequence_length)
    prefixes = 0 if engine.constant_shape else engine.prefixes
    return Serving(max(0, int(room // token)), serve.max_concurrent, prefixes, context)


# --- which machines


def _machines(config: RunConfig, nodes: str | None, price: float | None) -> Machines:
    if nodes is None:
        if joined_address(config):
            with session(config):
                there = reachable_resources(config)
            return _priced(of_cluster(there, config.train, _cpu_flops), price)
        return this_machine(config.train)
    if nodes.endswith((".yaml", ".yml")):
        return _priced(of_launcher(Path(nodes)), price)
    return _priced(planner.machines(nodes), price)


def _priced(machines: Machines, price: float | None) -> Machines:
    return machines if price is None else replace(machines, price=price, price_is="as given")


def this_machine(train: TrainSection) -> Machines:
    """The CPUs and memory of this machine, shared by the workers."""
    workers = train.world_sizes[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machines(1, workers, "CPU", memory // workers, None, _cpu_flops(train), None)


def _cpu_flops(train: TrainSection) -> float:
    return product_flops(train.threads_per_worker, half=zero.precision(train, "cpu") != "fp32")


def of_cluster(nodes: list[Mapping[str, float]], train: TrainSection, cpu_flops: Any) -> Machines:
    """From the resources of nodes, by Ray's names.

    Raises:
        UsageError: if they do not say which accelerators they have, or have several kinds.
    """
    devices = [node for node in nodes if node.get("GPU", 0) >= 1]
    if not devices:
        workers = train.world_sizes[0]
        memory = sum(node.get("memory", 0) for node in nodes)
        flops = cpu_flops(train)
        return Machines(
            len(nodes), -(-workers // len(nodes)), "CPU", int(memory // workers), None, flops, None
        )
    kinds = {
        key.partition(":")[2]
        for node in devices
        for key in node
        if key.startswith("accelerator_type:")
    }
    if len(kinds) != 1:
        named = ", ".join(sorted(kinds)) or "none that says which"
        raise UsageError(
            f"the cluster's accelerators are {named}: say which to plan for, such as "
            "--nodes 4xH100:8"
        )
    per_node = int(min(node["GPU"] for node in devices))
    host = int(min(node.get("memory", 0) for node in devices) // per_node)
    return replace(planner.machines(f"{len(devices)}x{kinds.pop()}:{per_node}"), host_memory=host)


def of_launcher(path: Path) -> Machines:
    """The node type of a cluster launcher's file that has the most devices, all that it may start.

    Raises:
        UsageError: if none of its instances is one that we know.
    """
    import yaml

    from cluster.hardware import INSTANCES, instance

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is no cluster launcher's file: {error}") from error
    types = tree.get("available_node_types") if isinstance(tree, dict) else None
    if not isinstance(types, dict):
        raise UsageError(
            f"{path} names no types of nodes (available_node_types), as a launcher's file for "
            "machines of your own does not: say which machines, such as --nodes 4xH100:8"
        )
    found = []
    for node in (node for node in types.values() if isinstance(node, dict)):
        config = node.get("node_config") or {}
        known = instance(config)
        most = int(node.get("max_workers", tree.get("max_workers", 0)))
        if known is not None and most:
            found.append((most * known.devices, most, known, _spot(config)))
    if not found:
        raise UsageError(
            f"{path} starts no instance with accelerators that we know: say which machines, such "
            f"as --nodes 4xH100:8; known are {', '.join(INSTANCES)}"
        )
    _, most, known, spot = max(found, key=lambda item: item[0])
    machines = planner.machines(f"{most}x{known.device}:{known.devices}")
    return replace(
        machines,
        host_memory=known.host_memory // known.devices,
        price=known.price / known.devices,
        price_is="list price on demand; spot nodes cost less, --price takes it"
        if spot
        else machines.price_is,
    )


def _spot(node_config: Mapping[str, Any]) -> bool:
    """Whether AWS or Google is asked for what others have left over, at a price of the day."""
    market = (node_config.get("InstanceMarketOptions") or {}).get("MarketType")
    scheduling = node_config.get("scheduling") or {}
    return market == "spot" or scheduling.get("provisioningModel") == "SPOT"
