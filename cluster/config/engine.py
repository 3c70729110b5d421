"""`serve.engine`: how a replica computes."""

from typing import Annotated, Literal

from pydantic import Field

from cluster.config.base import OPERATIONAL, Section


class EngineSection(Section):
    precision: Annotated[Literal["auto", "fp32", "bf16", "int8"], OPERATIONAL] = "auto"
    """Of the weights; auto is exact: fp32 on a CPU, as published on a GPU. A lower one is taken
    where it is faster and answers the recorded prompts within its bounds, and fp32 where not."""
    context: Annotated[int | None, OPERATIONAL, Field(ge=2)] = None
    """Most tokens of prompt and answer; unset is all that the model can. The cache holds
    max_concurrent times as many."""
    constant_shape: Annotated[bool, OPERATIONAL] = False
    """In fp32 the same seed gives the same text whatever runs beside it, at the price of speed;
    otherwise rounding may differ with the company. Keeps no prefixes."""
    prefixes: Annotated[int, OPERATIONAL, Field(ge=0, le=1024)] = 4
    """Beginnings of prompts that are kept for prompts that begin alike, each a cache of its own."""
    stream_interval_ms: Annotated[float, OPERATIONAL, Field(ge=0, le=1000)] = 20
    """For so long a stream's tokens after the first wait for each other: a message for every token
    costs other requests their speed (`benchmarks/streams.py`). 0 sends each at once."""
