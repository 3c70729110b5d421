"""Errors that end a run on all ranks at once.

A rank that raised alone would leave the others in a collective that it never joins.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import HeliostatError
from pipelines.training.engine import World


def agree(problem: HeliostatError | None, world: World) -> None:
    """Raise on every rank what went wrong on any. Collective.

    Raises:
        HeliostatError: the first rank's that has one.
    """
    import torch
    import torch.distributed as dist

    count = torch.tensor([float(problem is not None)], device=world.device)
    dist.all_reduce(count)
    if not count.item():
        return
    problems: list[HeliostatError | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise found if rank == world.rank else type(found)(f"rank {rank}: {found}")


@contextmanager
def agreed(world: World) -> Iterator[None]:
    """What one rank fails in here, all fail in. Collective at its end."""
    problem: HeliostatError | None = None
    try:
        yield
    except HeliostatError as error:
        problem = error
    agree(problem, world)
