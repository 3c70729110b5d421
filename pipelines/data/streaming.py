"""Ray Data as `prepare` uses it: a few partitions to a block, small answers to the driver."""

import copy
import functools
import logging
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa

from cluster.errors import HeliostatError

Work = TypeVar("Work")
Answer = TypeVar("Answer")

MOST_PIECES = 8
"""Of one Ray task: what a task costs beside its work is little for eight partitions."""
TELL_EVERY = 2.0
"""Seconds of work after which a task tells the answers that it has. Each telling wakes Ray Data's
loop and half a dozen of Ray's processes, on the cores that do the work."""


def over_partitions(
    work: Sequence[Work],
    task: Callable[[Work], Answer],
    tasks: int,
    sizes: Sequence[int] | None = None,
) -> Iterator[Answer]:
    """Stream pieces of work through Ray Data tasks; answers come in any order.

    Args:
        task: called once per piece, in a worker. Its errors of ours come out here as themselves.
        tasks: most that run at once; 0 for what the cluster has room for.
        sizes: how much work each piece is, if they differ.
    """
    import ray.data

    slots = tasks or _cores()
    shares = portions(sizes or [1] * len(work), slots)
    # Not `from_arrow`, which starts a task for each block to ask for its size.
    blocks = [
        pa.table({"work": [pickle.dumps(work[share.start : share.stop])]}) for share in shares
    ]
    answers = ray.data.from_blocks(blocks).map_batches(
        functools.partial(_run_block, task=task),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=tasks or None),
    )
    for block in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for told in map(pickle.loads, block.column("answers").to_pylist()):
            for answer in told:
                if isinstance(answer, HeliostatError):
                    raise answer
                yield answer


def portions(sizes: Sequence[int], slots: int) -> list[range]:
    """Runs of pieces that one task works on, in order: many while much is left, one by one in the
    end, so that all slots are done at about the same time (guided self-scheduling, Polychronopoulos
    and Kuck 1987, with half of a slot's share).

    Args:
        slots: tasks that run at once.
    """
    left, begin = sum(sizes), 0
    found: list[range] = []
    while begin < len(sizes):
        share, end = left / (2 * slots), begin + 1
        took = sizes[begin]
        while end < len(sizes) and end - begin < MOST_PIECES and took + sizes[end] <= share:
            took += sizes[end]
            end += 1
        found.append(range(begin, end))
        left, begin = left - took, end
    return found


@contextmanager
def set_up(labels: Mapping[str, str]) -> Iterator[None]:
    """Quiet, because Ray Data logs its plans and draws bars of its own, where the stage has one.

    Args:
        labels: of the nodes that its tasks may run on.
    """
    from ray.data import DataContext, ExecutionResources

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    options, level = context.execution_options, log.level
    before = context.enable_progress_bars, context.target_max_block_size
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # what a task tells goes out at once
    context.execution_options = copy.copy(options)
    context.execution_options.label_selector = dict(labels) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Ray Data gives Ray only the tasks that have a core, and sees that one is done up to 0.2 s
        # late. With room for twice as many, the next one waits where the core becomes free: 0.03 s.
        context.execution_options.exclude_resources = ExecutionResources(cpu=-_cores())
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.target_max_block_size = before
        context.execution_options = options
        log.setLevel(level)


def _cores() -> int:
    """Of the cluster; 1 while it has no node, since it may get some."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _run_block(block: pa.Table, *, task: Callable[[Work], Answer]) -> Iterator[pa.Table]:
    (raw,) = block.column("work").to_pylist()
    answers: list[Answer | HeliostatError] = []
    told = time.monotonic()
    for piece in pickle.loads(raw):
        answers.append(_attempt(task, piece))
        if isinstance(answers[-1], HeliostatError):
            break
        if time.monotonic() - told > TELL_EVERY:
            yield _telling(answers)
            answers, told = [], time.monotonic()
    yield _telling(answers)


def _telling(answers: list[Any]) -> pa.Table:
    return pa.table({"answers": pa.array([pickle.dumps(answers)], pa.binary())})


def _attempt(task: Callable[[Work], Answer], piece: Work) -> Answer | HeliostatError:
    """Ray would wrap an error in one of its own and print both tracebacks."""
    try:
        return task(piece)
    except HeliostatError as error:
        return error
