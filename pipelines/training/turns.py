"""The trials of a search one after another, in the same processes: starting those costs seconds."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from pipelines.training.loop import join_world, train
from pipelines.training.trial import next_job

if TYPE_CHECKING:
    import torch


def train_in_turn(board: Any, config: RunConfig) -> None:
    """Train the trials of a search one after another, in the same processes.

    Args:
        board: a `trial.Gate`, which hands them out.
        config: of any of them, which have threads and workers in common.
    """
    world = join_world(config)
    while (job := next_job(board, world)) is not None:
        train(replace(job, board=board))
        if world.first:
            board.finish.remote()
        _forget_all(world.device)


def _forget_all(device: torch.device) -> None:
    """What a trial leaves in memory is not the next one's."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
