"""Real gloo processes without Ray: what a test says about ranks, it says about real ones."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipelines.training.engine import World

TIMEOUT_SECONDS = 400
# A process that forks from one that has imported these starts in a moment.
PRELOAD = ["torch", "deepspeed", "transformers.models.auto.modeling_auto", "pyarrow.parquet"]


def launch(ranks: int, work: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """`work(world, *arguments, **named)` on that many ranks; what each returned, by rank.

    Args:
        work: a function of an importable module.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_enter, args=(rank, ranks, folder, work, arguments, named))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_SECONDS)
        for process in processes:
            if process.is_alive():
                process.kill()
        failures = [p.read_text() for p in sorted(Path(folder).glob("*.error"))]
        assert not failures, failures[0]
        assert [process.exitcode for process in processes] == [0] * ranks
        return [pickle.loads((Path(folder) / f"{rank}.out").read_bytes()) for rank in range(ranks)]


def _enter(
    rank: int,
    ranks: int,
    folder: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    import torch
    import torch.distributed as dist

    # DeepSpeed looks for MPI where one of these is missing; the rendezvous is a file.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        result = work(World(rank, ranks, torch.device("cpu")), *arguments, **named)
        (Path(folder) / f"{rank}.out").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}\n{traceback.format_exc()}")
        raise
    dist.barrier()
    dist.destroy_process_group()
