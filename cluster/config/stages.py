"""The short sections: evaluate, publish, registry, ray, storage."""

from typing import Annotated

from pydantic import Field

from cluster.config.base import OPERATIONAL, Positive, Section


class StorageSection(Section):
    root: Annotated[str, OPERATIONAL, Field(min_length=1)] = "~/heliostat"
    """Where artifacts live: a local path that all nodes share, or a URI (`s3://`, `gs://`)."""


class RaySection(Section):
    address: Annotated[str | None, OPERATIONAL] = None
    """A running cluster (`auto` or host:port); unset means $RAY_ADDRESS, else a Ray of our own."""
    cpus: Annotated[int | None, OPERATIONAL, Field(ge=1)] = None
    """CPUs of a Ray of our own; unset takes the machine's, at least two."""
    grows_to: Annotated[dict[str, Annotated[int, Field(ge=0, le=10**9)]], OPERATIONAL] = {}
    """Resources that an autoscaler may grow the cluster to, such as {GPU: 64, CPU: 704}, where it
    does not tell, as on Kubernetes. What `ray up` made is known without."""


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
