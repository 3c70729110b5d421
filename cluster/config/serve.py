"""`serve`: what answers over HTTP, how much of it, and how much one caller may take."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from cluster.config.base import OPERATIONAL, Positive, Section, one_or_range
from cluster.config.engine import EngineSection
from cluster.errors import ConfigError

MOST_REPLICAS = 10_000
# An allowance of 0 would be a key that can do nothing: revoke it instead.
Allowance = Annotated[int | None, OPERATIONAL, Field(ge=1, le=10**12)]


def _replicas(value: Any) -> Any:
    """One number, or the least and the most, as a tuple."""
    counts = one_or_range("serve.replicas", value)
    if not 0 <= counts[0] <= counts[-1] <= MOST_REPLICAS or counts[-1] == 0:
        raise ConfigError(
            f"serve.replicas: input should be from 1 to {MOST_REPLICAS}, the least first, which "
            f"may be 0 for a model that sleeps while nobody asks; not {value!r}"
        )
    return counts if len(counts) == 2 else counts[0]


Replicas = Annotated[int | tuple[int, int], BeforeValidator(_replicas)]


class ServeSection(Section):
    host: Annotated[str, OPERATIONAL] = "127.0.0.1"
    """Address that HTTP listens on; anything but loopback takes a key (`heliostat keys create`)."""
    port: Annotated[int, OPERATIONAL, Field(ge=1, le=65535)] = 8000
    """Port that HTTP listens on."""
    wait: Annotated[bool, OPERATIONAL] = True
    """Stay until Ctrl-C; false returns after one request that the service asked itself."""
    models: Annotated[tuple[str, ...], OPERATIONAL] = ()
    """Models to serve: NAME, NAME@VERSION or NAME@ALIAS; none means the recipe's newest."""
    replicas: Annotated[Replicas, OPERATIONAL] = 1
    """Engine replicas of each model; [least, most] follows the load, a least of 0 lets it sleep."""
    threads_per_replica: Annotated[int, OPERATIONAL, Field(ge=1, le=1024)] = 1
    """CPU threads of an engine replica, reserved from the cluster."""
    gpus_per_replica: Annotated[float | None, OPERATIONAL, Field(ge=0, le=64)] = None
    """GPUs of an engine replica; unset means one where the cluster has any."""
    ingress_replicas: Annotated[int | None, OPERATIONAL, Field(ge=1, le=MOST_REPLICAS)] = None
    """Replicas that take HTTP in; unset means two on a cluster, one on a Ray of our own."""
    max_concurrent: Annotated[Positive, OPERATIONAL] = 16
    """Requests that one engine replica runs at once."""
    max_waiting: Annotated[int, OPERATIONAL, Field(ge=0)] = 64
    """Requests that wait for a place before more are refused with 503."""
    max_tokens: Annotated[Positive, OPERATIONAL] = 1024
    """Largest `max_tokens` that a request may ask for."""
    max_body_bytes: Annotated[int, OPERATIONAL, Field(ge=1024, le=2**30)] = 8 * 2**20
    """Largest body of a request; a larger one is refused with 413 before it is taken in."""
    deadline_seconds: Annotated[float, OPERATIONAL, Field(gt=0, le=86_400)] = 60.0
    """Time in which a request must be answered, queueing included."""
    upscale_seconds: Annotated[float, OPERATIONAL, Field(ge=0, le=3600)] = 2.0
    """How long the load must last before replicas are added."""
    downscale_seconds: Annotated[float, OPERATIONAL, Field(ge=0, le=86_400)] = 60.0
    """How long it must be gone before they are taken away."""
    target_load: Annotated[float, OPERATIONAL, Field(gt=0, le=10)] = 0.5
    """Requests in progress per place (`max_concurrent`) that autoscaling aims at."""
    target_tokens: Annotated[int, OPERATIONAL, Field(ge=0, le=10**9)] = 0
    """Tokens still to read and write per replica that it aims at too; 0 goes by requests alone."""
    max_surge_percent: Annotated[int, OPERATIONAL, Field(ge=0, le=100)] = 100
    """Replicas beyond the number wanted, while a new version replaces those that run."""
    requests_per_minute: Allowance = None
    """Of each key that has no limit of its own; unset means any number, so for the next two."""
    tokens_per_minute: Allowance = None
    """Tokens of prompts and answers together."""
    concurrent_per_key: Allowance = None
    """Calls that a key may have open at once."""
    engine: EngineSection = EngineSection()
    """How a replica of a language model computes."""
    haproxy: Annotated[bool, OPERATIONAL] = True
    """HAProxy (GPLv2) and Serve's throughput mode instead of its Python proxy; on a Ray of our own.
    A cluster's own environment decides there."""

    @property
    def most_replicas(self) -> int:
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas
