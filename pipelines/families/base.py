"""What a model family is: everything in which language models and image classifiers differ.

No stage asks which family it serves; it calls these. A family's model knows nothing of Ray,
DeepSpeed or ranks, and importing this module imports no torch.

The way of the data: sources yield *documents* (Arrow tables, columns below), an `Encoder` turns
them into *rows* of a fixed size, `example` turns a row into arrays, `collate` into a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from matplotlib.figure import Figure

    from cluster.config import RunConfig

Payload = Literal["text", "image"]
"""Columns of a document table: `document` int64 (its id), `path` string, `digest` binary[16], and
    text:  `text` string
    image: `pixels` binary (uint8, row-major [height, width, channels]), `height`, `width`,
           `channels` int32, `label` string
"""

Row = Mapping[str, Any]
"""One row of a corpus: column name -> numpy scalar or array."""
Example = dict[str, np.ndarray]
Batch = dict[str, "torch.Tensor"]
Facts = Mapping[str, Any]
"""What an encoder found out and a model needs: `vocab_size`, `labels`, ... Plain JSON."""
IGNORED = -100
"""Label of a position that is not predicted (padding), as PyTorch's cross entropy has it."""


class Encoder(Protocol):
    """Documents to rows. Picklable: it travels to the workers of Ray Data."""

    def facts(self) -> dict[str, Any]: ...

    def encode(self, documents: pa.Table) -> pa.Table:
        """Rows of one partition and split, in order. Pure: the same table gives the same rows.

        Every row table has an int64 column or list column naming the documents that it came from.
        Its schema's metadata may hold `counts`, JSON: name -> number that `prepare` adds up and
        reports, such as `tokens` and `padding`.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write what a published model needs beside its weights (tokenizer, preprocessor)."""
        ...


@dataclass(frozen=True)
class EvaluationJob:
    """What a family gets to evaluate itself with."""

    config: RunConfig
    facts: Facts
    model: torch.nn.Module
    """The trained model in fp32, evaluation mode, on `device`."""
    untrained: Callable[[], torch.nn.Module]
    """The same architecture as it was before the first step."""
    batches: Callable[[], Iterator[Batch]]
    """Held-out batches in order, on `device`."""
    encoder_folder: Path
    heldout_bytes: int
    """Size of the held-out documents as UTF-8 text; 0 for images."""


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    headline: str
    """The key figure in a few words, such as `1.92 bits per byte`."""
    text: str
    """A report for a person: Markdown."""
    plots: dict[str, Callable[[Figure], None]] = field(default_factory=dict)
    """File stem -> what draws it."""


class Predictor(Protocol):
    """A published model that answers batches (families that do not generate)."""

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """One answer per input, in order.

        Raises:
            ValueError: naming the input that cannot be used, and why.
        """
        ...


class Family(Protocol):
    name: str
    payload: Payload
    route: Literal["completions", "classify"]
    """How it is served."""

    # --- prepare
    def fit_encoder(self, config: RunConfig, sample: pa.Table, labels: Sequence[str]) -> Encoder:
        """Learn what encoding needs from a sample of cleaned training documents.

        Args:
            labels: every label of the training documents, sorted; empty for text.
        """
        ...

    # --- plan
    def expected_facts(self, config: RunConfig) -> Facts:
        """What `fit_encoder` is expected to find out, where no data has been seen yet."""
        ...

    def blank(self, config: RunConfig, facts: Facts, rows: int) -> Batch:
        """A batch of the right shapes and types, without meaning."""
        ...

    # --- pretrain
    def build_model(self, config: RunConfig, facts: Facts) -> torch.nn.Module:
        """A stock Hugging Face model, freshly initialised from torch's global generator."""
        ...

    def example(
        self, config: RunConfig, facts: Facts, row: Row, rng: np.random.Generator | None
    ) -> Example:
        """Arrays of one row. Pure; random choices come from `rng`, which is keyed by seed, epoch
        and sample id. None means evaluation: nothing random."""
        ...

    def collate(self, examples: Sequence[Example]) -> Batch: ...

    def count(self, batch: Batch) -> int:
        """Predictions that the batch's loss sums over."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Scalar: the sum of the loss over the batch's predictions, in nats, fp32."""
        ...

    def flops_per_prediction(self, config: RunConfig, facts: Facts) -> float | None:
        """Of forward and backward pass, by the model's formula, recomputation left out. None where
        the family has no formula; there is no utilisation to show then."""
        ...

    # --- evaluate, publish, serve
    def evaluate(self, job: EvaluationJob) -> Evaluation: ...

    def export(
        self, config: RunConfig, model: torch.nn.Module, encoder_folder: Path, target: Path
    ) -> dict[str, str]:
        """Write Hugging Face layout (safetensors only) into an empty folder.

        Returns:
            Fields of the model card's YAML head: `pipeline_tag`, `library_name`, ...
        """
        ...

    def reopen(self, folder: Path) -> torch.nn.Module:
        """Open a published folder the way any user would (`from_pretrained`)."""
        ...

    def predictor(self, folder: Path) -> Predictor:
        """
        Raises:
            TypeError: for a family that generates (its `route` is `completions`).
        """
        ...


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
