"""What all sections share: frozen, strict, unknown keys refused."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


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
