"""Rank 0's pen: what happens inside a run, with the documents of the batch that it happened to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.errors import ArtifactError
from cluster.journal import Journal
from cluster.telemetry import Row
from pipelines.data import lineage
from pipelines.data.corpus import Corpus
from pipelines.training.sampler import order_of

MOST_DOCUMENTS = 100
"""In one event; a batch may come from thousands."""


@dataclass(frozen=True)
class Suspects:
    """The documents that a global batch was packed from."""

    config: RunConfig
    corpus: Corpus

    def of(self, batch: int) -> list[str]:
        """Their places, of the batch of this number."""
        train = self.config.train
        if train.input == "stream":
            return ["unknown (rows of a stream come in no order that could be followed)"]
        order = order_of(self.corpus.row_groups("train"), self.config)
        positions = range(batch * train.global_batch, (batch + 1) * train.global_batch)
        try:
            return lineage.documents(self.corpus, "train", {order.at(p).id for p in positions})
        except ArtifactError as error:
            return [f"unknown ({error})"]


class Diary:
    """Writes each event once: a step that is done again after a restart is no second event.

    Args:
        writes: whether this rank does.
    """

    def __init__(self, journal: Journal, suspects: Suspects, *, writes: bool) -> None:
        self._journal, self._suspects, self._writes = journal, suspects, writes
        events = list(journal.events()) if writes else []
        self._written = {_key(event.name, event.fields) for event in events}
        self.began = events[0].nanoseconds / 1e9 if events else time.time()
        """Unix time of the run's first event."""

    def tell(self, event: str, **fields: Any) -> None:
        if self._writes:
            self._journal.write(event, **fields)

    def tell_of(self, event: str, row: Row, **fields: Any) -> None:
        """An event of a step, with the documents of its batch, unless it is written already."""
        about = {"step": int(row["step"]), "batch": int(row["batch"])}
        if not self._writes or _key(event, about) in self._written:
            return
        self._written.add(_key(event, about))
        found = self._suspects.of(about["batch"])
        self._journal.write(
            event,
            **about,
            loss=row["loss"],
            gradient_norm=row["gradient_norm"],
            **fields,
            documents=found[:MOST_DOCUMENTS],
            documents_in_batch=len(found),
        )

    def diagnosis(self, reason: str, row: Row) -> str:
        """For the person who runs it."""
        return f"step {row['step']:.0f}: {reason}; {named(self._suspects.of(int(row['batch'])))}"


def named(documents: list[str]) -> str:
    """The first few of them, and how many there are."""
    shown = ", ".join(documents[:5])
    return f"its batch is made of {len(documents)} documents: {shown}" + (
        ", ... (`heliostat journal` names more)" if len(documents) > 5 else ""
    )


def _key(event: str, fields: Mapping[str, Any]) -> tuple[str, Any, Any]:
    return event, fields.get("step"), fields.get("batch")
