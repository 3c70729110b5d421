"""What all sections share: frozen, strict, unknown keys refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import ConfigError


class Operational:
    """Marks a field that says how the work is done, not what comes out of it.

    It is left out of fingerprints: changing it never makes a finished stage stale.
    """


OPERATIONAL = Operational()


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Positive = Annotated[int, Field(ge=1, le=10**12)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def one_or_range(key: str, value: Any) -> tuple[int, ...]:
    """What a key that takes one number or `[least, most]` was given, as a tuple of either length.

    Raises:
        ConfigError: if it is something else; the bounds are the caller's to check.
    """
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(type(n) is not int for n in numbers) or (numbers is value and len(numbers) != 2):
        raise ConfigError(f"{key}: input should be a number or [least, most], not {value!r}")
    return tuple(numbers)
