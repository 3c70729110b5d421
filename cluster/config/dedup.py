"""`data.dedup` and `data.decontaminate`: what is said more than once, and what a test will ask."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config.base import Fraction, Section
from cluster.errors import ConfigError


class DedupSection(Section):
    """Exact copies always go; the smallest document id of a cluster stays."""

    near: bool = False
    """Drop documents that are nearly the same as another, too (MinHash-LSH)."""
    ngram: Annotated[int, Field(ge=1, le=64)] = 5
    """Words of a shingle; of a script without spaces, characters."""
    permutations: Annotated[int, Field(ge=8, le=1024)] = 112
    """Length of a signature: the similarity of two documents is told to within 1 / (2 sqrt(n))."""
    bands: Annotated[int, Field(ge=1, le=1024)] = 16
    """Two documents are compared if all rows of one band agree; must divide `permutations`."""
    threshold: Fraction = 0.7
    """Jaccard similarity, as the signatures tell it, from which two documents are the same."""

    lines: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Documents that may hold the same line; one that more hold stays only in the first of them;
    0 leaves all lines where they are."""
    unit: Literal["line", "paragraph"] = "line"
    """What counts as a line: paragraphs end with an empty line."""
    unit_characters: Annotated[int, Field(ge=1, le=10**6)] = 30
    """Shorter lines may be as frequent as they like: brackets, headings, `return None`."""

    @model_validator(mode="after")
    def _bands_divide(self) -> "DedupSection":
        if self.permutations % 2 or self.permutations % self.bands:
            unit = self.bands * (1 + self.bands % 2)
            nearest = max(unit, round(self.permutations / unit) * unit)
            raise ConfigError(
                f"data.dedup.permutations {self.permutations} must be even and divide by "
                f"data.dedup.bands {self.bands}: take {nearest} permutations"
            )
        return self


class DecontaminateSection(Section):
    """Training text that holds pieces of evaluation sets."""

    sources: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Files and folders of evaluation sets: every string in their rows is looked for."""
    ngram: Annotated[int, Field(ge=3, le=200)] = 13
    """Words that a document must share, one after the other; of a script without spaces, twice as
    many characters."""
    action: Literal["drop", "report"] = "drop"
    """What becomes of such a document; where it overlaps is reported either way."""
