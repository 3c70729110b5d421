"""The training loops that `train_cpu.py` and `train_gpu.py` compare, and how they take turns.

Each loop lives in processes of its own that stay until the end. They run one *block* of steps at a
time, when they are told to, and wait otherwise, so that blocks of different loops alternate within
seconds and a busy neighbour on the machine disturbs all of them alike.

All of them train the same stock model from the same weights on the same batches in the same order
at the same rates and in the same precision, with AdamW (fused) and gradient clipping:

    plain       a loop as one would write it, batches ready in memory; DDP between ranks
    heliostat   `pipelines.training.loop.train` itself: reading and shuffling the corpus, recording,
                guarding and committing checkpoints, with DeepSpeed; only Ray around it is missing
    trainer     Hugging Face's Trainer, without saving and logging
"""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from spent import Profiler

from cluster import loading
from cluster.config import RunConfig, TextData
from cluster.stages import BY_VERB, fingerprint, resolved
from cluster.storage import Artifact, Store

STEPS = 10**6
"""Of the schedule; a side runs until it is ended from outside."""


@dataclass(frozen=True)
class Side:
    """One loop in one setting; it travels to its processes as JSON."""

    name: str
    loop: str
    """`plain`, `heliostat` or `trainer`."""
    overrides: list[str]
    """Of the recipe."""
    recipe: str = "gpt-demo"
    ranks: int = 1
    threads: int = 1
    device: str = "cpu"
    corpus: dict[str, Any] = field(default_factory=dict)
    """`root`: of the store that holds it."""

    @property
    def config(self) -> RunConfig:
        return loading.load(
            self.recipe,
            [
                "name=benchmark",
                f"storage.root={self.corpus['root']}",
                f"train.steps={STEPS}",
                f"train.workers={self.ranks}",
                f"train.threads_per_worker={self.threads}",
                *self.overrides,
            ],
        )


def make_corpus(config: RunConfig, rows: int) -> Artifact:
    """Rows of random tokens, each of several documents, and nothing else in a new store."""
    import io

    import pyarrow.parquet as pq

    from pipelines.data.packing import pack, to_table, token_type

    data, rng = config.data, np.random.default_rng(0)
    assert isinstance(data, TextData)
    store = Store(config.storage.root)
    store.check_writable()
    staging = store.stage("corpus", config.name)
    lengths = rng.integers(1, 2 * data.sequence_length, rows)
    documents = [
        rng.zipf(1.3, length).clip(1, data.vocab_size - 1).astype(token_type(data.vocab_size))
        for length in lengths
    ]
    table = to_table(pack(documents, np.arange(rows), data.sequence_length, 0))
    raw, group = io.BytesIO(), 64
    pq.write_table(table, raw, row_group_size=group)
    files, splits = [], {}
    for split in ("train", "heldout"):
        path = f"{split}/part-00000.parquet"
        files.append(staging.write(path, raw.getvalue()))
        sizes = [min(group, table.num_rows - at) for at in range(0, table.num_rows, group)]
        splits[split] = {"bytes": 1, "files": [{"path": path, "row_groups": sizes}]}
    return staging.commit(
        files,
        fingerprint=fingerprint(BY_VERB["prepare"], config, None, {}),
        config=resolved(config),
        detail={"facts": {"vocab_size": data.vocab_size, "end_of_text": 0}, "splits": splits},
    )


class Gate:
    """Lets a loop pass one block of steps at a time.

    `before(step)` blocks at the first step of each block until the parent says how many steps the
    next one has (and `profile` where it is to be profiled), and then tells what the last one took.
    """

    def __init__(self, channel: Any, device: str) -> None:
        self._channel, self._device = channel, device
        self._until, self._began = 0, 0.0
        self._profiler: Profiler | None = None
        self.waited = 0.0
        """Seconds of this block that the loop waited for data."""
        self.loss = float("nan")

    def before(self, step: int) -> None:
        if step < self._until:
            return
        self._settle()
        seconds = time.perf_counter() - self._began
        self._give_way()
        profile = self._profiler.finish() if self._profiler else None
        figures = {"seconds": seconds, "waited": self.waited, "loss": self.loss, "step": step}
        self._channel.write(json.dumps(figures | {"profile": profile}) + "\n")
        self._channel.flush()
        steps, *wish = sys.stdin.readline().split() or sys.exit("the parent is gone")
        self._until = step + int(steps)
        self._profiler = Profiler(self._device) if wish == ["profile"] else None
        self.waited, self._began = 0.0, time.perf_counter()

    def _settle(self) -> None:
        """A GPU computes after the call has returned."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _give_way(self) -> None:
        """Memory that is only kept for later goes to the side whose turn is next."""
        if self._device == "cuda":
            import torch

            torch.cuda.empty_cache()


def main(raw: str) -> None:
    """A rank of a side: `python sides.py JSON`."""
    # What libraries print must not stand among our figures.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    side = Side(**json.loads(raw))
    torch.set_num_threads(side.threads)
    torch.set_flush_denormal(True)
    if side.loop != "trainer":  # which would take these for its own
        _join(side)
    loops: dict[str, Callable[[Side, Gate], None]] = {
        "plain": plain,
        "heliostat": heliostat,
        "trainer": trainer,
    }
    loops[side.loop](side, Gate(channel, side.device))


def _join(side: Side) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    # DeepSpeed looks for MPI where one of these is missing; the rendezvous is a file.
    rank = os.environ["SIDE_RANK"]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(side.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group(
        "nccl" if side.device == "cuda" else "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(rank),
        world_size=side.ranks,
        timeout=timedelta(minutes=30),
    )


def _world(side: Side) -> Any:
    import torch

    from pipelines.training.engine import World

    rank = int(os.environ["SIDE_RANK"])
    device = torch.device(side.device, rank if side.device == "cuda" else None)
    if side.device == "cuda":
        torch.cuda.set_device(device)
    return World(rank, side.ranks, device)


def _source(side: Side, world: Any) -> tuple[Any, Any, dict[str, Any]]:
    """This rank's batches, the family and its facts, as `heliostat pretrain` has them."""
    from pipelines import families
    from pipelines.data.corpus import Corpus
    from pipelines.training.loop import BatchSource

    config = side.config
    made = Store(config.storage.root).latest("corpus", config.name)
    assert made is not None
    corpus, family = Corpus(made), families.load(config.family)
    return BatchSource(config, family, corpus, world), family, corpus.facts


def plain(side: Side, gate: Gate) -> None:
    """The peer: forward, loss, backward, clip, step."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from pipelines.training import zero
    from pipelines.training.engine import _adamw
    from pipelines.training.schedule import learning_rate

    config, world = side.config, _world(side)
    source, family, facts = _source(side, world)
    precision = zero.precision(config.train, side.device)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    model: Any = family.build_model(config, facts).to(world.device)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained: Any = model if side.ranks == 1 else torch.nn.parallel.DistributedDataParallel(model)
    if config.train.compile:
        trained = torch.compile(trained)
    optimizer = _adamw(model, config, side.device)
    ready = [
        [{key: value.to(world.device) for key, value in batch.items()} for batch in source.at(step)]
        for step in range(64)
    ]
    for step in itertools.count():
        gate.before(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        micro_batches = ready[step % len(ready)]
        total = 0.0
        for batch in micro_batches:
            with torch.autocast(side.device, torch.bfloat16, enabled=precision != "fp32"):
                logits = trained(input_ids=batch["input_ids"], use_cache=False).logits
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100
            )
            (loss / len(micro_batches)).backward()
            total += loss.detach() / len(micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.loss = float(total)


def heliostat(side: Side, gate: Gate) -> None:
    """Ours, whole but for Ray: the gate stands where the loop asks for its next batch."""
    from pipelines.training import loop
    from pipelines.training.threads import compute_on

    class Gated(loop.BatchSource):
        def between(self, first: int, *rest: int) -> Iterator[Any]:
            inner = super().between(first, *rest)
            for step in itertools.count(first):
                gate.before(step)
                began = time.perf_counter()
                item = next(inner)
                gate.waited += time.perf_counter() - began
                yield item

    class Last(loop._Board):
        def put(self, row: dict[str, float]) -> None:
            gate.loss = row["loss"]

    def joined(config: RunConfig) -> Any:
        compute_on(side.threads)
        return world

    world, config = _world(side), side.config
    loop.BatchSource, loop._Board = Gated, Last  # type: ignore[misc]
    loop.join_world = joined
    corpus = Store(config.storage.root).latest("corpus", config.name)
    assert corpus is not None
    name = f"{side.name}-{os.getppid()}".lower().replace(" ", "-").replace(",", "")
    tree = resolved(config) | {"name": name}
    loop.train(
        loop.TrainJob(tree, config.storage.root, (corpus.name, corpus.version), name, "benchmark")
    )


def trainer(side: Side, gate: Gate) -> None:
    """Hugging Face's Trainer over the same rows, in order, the model shifting its own labels."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, world = side.config, _world(side)
    source, family, facts = _source(side, world)
    from pipelines.training import zero

    precision = zero.precision(config.train, side.device)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    model: Any = family.build_model(config, facts)
    rows = [
        {"input_ids": row, "labels": row}
        for step in range(64)
        for batch in source.at(step)
        for row in batch["input_ids"]
    ]

    class Gated(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            gate.before(state.global_step)

    train = config.train
    arguments = TrainingArguments(
        output_dir=os.environ["RENDEZVOUS"] + ".trainer",
        max_steps=STEPS,
        per_device_train_batch_size=train.micro_batch or train.global_batch // side.ranks,
        learning_rate=train.learning_rate,
        max_grad_norm=train.gradient_clip,
        optim="adamw_torch_fused",
        weight_decay=train.weight_decay,
        bf16=precision != "fp32",
        use_cpu=side.device == "cpu",
        gradient_checkpointing=train.activation_checkpointing,
        torch_compile=train.compile,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with contextlib.redirect_stdout(sys.stderr):
        Trainer(model, arguments, train_dataset=rows, callbacks=[Gated()]).train()


if __name__ == "__main__":
    # As a module of a name that others may import: what runs as __main__ cannot be pickled.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])
