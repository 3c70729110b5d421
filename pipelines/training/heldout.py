"""The loss on rows that a run does not train on, measured while it trains.

Every second row of the held-out split is for this; the others are left for whoever wants to confirm
what was chosen by these. Nothing random is drawn and nothing of the model changes but the buffers
that ranks keep apart (BatchNorm), which are averaged as they are for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from cluster.errors import UsageError
from pipelines.data.corpus import Corpus, Split
from pipelines.families.base import Batch, Family
from pipelines.training.sampler import RowReader
from pipelines.training.zero import micro_batch

if TYPE_CHECKING:
    from pipelines.training.engine import Engine, World

KEPT_GROUPS = 4
"""Row groups in memory while the rows are collected, which happens once."""


class HeldOut:
    """Some rows, cut over the ranks.

    Args:
        ids: sample ids in the split.
    """

    def __init__(
        self,
        config: RunConfig,
        family: Family,
        corpus: Corpus,
        world: World,
        ids: Sequence[int],
        split: Split = "heldout",
    ) -> None:
        self._config, self._family, self._corpus, self._world = config, family, corpus, world
        self._ids, self._split = ids, split

    def loss(self, engine: Engine) -> float:
        """Mean over the rows' predictions, nats. Collective."""
        import torch
        import torch.distributed as dist

        engine.average_buffers()
        told = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        engine.deepspeed.eval()
        try:
            with torch.no_grad():
                for batch, counted in self._batches:
                    there = {key: value.to(self._world.device) for key, value in batch.items()}
                    loss = self._family.loss(engine.deepspeed, there)
                    if counted:
                        told[0] += loss.double()
                        told[1] += self._family.count(batch)
        finally:
            engine.deepspeed.train()
        dist.all_reduce(told)
        return float(told[0]) / max(1.0, float(told[1]))

    @cached_property
    def _batches(self) -> list[tuple[Batch, bool]]:
        """This rank's batches, and whether they count: all ranks have as many forward passes, in
        which ZeRO stage 3 gathers parameters."""
        return [
            (self._family.collate([self._example(row) for row in own]), counted)
            for own, counted in shares(
                self._ids,
                self._world.rank,
                self._world.size,
                micro_batch(self._config.train, self._world.size),
            )
        ]

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self._corpus.row_groups(self._split), keep=KEPT_GROUPS)

    def _example(self, identity: int) -> Any:
        row = self._reader.row(identity)
        return self._family.example(self._config, self._corpus.facts, row, None)


def shares(
    ids: Sequence[int], rank: int, ranks: int, size: int
) -> Iterator[tuple[Sequence[int], bool]]:
    """A rank's rows in batches of up to `size`, and whether they count. As many for every rank: one
    that has no rows left takes the first ones again, which then do not count."""
    for start in range(0, len(ids), ranks * size):
        own = ids[start + rank * size : start + (rank + 1) * size]
        yield own or ids[:1], bool(own)


def chosen(corpus: Corpus, number: int, *, confirm: bool = False) -> list[int]:
    """Rows of the held-out split to measure on.

    Args:
        confirm: take those that are never chosen by.

    Raises:
        UsageError: if there are none.
    """
    rows = corpus.row_groups("heldout").starts[-1]
    # A single row has no other half.
    found = list(range(int(confirm and rows > 1), rows, 2))[:number]
    if not found:
        raise UsageError(
            f"{corpus.artifact.id} holds no rows out to measure on: raise data.heldout_fraction "
            "and prepare again under a new name"
        )
    return found
