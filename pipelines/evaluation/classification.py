"""How well a classifier names held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluation import plots
from pipelines.families.base import Evaluation, EvaluationJob

MOST_ROWS = 50
"""Classes that the report lists; the weakest of them where there are more."""


@dataclass(frozen=True)
class Measured:
    nats: float
    """Sum of the cross entropy over the examples."""
    confusion: np.ndarray
    """Counts [true class, predicted class]."""

    @property
    def examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion)) / self.examples

    @property
    def recalls(self) -> np.ndarray:
        """Share of each true class that was found; NaN for one without examples."""
        found = self.confusion.sum(axis=1)
        return np.divide(
            np.diag(self.confusion), found, out=np.full(len(found), np.nan), where=found > 0
        )


def evaluate(job: EvaluationJob) -> Evaluation:
    """Accuracy, recall per class, mean loss and the confusion matrix."""
    measured, labels = measure(job), list(map(str, job.facts["labels"]))
    recalls = measured.recalls
    metrics = {
        "accuracy": measured.accuracy,
        "loss": measured.nats / measured.examples,
        "mean_recall": float(np.nanmean(recalls)),
        "worst_recall": float(np.nanmin(recalls)),
        "measured_examples": float(measured.examples),
    }
    return Evaluation(
        metrics,
        f"accuracy {measured.accuracy:.3f}",
        _text(measured, labels),
        {"confusion": plots.confusion(measured.confusion, labels)},
    )


def measure(job: EvaluationJob) -> Measured:
    """One pass over the held-out batches; all but `labels` (class numbers) goes to the model."""
    import torch
    import torch.nn.functional as F  # noqa: N812 (the name that all of PyTorch's users know)

    classes = len(job.facts["labels"])
    confusion, nats = np.zeros((classes, classes), dtype=np.int64), 0.0
    model: Any = job.model
    with torch.inference_mode():
        for batch in job.batches():
            truth = batch["labels"]
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            logits = model(**inputs).logits.float()
            nats += float(F.cross_entropy(logits, truth, reduction="sum"))
            np.add.at(confusion, (truth.cpu().numpy(), logits.argmax(-1).cpu().numpy()), 1)
    return Measured(nats, confusion)


def _text(measured: Measured, labels: Sequence[str]) -> str:
    recalls, found = measured.recalls, measured.confusion.sum(axis=1)
    order = [place for place in np.argsort(recalls, kind="stable") if found[place]]
    listed = sorted(order[:MOST_ROWS])
    right = int(np.trace(measured.confusion))
    lines = [
        "## Held-out examples",
        "",
        f"{right:,} of {measured.examples:,} right: accuracy {measured.accuracy:.4f}, mean loss "
        f"{measured.nats / measured.examples:.4f} nats.",
        "",
        f"| {'class':<12} | recall | examples | most often taken for |",
        f"|:{'-' * 12}-|-------:|---------:|:---------------------|",
    ]
    for place in listed:
        mistaken = _mistaken(measured.confusion, int(place), labels)
        lines.append(
            f"| {labels[place]:<12} | {recalls[place]:6.3f} | {found[place]:8d} | {mistaken:<20} |"
        )
    if len(order) > len(listed):
        lines += ["", f"The {len(listed)} weakest of {len(order)} classes."]
    return "\n".join(lines)


def _mistaken(confusion: np.ndarray, place: int, labels: Sequence[str]) -> str:
    row = confusion[place].copy()
    row[place] = 0
    other = int(row.argmax())
    return f"{labels[other]} ({row[other]})" if row[other] else ""
