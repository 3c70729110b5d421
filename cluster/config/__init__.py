"""The whole schema of a recipe. Frozen, strict, described field by field; no heavy imports.

A stage's function takes `RunConfig`; everything below it takes its own section.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config.augment import MASK
from cluster.config.base import OPERATIONAL, Section
from cluster.config.data import Data, ImageData, PrepareSection, TextData
from cluster.config.dedup import DecontaminateSection, DedupSection
from cluster.config.model import LlamaModel, Model, ResNetModel
from cluster.config.serve import ServeSection
from cluster.config.stages import (
    EvaluateSection,
    PublishSection,
    RaySection,
    RegistrySection,
    StorageSection,
)
from cluster.config.train import TrainSection
from cluster.config.tune import TuneSection
from cluster.errors import ConfigError

# family -> the data and model kinds that it works with
FAMILIES: dict[str, tuple[str, str]] = {
    "causal_lm": ("text", "llama"),
    "image_classifier": ("image", "resnet"),
}
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class RunConfig(Section):
    name: Name
    """Name of the artifacts that the recipe makes."""
    description: Annotated[str, OPERATIONAL] = ""
    """One line for `heliostat recipes`."""
    family: Literal["causal_lm", "image_classifier"]
    """What kind of model this is."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1337
    """Starts every random choice: initial weights, order of the data, augmentation."""
    fresh: Annotated[bool, OPERATIONAL] = False
    """Make new versions even where finished ones exist (`--fresh`)."""
    storage: StorageSection = StorageSection()
    ray: RaySection = RaySection()
    prepare: PrepareSection = PrepareSection()
    data: Data
    model: Model
    train: TrainSection = TrainSection()
    tune: TuneSection = TuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    publish: PublishSection = PublishSection()
    registry: RegistrySection = RegistrySection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _batch_divides(self) -> "RunConfig":
        train = self.train
        for size in train.world_sizes:
            if train.global_batch % size:
                raise ConfigError(
                    f"train.global_batch {train.global_batch} does not divide by "
                    f"{_named(size, train)}: {_nearest_batches(train)}"
                )
            share = train.global_batch // size
            if train.micro_batch and share % train.micro_batch:
                raise ConfigError(
                    f"a worker's share of the batch, {share} rows, does not divide by "
                    f"train.micro_batch {train.micro_batch}"
                )
        return self

    @model_validator(mode="after")
    def _master_copy(self) -> "RunConfig":
        if self.train.precision in ("bf16", "fp16") and self.train.zero_stage == 0:
            raise ConfigError(
                f"train.precision {self.train.precision} needs train.zero_stage 1 or more, which "
                "keeps the fp32 master copy: take zero_stage 1, or precision autocast"
            )
        return self

    @model_validator(mode="after")
    def _family_can(self) -> "RunConfig":
        if self.family == "image_classifier":
            for key in ("loss_chunk", "activation_checkpointing"):
                if getattr(self.train, key):
                    raise ConfigError(f"family image_classifier knows no train.{key}: leave it out")
        if self.train.input == "stream" and self.data.kind != "text":
            raise ConfigError(f"train.input stream is for text, and {self.family} takes images")
        if self.train.augment.on and self.data.kind != "text":
            raise ConfigError(f"train.augment is for text: {self.family} has data.shift and rotate")
        return self

    @model_validator(mode="after")
    def _can_be_streamed(self) -> "RunConfig":
        if self.train.input == "stream":
            if self.data.encrypt:
                raise ConfigError(
                    "train.input stream hands rows over in the clear, so that data.encrypt would "
                    "promise too much: store the corpus, or leave data.encrypt out"
                )
            if self.data.kind == "text" and (self.data.dedup.near or self.data.dedup.lines):
                raise ConfigError(
                    "train.input stream never sees the corpus as a whole, which data.dedup.near "
                    "and lines compare: store the corpus, or leave them out"
                )
            if self.data.kind == "text" and self.data.asks_all_rows:
                raise ConfigError(
                    "train.input stream never sees all rows of a table, which columns.outliers "
                    "asks: store the corpus, or give columns.bounds"
                )
        return self

    @model_validator(mode="after")
    def _mask_is_known(self) -> "RunConfig":
        if not self.train.augment.mask or self.data.kind != "text":
            return self
        if not self.data.tokenizer.path and MASK not in self.data.tokenizer.special_tokens:
            raise ConfigError(
                f"train.augment.mask needs a tokenizer that has {MASK}: give "
                f"data.tokenizer.special_tokens='[\"{MASK}\"]'"
            )
        return self

    @model_validator(mode="after")
    def _mix_names_sources(self) -> "RunConfig":
        for name in sorted(set(self.train.mix) - set(self.data.sources)):
            raise ConfigError(
                f"train.mix names {name}, which is none of data.sources: write it as there"
            )
        if not any(self.train.mix.get(source, 1) for source in self.data.sources):
            raise ConfigError("train.mix leaves no source: give one of them more than 0")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "RunConfig":
        if self.train.warmup_steps >= self.train.steps:
            raise ConfigError(
                f"train.warmup_steps {self.train.warmup_steps} must be below train.steps "
                f"{self.train.steps}"
            )
        return self


def _named(size: int, train: TrainSection) -> str:
    if isinstance(train.workers, int):
        return f"train.workers {size}"
    return f"{size}, which train.workers {list(train.workers)} allows"


def _nearest_batches(train: TrainSection) -> str:
    """The next batches below and above that divide by every allowed number of workers."""
    unit = 1
    for size in train.world_sizes:
        unit = math.lcm(unit, size)
        if unit > 1000 * train.global_batch:
            return f"take a narrower range, no batch below {unit} divides by all of it"
    below = train.global_batch // unit * unit
    return "take " + " or ".join(str(batch) for batch in (below, below + unit) if batch)


__all__ = [
    "FAMILIES",
    "OPERATIONAL",
    "DecontaminateSection",
    "DedupSection",
    "EvaluateSection",
    "ImageData",
    "LlamaModel",
    "ResNetModel",
    "RunConfig",
    "ServeSection",
    "TextData",
    "TrainSection",
    "TuneSection",
]
