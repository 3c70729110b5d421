"""`data.privacy`: which personal data is taken out of text, and what stands in its place."""

from typing import Annotated, Literal

from pydantic import Field

from cluster.config.base import Section

PersonalType = Literal[
    "email",
    "phone",
    "card",
    "iban",
    "national_id",
    "ip",
    "mac",
    "url",
    "key",
    "private_key",
    "birth_date",
    "address",
]
ALL_TYPES: tuple[PersonalType, ...] = PersonalType.__args__  # type: ignore[attr-defined]
Style = Literal["numbered", "plain"]
Region = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class PrivacySection(Section):
    """How text is de-identified. Names of people are found by `ner` only."""

    apply: Literal["auto", "always", "never"] = "auto"
    """`auto`: to every source but builtin corpora, which are public already."""
    types: Annotated[tuple[PersonalType, ...], Field(min_length=1)] = ALL_TYPES
    """What is looked for."""
    style: Style = "numbered"
    """`[EMAIL_1]`, numbered inside each document so that equal values stay equal; or `[EMAIL]`."""
    phone_regions: tuple[Region, ...] = (
        *("US", "GB", "DE", "FR", "ES", "IT", "NL", "BE", "CH", "AT", "PL", "PT"),
        *("CN", "IN", "BR", "MX", "JP", "AU"),
    )
    """Countries whose phone numbers are known without their `+` and country code."""
    ner: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`import.path:function` that finds names: from a text, (start, end, type) of each."""
