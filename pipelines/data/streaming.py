"""Ray Data as `prepare` uses it: one block per partition, small answers to the driver."""

import functools
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

from cluster.errors import HeliostatError

Work = TypeVar("Work")
Answer = TypeVar("Answer")


def over_partitions(
    work: Sequence[Work], task: Callable[[Work], Answer], tasks: int
) -> Iterator[Answer]:
    """Stream pieces of work through Ray Data tasks; answers come in any order.

    Args:
        task: called once per piece, in a worker. Its errors of ours come out here as themselves.
        tasks: most that run at once; 0 for what the cluster has room for.
    """
    import ray.data

    # Not `from_arrow`, which starts a task for each block to ask for its size.
    blocks = [pa.table({"work": [pickle.dumps(piece)]}) for piece in work]
    answers = ray.data.from_blocks(blocks).map_batches(
        functools.partial(_run_block, task=task),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=tasks or None),
    )
    for block in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for answer in map(pickle.loads, block.column("answer").to_pylist()):
            if isinstance(answer, HeliostatError):
                raise answer
            yield answer


@contextmanager
def set_up(labels: Mapping[str, str]) -> Iterator[None]:
    """Quiet, because Ray Data logs its plans and draws bars of its own, where the stage has one.

    Args:
        labels: of the nodes that its tasks may run on.
    """
    from ray.data import DataContext

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, log.level, context.execution_options.label_selector
    context.enable_progress_bars = False
    context.execution_options.label_selector = dict(labels) or None
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        context.execution_options.label_selector = before[2]
        log.setLevel(before[1])


def _run_block(block: pa.Table, *, task: Callable[[Work], Answer]) -> pa.Table:
    answers = [_attempt(task, pickle.loads(raw)) for raw in block.column("work").to_pylist()]
    return pa.table({"answer": pa.array(map(pickle.dumps, answers), pa.binary())})


def _attempt(task: Callable[[Work], Answer], piece: Work) -> Answer | HeliostatError:
    """Ray would wrap an error in one of its own and print both tracebacks."""
    try:
        return task(piece)
    except HeliostatError as error:
        return error
