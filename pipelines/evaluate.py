"""STAGE evaluate: measure the trained model on held-out rows, and draw how it got there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import UsageError
from cluster.placement import Room, run_on_one_node
from cluster.session import open_store, session
from cluster.stages import BY_VERB, StageResult, fingerprint, required, resolved
from cluster.storage import Artifact, Store
from cluster.telemetry import start_board
from pipelines.evaluation.trained import Trained

if TYPE_CHECKING:
    from pipelines.families.base import Batch

Tick = Callable[[int], None]
"""Told how many rows are done."""


@dataclass(frozen=True)
class Report:
    """What the task sends back: plain data."""

    metrics: dict[str, float]
    headline: str
    text: str
    figures: dict[str, bytes]
    """File stem -> PNG."""


def run(config: RunConfig) -> StageResult:
    """Measure the newest finished checkpoint.

    Raises:
        UsageError: if there is no checkpoint, or its corpus holds nothing out.
    """
    store = open_store(config)
    checkpoint = required("evaluate", store, config)
    trained = Trained.open(checkpoint, config)
    if not trained.heldout_rows:
        raise UsageError(
            f"{trained.corpus.artifact.id} holds no rows out to evaluate on: raise "
            f"data.heldout_fraction above {trained.config.data.heldout_fraction:g} and prepare "
            "again under a new name"
        )
    with session(config):
        report = _measure_on_cluster(config, trained)
    artifact = _commit(store, config, trained, report)
    progress.say(report.text)
    return StageResult(artifact, report.headline, report.metrics)


def measure(trained: Trained, device: str, tick: Tick) -> Report:
    """Evaluate on this machine."""
    from pipelines.evaluation import plots
    from pipelines.families.base import EvaluationJob
    from pipelines.training.checkpoint import read_history

    corpus = trained.corpus
    with corpus.artifact.local("encoder/") as encoder_folder:
        job = EvaluationJob(
            config=trained.config,
            facts=corpus.facts,
            model=trained.model().to(device),
            untrained=lambda: trained.untrained().to(device),
            batches=lambda: _counted(trained, device, tick),
            encoder_folder=encoder_folder,
            heldout_bytes=corpus.bytes("heldout"),
        )
        evaluation = trained.family.evaluate(job)
    drawings = dict(evaluation.plots)
    history = read_history(trained.checkpoint)
    if history:
        drawings["curves"] = plots.curves(history, evaluation.metrics.get("loss"))
    figures = {stem: plots.png(draw) for stem, draw in drawings.items()}
    return Report(evaluation.metrics, evaluation.headline, evaluation.text, figures)


def _counted(trained: Trained, device: str, tick: Tick) -> Iterator[Batch]:
    done = 0
    for batch in trained.batches(device):
        yield batch
        done += len(next(iter(batch.values())))
        tick(done)


def _measure_on_cluster(config: RunConfig, trained: Trained) -> Report:
    import ray

    board = start_board()
    with progress.bar("evaluate", trained.heldout_rows, "rows") as bar:

        def follow() -> None:
            _, rows = ray.get(board.since.remote(0))
            if rows:
                bar.update(int(rows[-1]["step"]))

        checkpoint = trained.checkpoint
        source = (checkpoint.store.uri, checkpoint.name, checkpoint.version)
        report: Report = run_on_one_node(_task, source, config, board, gpu=True, follow=follow)
    return report


def _task(room: Room, source: tuple[str, str, int], config: RunConfig, board: Any) -> Report:
    import torch

    torch.set_num_threads(room.cpus)
    root, name, version = source
    checkpoint = Store(root).artifact("checkpoint", name, version)
    trained = Trained.open(checkpoint, config)
    return measure(
        trained, room.device, lambda done: board.put.remote([{"step": done, "total": 0.0}])
    )


def _commit(store: Store, config: RunConfig, trained: Trained, report: Report) -> Artifact:
    checkpoint, corpus = trained.checkpoint, trained.corpus.artifact
    title = f"# {checkpoint.id}\n\nHeld-out rows of {corpus.id}.\n\n"
    pictures = "".join(f"\n\n![{stem}]({stem}.png)" for stem in report.figures)
    staging = store.stage("evaluation", config.name)
    try:
        files = [
            staging.write("report.md", f"{title}{report.text}{pictures}\n".encode()),
            staging.write_json("report.json", report.metrics),
            *(staging.write(f"{stem}.png", raw) for stem, raw in report.figures.items()),
        ]
        return staging.commit(
            files,
            fingerprint=fingerprint(BY_VERB["evaluate"], config, checkpoint, {}),
            config=resolved(config),
            parents=(checkpoint, corpus),
            metrics=report.metrics,
            detail={"headline": report.headline},
        )
    except BaseException:
        staging.abandon()
        raise
