"""The DeepSpeed engine behind the few calls that the loop makes; nothing else imports it."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig, TextData
from pipelines.families.base import Batch, Facts, Family
from pipelines.training import zero

if TYPE_CHECKING:
    import torch

TAG = "state"
"""Folder that DeepSpeed puts a checkpoint's files in."""
SHORT_ROW = 512
"""Tokens up to which attention is left to the compiler: see `_compiles_attention`."""


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
    """Before clipping; not finite where the step was skipped."""
    skipped: bool
    """Loss or gradient were not finite on some rank: weights and optimizer stayed as they were.
    See `is_fault` for what fp16 does in the ordinary course."""
    own_seconds: float
    """That this rank spent in its forward passes. No collective is in them below ZeRO stage 3; at
    stage 3, whose forward passes gather parameters from all ranks, it is 0."""
    signals: tuple[bool, ...]
    """Signals that any rank raised, in the order in which they were given."""


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
        # DeepSpeed does not guard the plain optimizer of stage 0: we clip, and drop what is bad.
        self._plain = config.train.zero_stage == 0 and self.precision in ("fp32", "autocast")
        if self._plain:
            settings["gradient_clipping"] = 0.0
        self._norm = 0.0
        _quiet()
        deepspeed = _import_deepspeed(world.device.type)
        model = _build_model(config, family, facts)
        if _compiles_attention(config, self.precision, device):
            model.set_attn_implementation("eager")  # which the compiler fuses
        optimizer = _adamw(model, config, world.device.type)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )

    @property
    def deepspeed(self) -> Any:
        return self._engine

    @property
    def parameters(self) -> int:
        """Numbers that the model learns, over all ranks."""
        # ZeRO stage 3 leaves empty shells, which know their size.
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.module.parameters())

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._engine.module
        return module

    def step(
        self,
        micro_batches: list[Batch],
        *,
        learning_rate: float,
        seed: int,
        signals: tuple[bool, ...] = (),
    ) -> StepOutcome:
        """One optimizer step over this rank's share of the global batch.

        Args:
            seed: of everything random inside the model (dropout) at this step and rank.
            signals: what this rank wants all ranks to know; it rides on the count's reduction.
        """
        import torch

        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        _seed(seed)
        counts = sum(self.family.count(batch) for batch in micro_batches)
        told = self._sum(torch.tensor([float(counts), *map(float, signals)], dtype=torch.float64))
        predictions = int(told[0])
        scale = self.world.size / max(1, predictions)
        total = torch.zeros((), dtype=torch.float32, device=self.world.device)
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        watch = Stopwatch(self.world.device)
        for number, batch in enumerate(micro_batches, start=1):
            with watch:
                loss = self.family.loss(self._engine, batch)
            # Adding zero times the loss turns every gradient into NaN where the loss is not finite,
            # so that the gradient alone decides; elsewhere it changes no bit.
            self._engine.backward(loss * (scale + 0 * loss.detach()), scale_wrt_gas=False)
            if self._plain and number == len(micro_batches):
                self._clip_or_drop()
            self._engine.step()
            total += loss.detach()
        norm, applied = self._norm_and_verdict()
        if not applied:
            for buffer, before in zip(self.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        mean = float(self._sum(total)) / max(1, predictions)
        return StepOutcome(
            mean,
            predictions,
            norm,
            not applied and is_fault(self.precision, mean),
            watch.seconds() if self.config.train.zero_stage < 3 else 0.0,
            tuple(bool(count) for count in told[1:]),
        )

    def _clip_or_drop(self) -> None:
        """Clip the gradient of a plain optimizer, or drop it where it is not finite.

        Reduced gradients are equal on all ranks, so each comes to the same verdict by itself. Where
        no parameter has a gradient, AdamW changes neither weights nor its own state.
        """
        import torch

        clip = self.config.train.gradient_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        self._norm = float(norm)
        if not math.isfinite(self._norm):
            for parameter in self.module.parameters():
                parameter.grad = None

    def _norm_and_verdict(self) -> tuple[float, bool]:
        """Gradient norm of the step that just ended, and whether it changed the weights."""
        if self._plain:
            return self._norm, math.isfinite(self._norm)
        norm = self._engine.get_global_grad_norm()
        value = float(norm) if norm is not None else float("nan")
        return value, self._engine.was_step_applied()

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
        """This rank's part of the state in host memory: file name -> what torch.save writes, or
        the content of a file as it is."""
        capture = _capture_engine()
        usual = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = capture
        # Scripts for people, which DeepSpeed would copy while the step waits.
        self._engine._copy_recovery_script = lambda save_path: None
        try:
            with tempfile.TemporaryDirectory() as scratch:
                self._engine.save_checkpoint(scratch, tag=TAG, save_latest=False)
                states = capture.states | _files_below(Path(scratch) / TAG)
        finally:
            self._engine.checkpoint_engine = usual
        return states

    def load(self, folder: Path) -> None:
        """Restore from the files that `snapshot` named; `folder` holds them below `state/`."""
        asked_for = [_settings(group) for group in self._engine.optimizer.param_groups]
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
        # The file holds the settings of the run that saved it; another may go on from there.
        for group, settings in zip(self._engine.optimizer.param_groups, asked_for, strict=True):
            group.update(settings)

    def close(self) -> None:
        self._engine.destroy()

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        value = value.to(self.world.device)
        dist.all_reduce(value)
        return value.cpu()


def is_fault(precision: zero.Precision, loss: float) -> bool:
    """Whether a step that was not applied points to something wrong.

    In fp16 a finite loss means that the scaled gradient left the range of the type. That is how
    dynamic loss scaling finds its scale (Micikevicius et al., arXiv:1710.03740): DeepSpeed lowers
    it, and ends the run by itself once it cannot be lowered further.
    """
    return precision != "fp16" or not math.isfinite(loss)


class Stopwatch:
    """Seconds spent inside its `with` blocks: by events on a GPU, which computes later."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *exc: object) -> None:
        self._spans.append((self._began, self._now()))

    def seconds(self) -> float:
        """Of all spans; on a GPU once its work is done."""
        if self._cuda:
            return sum(began.elapsed_time(ended) for began, ended in self._spans) / 1000
        return sum(ended - began for began, ended in self._spans)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the config says about a group of parameters; the rate is the schedule's."""
    return {key: group[key] for key in ("weight_decay", "betas", "eps") if key in group}


def _build_model(config: RunConfig, family: Family, facts: Facts) -> Any:
    """The same initial weights on every rank and at every world size: one seed, one device."""
    import torch

    torch.manual_seed(config.seed)
    model: Any = family.build_model(config, facts)
    if config.train.activation_checkpointing:
        # Reentrant checkpoints run a backward pass inside of the backward pass, which ZeRO's
        # hooks would take for the end of the step.
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.train.zero_stage == 3:
        _gather_by_block(model)
    if config.train.compile:
        for block in _blocks(model) or [model]:
            block.compile(dynamic=False)
    return model


def _compiles_attention(config: RunConfig, precision: zero.Precision, device: str) -> bool:
    """Whether attention is faster as the compiler fuses it than as PyTorch's own kernel.

    So on a CPU in bf16 over short rows: the kernel's backward pass is slow there. The square of a
    long row costs more than the kernel, and in fp32 nothing is gained.
    """
    short = isinstance(config.data, TextData) and config.data.sequence_length <= SHORT_ROW
    return config.train.compile and device == "cpu" and precision != "fp32" and short


def _gather_by_block(model: Any) -> None:
    """Stage 3 gathers a layer's parameters together, not one module's after another's.

    Its hooks then run once for a layer in place of once for each of its modules. No more is
    gathered at once than DeepSpeed prefetches anyhow.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if kinds := {type(block) for block in _blocks(model)}:
        set_z3_leaf_modules(model, list(kinds))


def _blocks(model: Any) -> list[torch.nn.Module]:
    """The layers that a model repeats: compiled one by one they share one compilation, which takes
    seconds where the whole model takes a minute or more."""
    names = set(model._no_split_modules or ())  # as transformers' device maps know them
    return [module for module in model.modules() if type(module).__name__ in names]


def _seed(seed: int) -> None:
    """Every generator that code in a model may draw from without being told one."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
            self.states[Path(path).name] = _copied(state_dict, {})

        def load(self, path: str, map_location: Any = None) -> Any:
            raise AssertionError("a capture is never read")

        def commit(self, info: Any) -> bool:
            return True

    return Capture()


def _copied(state: Any, known: dict[Any, torch.Tensor]) -> Any:
    """Tensors copied to host memory, containers rebuilt, everything else as it is.

    Args:
        known: copies made so far, by what they are of; tied weights are copied and written once.
    """
    import torch

    if isinstance(state, torch.Tensor):
        place = (state.data_ptr(), state.dtype, state.shape, state.stride())
        if state.numel() == 0 or place not in known:
            known[place] = state.detach().to("cpu", copy=True)
        return known[place]
    if isinstance(state, dict):
        return type(state)((key, _copied(value, known)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_copied(item, known) for item in state)
    return state


def _files_below(folder: Path) -> dict[str, bytes]:
    """What DeepSpeed wrote by itself: the optimizer's state where that is offloaded to a disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _quiet() -> None:
    """DeepSpeed logs a page per start, and torch warns at every collective that it calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
