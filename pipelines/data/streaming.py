"""Ray Data as `prepare` uses it: one block per partition, small answers to the driver."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from cluster.errors import HeliostatError


def over_partitions(
    work: Sequence[pa.Table], task: Callable[[pa.Table], pa.Table], tasks: int
) -> Iterator[dict[str, Any]]:
    """Stream one-row tables through Ray tasks, one to a block; answers come in any order.

    Args:
        tasks: most that run at once; 0 for what the cluster has room for.
    """
    import ray.data

    blocks = ray.data.from_arrow(list(work)).map_batches(
        task,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=tasks or None),
    )
    for table in blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


@contextmanager
def quiet() -> Iterator[None]:
    """Ray Data logs its plans and draws bars of its own; this stage has one bar."""
    from ray.data import DataContext

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        log.setLevel(before[1])


@contextmanager
def own_errors() -> Iterator[None]:
    """Let an error of ours come out of a Ray task as itself."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and type(cause) not in _ours():
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None and cause is not error:
            raise cause from None
        raise


def _ours(base: type[HeliostatError] = HeliostatError) -> set[type]:
    """The exception tree; Ray's own mixtures with it are not among them."""
    return {base}.union(*(_ours(child) for child in base.__subclasses__()))


def packed(table: pa.Table) -> bytes:
    """A table as one value, to travel in a cell of another."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpacked(raw: bytes) -> pa.Table:
    return pa.ipc.open_stream(raw).read_all()
