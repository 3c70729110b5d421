"""`data.tokenizer`: how text becomes tokens."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config.base import Section
from cluster.errors import ConfigError

SpecialToken = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^\S+$")]


class TokenizerSection(Section):
    model: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """What is trained, always on bytes, so that any text comes back as it was. `bpe` merges the
    commonest pairs; `wordpiece` takes the longest known piece from the left; `unigram` the
    likeliest way to cut a word."""
    path: str = ""
    """Folder or URI of an existing fast tokenizer (`tokenizer.json`, `tokenizer_config.json`) that
    is used as it is; empty trains one."""
    special_tokens: tuple[SpecialToken, ...] = ()
    """Control tokens beside end-of-text, such as `<|mask|>`, at the end of the vocabulary; a
    document that spells one out never makes it."""

    @model_validator(mode="after")
    def _untouched(self) -> "TokenizerSection":
        if self.path and (self.model != "bpe" or self.special_tokens):
            given = "special_tokens" if self.special_tokens else "model"
            raise ConfigError(
                f"data.tokenizer.path takes a tokenizer as it is: leave out data.tokenizer.{given}"
            )
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ConfigError("data.tokenizer.special_tokens names one twice")
        return self
