"""The DeepSpeed engine behind the few calls that the loop makes; nothing else imports it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig
from pipelines.families.base import Batch, Facts, Family
from pipelines.training import zero

if TYPE_CHECKING:
    import torch

TAG = "state"
"""Folder that DeepSpeed puts a checkpoint's files in."""


@dataclass(frozen=True)
class World:
    """This process among the training workers."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, equal on all ranks."""

    loss: float
    """Mean over the predictions of the whole global batch, nats."""
    predictions: int
    gradient_norm: float


class Engine:
    """A model that is being trained.

    The gradient of a step is that of the loss summed over the whole global batch and divided by its
    number of predictions; DeepSpeed averages over ranks, so each rank's sum is scaled by
    `ranks / predictions` first. World size therefore never changes the gradient.
    """

    def __init__(self, config: RunConfig, family: Family, facts: Facts, world: World) -> None:
        self.config, self.family, self.world = config, family, world
        device: Any = world.device.type
        self.precision = zero.precision(config.train, device)
        settings = zero.deepspeed_config(
            config.train, workers=world.size, precision=self.precision, device=device
        )
        _quiet()
        deepspeed = _import_deepspeed(world.device.type)
        model = _build_model(config, family, facts, settings)
        optimizer = _adamw(model, config, world.device.type)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        if config.train.compile:
            self._engine.compile()

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._engine.module
        return module

    def step(self, micro_batches: list[Batch], *, learning_rate: float, seed: int) -> StepOutcome:
        """One optimizer step over this rank's share of the global batch.

        Args:
            seed: of everything random inside the model (dropout) at this step and rank.
        """
        import torch

        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(seed)
        counts = sum(self.family.count(batch) for batch in micro_batches)
        predictions = int(self._sum(torch.tensor(float(counts))))
        total = torch.zeros((), dtype=torch.float32, device=self.world.device)
        for batch in micro_batches:
            loss = self.family.loss(self._engine, batch)
            self._engine.backward(loss * (self.world.size / predictions), scale_wrt_gas=False)
            self._engine.step()
            total += loss.detach()
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(
            self._sum(total) / predictions,
            predictions,
            float(norm) if norm is not None else float("nan"),
        )

    def average_buffers(self) -> None:
        """Make buffers that each rank computed from its own rows (BatchNorm) equal on all ranks."""
        import torch
        import torch.distributed as dist

        for buffer in self.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
                buffer /= self.world.size
            elif buffer.dtype == torch.int64:
                dist.all_reduce(buffer, op=dist.ReduceOp.MAX)

    def snapshot(self) -> dict[str, Any]:
        """This rank's part of the state in host memory: file name -> what torch.save writes."""
        capture = _capture_engine()
        usual = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = capture
        try:
            with tempfile.TemporaryDirectory() as scratch:
                self._engine.save_checkpoint(scratch, tag=TAG, save_latest=False)
        finally:
            self._engine.checkpoint_engine = usual
        states: dict[str, Any] = capture.states
        return states

    def load(self, folder: Path) -> None:
        """Restore from the files that `snapshot` named; `folder` holds them below `state/`."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"

    def close(self) -> None:
        self._engine.destroy()

    def _sum(self, value: torch.Tensor) -> float:
        import torch.distributed as dist

        value = value.to(self.world.device)
        dist.all_reduce(value)
        return float(value)


def _build_model(
    config: RunConfig, family: Family, facts: Facts, settings: dict[str, Any]
) -> torch.nn.Module:
    """The same initial weights on every rank and at every world size: one seed, one device."""
    import torch

    torch.manual_seed(config.seed)
    model: Any = family.build_model(config, facts)
    if config.train.activation_checkpointing:
        # Reentrant checkpoints run a backward pass inside of the backward pass, which ZeRO's
        # hooks would take for the end of the step.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    built: torch.nn.Module = model
    return built


def _adamw(model: torch.nn.Module, config: RunConfig, device: str) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101); matrices decay, vectors do not."""
    import torch

    train = config.train
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        fused=True,
    )


def _import_deepspeed(device: str) -> Any:
    import deepspeed
    import deepspeed.ops

    if device == "cpu":
        # A compiled op that only serves inference: building it takes minutes, and a process killed
        # while it builds leaves a lock that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl")
    return deepspeed


def _capture_engine() -> Any:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Capture(CheckpointEngine):
        """Takes what DeepSpeed would write to disk as a copy in host memory instead."""

        def __init__(self) -> None:
            super().__init__()
            self.states: dict[str, Any] = {}

        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            self.states[Path(path).name] = _copied(state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            raise AssertionError("a capture is never read")

        def commit(self, info: Any) -> bool:
            return True

    return Capture()


def _copied(state: Any) -> Any:
    """Tensors copied to host memory, containers rebuilt, everything else as it is."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, _copied(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_copied(item) for item in state)
    return state


def _quiet() -> None:
    """DeepSpeed logs a page per start, and torch warns at every collective that it calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
