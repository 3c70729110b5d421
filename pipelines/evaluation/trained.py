"""A finished checkpoint together with all that it takes to use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import ArtifactError
from cluster.stages import parent, resolved
from cluster.storage import Artifact
from pipelines import families
from pipelines.data.corpus import Corpus
from pipelines.families.base import Batch, Family, batched

if TYPE_CHECKING:
    import torch

OF_THE_CHECKPOINT = ("family", "seed", "data", "model", "train")
"""Sections that were decided when the model was trained."""


@dataclass(frozen=True)
class Trained:
    checkpoint: Artifact
    corpus: Corpus
    config: RunConfig
    """What the model was trained with; the later stages' sections are the caller's."""
    family: Family

    @staticmethod
    def open(checkpoint: Artifact, config: RunConfig) -> Trained:
        tree = resolved(config)
        tree |= {key: checkpoint.manifest.config[key] for key in OF_THE_CHECKPOINT}
        trained_with = loading.validate(tree)
        corpus = Corpus(parent(checkpoint, "corpus"))
        return Trained(checkpoint, corpus, trained_with, families.load(trained_with.family))

    @property
    def heldout_rows(self) -> int:
        """Rows that are measured: the split's, up to `evaluate.max_rows`."""
        return min(self.corpus.row_groups("heldout").starts[-1], self.config.evaluate.max_rows)

    def untrained(self) -> torch.nn.Module:
        """The model as it was before the first step: pretrain seeds in the same way."""
        import torch

        torch.manual_seed(self.config.seed)
        return self.family.build_model(self.config, self.corpus.facts).float().eval()

    def model(self) -> torch.nn.Module:
        """The trained model in fp32, evaluation mode, on the CPU.

        Raises:
            ArtifactError: if the checkpoint's weights are not those of its own config.
        """
        from pipelines.training.checkpoint import load_weights

        model = self.untrained()
        try:
            model.load_state_dict(load_weights(self.checkpoint))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{self.checkpoint.id} does not fit its config: {reason}") from None
        return model

    def batches(self, device: str = "cpu") -> Iterator[Batch]:
        """The measured held-out rows in order."""
        rows = islice(self.corpus.rows("heldout"), self.heldout_rows)
        for group in batched(rows, self.config.evaluate.batch):
            batch = self.family.collate(
                [self.family.example(self.config, self.corpus.facts, row, None) for row in group]
            )
            yield {name: tensor.to(device) for name, tensor in batch.items()}
