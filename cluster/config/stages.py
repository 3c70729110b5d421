"""The short sections: evaluate, publish, registry, serve, ray, storage."""

from typing import Annotated

from pydantic import Field

from cluster.config.base import OPERATIONAL, Positive, Section
from cluster.config.engine import EngineSection


class StorageSection(Section):
    root: Annotated[str, OPERATIONAL, Field(min_length=1)] = "~/heliostat"
    """Where artifacts live: a local path that all nodes share, or a URI (`s3://`, `gs://`)."""


class RaySection(Section):
    address: Annotated[str | None, OPERATIONAL] = None
    """A running cluster (`auto` or host:port); unset means $RAY_ADDRESS, else a Ray of our own."""
    cpus: Annotated[int | None, OPERATIONAL, Field(ge=1)] = None
    """CPUs of a Ray of our own; unset takes the machine's, at least two."""


class EvaluateSection(Section):
    max_rows: Positive = 20_000
    """Held-out rows that are measured, from the start of the split."""
    batch: Annotated[Positive, OPERATIONAL] = 16
    """Rows measured at once."""
    prompt: str = "import os\n\n\ndef "
    """What the sampled continuations continue."""
    sample_tokens: Annotated[int, Field(ge=1, le=4096)] = 96
    """Tokens of each sampled continuation."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Of the sampled continuations: near 0 takes the likeliest token, 1 the model's own odds."""


class PublishSection(Section):
    alias: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = "champion"
    """Registry alias that moves to the new version."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9.-]+$")] = "other"
    """Licence of the model, for its card."""


class RegistrySection(Section):
    uri: Annotated[str | None, OPERATIONAL] = None
    """MLflow tracking and registry server; unset is an SQLite file under a local storage root."""


class ServeSection(Section):
    host: Annotated[str, OPERATIONAL] = "127.0.0.1"
    """Address that HTTP listens on; anything but loopback opens the model to the network."""
    port: Annotated[int, OPERATIONAL, Field(ge=1, le=65535)] = 8000
    """Port that HTTP listens on."""
    wait: Annotated[bool, OPERATIONAL] = True
    """Stay until Ctrl-C; false returns after one request that the service asked itself."""
    replicas: Annotated[int, OPERATIONAL, Field(ge=1, le=10_000)] = 1
    """Engine replicas."""
    threads_per_replica: Annotated[int, OPERATIONAL, Field(ge=1, le=1024)] = 1
    """CPU threads of an engine replica, reserved from the cluster."""
    max_concurrent: Annotated[Positive, OPERATIONAL] = 16
    """Requests that one engine replica runs at once."""
    max_waiting: Annotated[int, OPERATIONAL, Field(ge=0)] = 64
    """Requests that wait for a place before more are refused with 503."""
    max_tokens: Annotated[Positive, OPERATIONAL] = 1024
    """Largest `max_tokens` that a request may ask for."""
    deadline_seconds: Annotated[float, OPERATIONAL, Field(gt=0, le=86_400)] = 60.0
    """Time in which a request must be answered, queueing included."""
    engine: EngineSection = EngineSection()
    """How a replica of a language model computes."""
