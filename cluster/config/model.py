"""`model`: the architecture, always a stock Hugging Face config."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config.base import Positive, Section
from cluster.errors import ConfigError


class LlamaModel(Section):
    """Decoder-only transformer (transformers `LlamaConfig`)."""

    kind: Literal["llama"] = "llama"
    """Follows from `family`; need not be given."""
    hidden_size: Positive = 192
    """Width of the residual stream; divides by `heads`."""
    layers: Positive = 4
    """Transformer blocks."""
    heads: Positive = 4
    """Query heads."""
    kv_heads: Positive = 4
    """Fewer than `heads` shares each key and value head among several query heads."""
    intermediate_size: Positive = 512
    """Width inside the gated feed-forward layer."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary position angles; larger suits longer sequences."""
    initializer_range: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of the initial weights."""
    tie_embeddings: bool = True
    """Use the token embedding as the output layer too."""
    document_masking: bool = False
    """Let no token attend to another document of its row: each is predicted as if it stood alone,
    and rotary positions start anew with it. Off, because attention then takes a mask of
    `sequence_length` squared per row in place of the causal kernel. Worth it where documents are
    short beside `sequence_length`, and for long contexts."""

    @model_validator(mode="after")
    def _divides(self) -> "LlamaModel":
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} does not divide by model.heads "
                f"{self.heads}: take {self.hidden_size // self.heads * self.heads or self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads {self.heads} does not divide by model.kv_heads {self.kv_heads}"
            )
        return self


class ResNetModel(Section):
    """Convolutional network (transformers `ResNetConfig`)."""

    kind: Literal["resnet"] = "resnet"
    """Follows from `family`; need not be given."""
    embedding_size: Positive = 32
    """Channels after the first convolution."""
    hidden_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32, 64)
    """Channels of each stage."""
    depths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1)
    """Residual blocks of each stage."""
    layer_type: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions to a block, or 1x1, 3x3, 1x1 with a narrow middle."""
    downsample_in_first_stage: bool = False
    """Halve the image in the first stage already, as later stages always do."""

    @model_validator(mode="after")
    def _same_length(self) -> "ResNetModel":
        if len(self.hidden_sizes) != len(self.depths):
            raise ConfigError(
                f"model.hidden_sizes has {len(self.hidden_sizes)} stages and model.depths "
                f"{len(self.depths)}: give one depth per stage"
            )
        return self


Model = Annotated[LlamaModel | ResNetModel, Field(discriminator="kind")]
