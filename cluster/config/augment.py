"""`train.augment`: random changes to training rows of text."""

from typing import Annotated

from pydantic import Field

from cluster.config.base import Section

Share = Annotated[float, Field(ge=0, le=0.9)]
MASK = "<|mask|>"
"""The control token that stands for a hidden one."""


class AugmentSection(Section):
    """Shares of a row's tokens, drawn anew in each epoch; end-of-text is left alone."""

    delete: Share = 0.0
    """Left out of the text."""
    swap: Share = 0.0
    """Exchanged with the token after them."""
    mask: Share = 0.0
    """Shown to the model as `<|mask|>`; what is predicted stays. Takes a tokenizer that has it:
    `data.tokenizer.special_tokens='["<|mask|>"]'`."""
    replace: Share = 0.0
    """Shown to the model as another token; what is predicted stays (Xie et al.,
    arXiv:1703.02573)."""
    noise: Share = 0.0
    """Shown to the model as a random byte; what is predicted stays."""

    @property
    def on(self) -> bool:
        return self != AugmentSection()
