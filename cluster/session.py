"""The only `ray.init`: joins a cluster, or starts a Ray of our own that ends with the stage."""

import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster import autoscaling
from cluster.access import make_token
from cluster.config import RunConfig
from cluster.errors import CapacityError, HeliostatError, StorageRootError
from cluster.proxy import environment
from cluster.storage import Store

PACKAGES = ("cluster", "pipelines", "serving", "tune")
OBJECT_STORE_BYTES = 1 << 30
"""Object store of a Ray of our own. Blocks are a few MB, so a laptop keeps its memory."""


@dataclass(frozen=True)
class Session:
    """A connected Ray."""

    ours: bool
    """True where this process started it: it ends with the session."""
    dashboard: str
    """host:port, empty where the cluster runs without one."""
    cpus: int
    """What the cluster has, or what its autoscaler may grow it to if that is more."""
    gpus: int
    nodes: tuple[str, ...]


def inside_job() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def joined_address(config: RunConfig) -> str | None:
    """The cluster that a session would join; None where it starts a Ray of our own."""
    return config.ray.address or os.environ.get("RAY_ADDRESS")


def open_store(config: RunConfig) -> Store:
    """The store of a config, writable and, inside a job, not in the job's temporary folder.

    Raises:
        StorageRootError: with the cure.
    """
    root = config.storage.root
    if "://" not in root and not Path(root).expanduser().is_absolute():
        if inside_job():
            raise StorageRootError(
                f"storage.root {root} is relative, and a job's working directory is a temporary "
                "copy that Ray deletes: give an absolute path that all nodes share, or a URI"
            )
        root = str(Path(root).absolute())
    store = Store(root)
    store.check_writable()
    return store


@contextmanager
def session(config: RunConfig) -> Iterator[Session]:
    """Join or start Ray; inside another session of this process, the same one again."""
    import ray

    address = joined_address(config)
    if ray.is_initialized():
        yield _describe(config, ours=not address)
        return
    _check_one_parent()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray Train polls its workers this often; its own default of 2 s would pace `report`.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray warns about a future default for accelerators that we set ourselves.
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if address:
        _join(address, quiet)
    else:
        _ensure_token()
        # Ray's processes inherit them; a cluster that is joined was started with its own.
        os.environ.update(environment(config.serve))
        _start(config.ray.cpus or max(2, os.cpu_count() or 1), quiet)
    try:
        joined = _describe(config, ours=not address)
        if len(joined.nodes) > 1:
            _check_shared(open_store(config), joined.nodes)
        yield joined
    finally:
        ray.shutdown()


def check_capacity(joined: Session, *, workers: int, cpus_per_worker: int) -> None:
    """Refuse at once what would wait for ever.

    Raises:
        CapacityError: if the cluster cannot hold the training workers at the same time.
    """
    if joined.gpus:
        if workers > joined.gpus:
            raise CapacityError(
                f"train.workers {workers} needs as many GPUs and the cluster has {joined.gpus}: "
                f"take train.workers={joined.gpus} or fewer"
            )
        return
    if workers * cpus_per_worker > joined.cpus:
        most = joined.cpus // cpus_per_worker
        cure = (
            f"take train.workers={most} or fewer"
            if most
            else f"take train.threads_per_worker={max(1, joined.cpus)} or fewer"
        )
        raise CapacityError(
            f"train.workers {workers} with train.threads_per_worker {cpus_per_worker} need "
            f"{workers * cpus_per_worker} CPUs and the cluster has {joined.cpus}: {cure}"
        )


def _start(cpus: int, options: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            **options,
        )
    except Exception as error:  # of no narrower type where a daemon does not answer in time
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise HeliostatError(
            f"Ray did not start on this machine ({reason}): if it is only busy, run the same "
            "command again"
        ) from error


def _join(address: str, options: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise HeliostatError(
            f"cannot join Ray at {address}: {str(error).splitlines()[0]}"
        ) from error


def _describe(config: RunConfig, *, ours: bool) -> Session:
    import ray

    limits = {} if ours else _limits(config)
    resources = _reachable(ray.cluster_resources(), limits)
    nodes = tuple(node["NodeID"] for node in ray.nodes() if node["Alive"])
    dashboard = ray._private.worker._global_node.webui_url
    return Session(
        ours, dashboard or "", int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), nodes
    )


def _limits(config: RunConfig) -> dict[str, float]:
    """What the autoscaler may grow the cluster to, as far as anybody says."""
    import ray

    # What a platform's own autoscaler has told Ray: Ray's tell it nothing.
    told = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return _reachable(_reachable(told, autoscaling.growth().limits()), config.ray.grows_to)


def _reachable(now: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """The larger of what is there and what the autoscaler may add nodes for."""
    return {kind: max(now.get(kind, 0), limits.get(kind, 0)) for kind in (*now, *limits)}


def _ensure_token() -> None:
    """A token for the authentication that `ray.init` turns on, unless the user has a way of their
    own."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        make_token()


def _check_one_parent() -> None:
    parents = set()
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise HeliostatError(f"package {package} is not installed: install Heliostat again")
        parents.add(Path(spec.origin).parent.parent)
    if len(parents) > 1:
        folders = ", ".join(sorted(map(str, parents)))
        raise HeliostatError(
            f"the packages {', '.join(PACKAGES)} come from different folders ({folders}): "
            "another distribution shadows one of ours; use a fresh environment"
        )


def _check_shared(store: Store, nodes: tuple[str, ...]) -> None:
    """Write a file here and look for it from every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    path = f"{store.base}/.shared-{secrets.token_hex(6)}"
    with store.filesystem.open_output_stream(path) as stream:
        stream.write(b"ok")

    @ray.remote(num_cpus=0)
    def sees(root: str, probe: str) -> bool:
        return Store(root).read(probe) == b"ok"

    try:
        asked = {
            node: sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(store.uri, path)
            for node in nodes
        }
        blind = [node[:8] for node, answer in asked.items() if not ray.get(answer)]
    finally:
        store.filesystem.delete_file(path)
    if blind:
        raise StorageRootError(
            f"storage.root {store.uri} is not shared: {len(blind)} of {len(nodes)} nodes do not "
            f"see it ({', '.join(blind)}): give a path that all nodes mount, or a URI"
        )
