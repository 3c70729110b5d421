"""Go on at another number of workers, or at another ZeRO stage, from the same checkpoint.

Each rank of ZeRO holds a piece of the state whose borders follow from the number of ranks. A
checkpoint that is to be continued at another number, or cut for another stage, is therefore
converted first: DeepSpeed's *universal* layout, whole tensors by parameter name, committed as an
artifact of kind `universal` whose parent is the checkpoint. It is made once, on one node's disk,
from files that were verified; workers read it through `Artifact.local`, so that DeepSpeed never
sees a remote URI. Order of the data and global batch know no world size (`sampler`), so that the
losses go on as if nothing had changed.

    universal/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
    universal/zero/optimizer_state.pt        only how many parameter groups there are, and the step
    universal/[zero_pp_rank_0_]mp_rank_00_model_states.pt      counters and buffers, no weights

What DeepSpeed's converter leaves is brought to one form that stages 1, 2 and 3 all read: the files
of stage 3 are flat and lack the step, those of stages 1 and 2 lack the name that stage 3 looks for.
Weight decay and the like stay what the config says; DeepSpeed would give all parameter groups of
stage 3 those of the first. Stage 0 keeps its whole state on every rank: it continues at any number
of workers as it is, and does not turn into a sharded stage.

Statistics that a model takes over its batch (BatchNorm) see the rows of one rank only: such a model
continues at another number of workers, but the promise that its losses do not change excludes it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, ConfigError, StorageError
from cluster.journal import Journal
from cluster.storage import Artifact, Store

if TYPE_CHECKING:
    import torch

    from pipelines.training.engine import Engine

KIND = TAG = "universal"
STATES = ("fp32", "exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
WAIT_SECONDS = 3600.0
"""How long a rank waits while rank 0 converts."""
POLL_SECONDS = 0.2


def needed(checkpoint: Artifact, workers: int, zero_stage: int) -> bool:
    """Whether a checkpoint must be converted before this many workers can load it.

    Raises:
        ConfigError: between stage 0 and the others.
    """
    saved = checkpoint.manifest.detail
    if 0 in (saved["zero_stage"], zero_stage):
        if saved["zero_stage"] != zero_stage:
            raise ConfigError(
                f"{checkpoint.id} was saved at train.zero_stage {saved['zero_stage']} and cannot "
                f"continue at {zero_stage}: stages 1, 2 and 3 continue each other, 0 only itself. "
                f"Take train.zero_stage={saved['zero_stage']}, another name, or --fresh"
            )
        return False
    return (saved["world_size"], saved["zero_stage"]) != (workers, zero_stage)


def find(checkpoint: Artifact) -> Artifact | None:
    """The universal form of a checkpoint, if it was ever committed."""
    source = _digest(checkpoint)
    for artifact in reversed(checkpoint.store.versions(KIND, checkpoint.name)):
        if artifact.manifest.detail["source"] == source:
            return artifact
    return None


def ensure(checkpoint: Artifact) -> Artifact:
    """The universal form of a checkpoint: the one that is there, or a new one. Not collective.

    Raises:
        ArtifactError: if a file of the checkpoint is missing or damaged.
        StorageError: if the result cannot be written.
    """
    found = find(checkpoint)
    if found is not None:
        try:
            found.verify()
        except ArtifactError:
            checkpoint.store.delete(found)
        else:
            return found
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heliostat-") as scratch:
        target = Path(scratch) / TAG
        with checkpoint.local("state/") as folder:
            convert(_linked(checkpoint, folder, Path(scratch) / "state"), target)
        made = _commit(checkpoint, target)
    Journal(checkpoint.store, made.manifest.detail["run"]).write(
        "resharded",
        checkpoint=checkpoint.id,
        step=made.manifest.detail["step"],
        artifact=made.id,
        seconds=round(time.monotonic() - began, 3),
    )
    return made


def awaited(checkpoint: Artifact, timeout: float = WAIT_SECONDS) -> Artifact:
    """The universal form that another process is making. Ranks meet in the store: converting may
    take longer than a collective would wait.

    Raises:
        StorageError: if it is not there in time.
    """
    deadline = time.monotonic() + timeout
    while (found := find(checkpoint)) is None:
        if time.monotonic() > deadline:
            raise StorageError(
                f"{checkpoint.id} was not converted for this number of workers in {timeout:.0f} s"
            )
        time.sleep(POLL_SECONDS)
    return found


def restore(engine: Engine, checkpoint: Artifact) -> None:
    """Bring an engine to where a checkpoint stands, whatever size or stage saved it. Collective.

    Raises:
        ArtifactError: if a file is missing or damaged.
        ConfigError: if the checkpoint's ZeRO stage cannot continue at the engine's.
        StorageError: if a conversion cannot be written, or does not end.
    """
    world = engine.world
    if not needed(checkpoint, world.size, engine.config.train.zero_stage):
        with checkpoint.local("state/") as folder:
            engine.load(folder.parent)
        return
    source = ensure(checkpoint) if world.first else awaited(checkpoint)
    with source.local(f"{TAG}/") as folder:
        load(engine.deepspeed, folder)


def discard(store: Store, name: str, run: str, but: Artifact | None = None) -> None:
    """Remove the universal artifacts of a run, which are copies of what its checkpoints hold."""
    for artifact in store.versions(KIND, name):
        if artifact.manifest.detail["run"] == run and (but is None or artifact.id != but.id):
            store.delete(artifact)


def convert(source: Path, target: Path) -> None:
    """DeepSpeed's files of a checkpoint of stage 1, 2 or 3 to the universal layout.

    Needs memory for the state of one rank, and disk for twice the whole state.

    Args:
        source: holds the checkpoint's files and nothing else.
        target: made here.
    """
    from deepspeed.checkpoint import ds_to_universal

    raw = target.with_name(f"{target.name}-raw")
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(raw),
        # One process: a fork of a worker would inherit its collectives' threads.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    _unify(raw, target)


def load(deepspeed_engine: Any, folder: Path) -> None:
    """Load the universal files in `folder` into a DeepSpeed engine of any size and stage 1 to 3.

    The engine's own setting says only here how to read: later loads are plain ones again.
    Collective. Parameters that are not trained keep the values that the model was built with.
    """
    import torch

    settings = deepspeed_engine._config
    settings.load_universal_checkpoint = True
    try:
        path, _ = deepspeed_engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        settings.load_universal_checkpoint = False
    assert path is not None, f"DeepSpeed found no universal checkpoint in {folder}"
    state = torch.load(folder / MODEL_STATES, map_location="cpu", weights_only=False)
    groups = len(deepspeed_engine.optimizer.param_groups)
    assert groups == state["parameter_groups"], f"{groups} parameter groups in {state}"
    # DeepSpeed gives all parts of stage 3 one and the same counter: each would advance it.
    for part in deepspeed_engine.optimizer.optimizer.state.values():
        part["step"] = part["step"].clone()
    _load_buffers(deepspeed_engine.module, state["module"])


def _load_buffers(module: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Buffers by name; DeepSpeed's universal loading leaves them out."""
    own = dict(module.named_buffers())
    for name, value in saved.items():
        own[name].copy_(value)


def _digest(checkpoint: Artifact) -> str:
    """Names the content: a version number may come again after its artifact was removed."""
    return hashlib.sha256(checkpoint.manifest.encode()).hexdigest()


def _linked(checkpoint: Artifact, folder: Path, target: Path) -> Path:
    """A folder of links to the files that the manifest names: DeepSpeed reads whatever it finds."""
    target.mkdir()
    for entry in checkpoint.manifest.files:
        if entry.path.startswith("state/"):
            name = entry.path.removeprefix("state/")
            (target / name).symlink_to(folder / name)
    return target


def _commit(checkpoint: Artifact, folder: Path) -> Artifact:
    saved = checkpoint.manifest
    staging = checkpoint.store.stage(KIND, checkpoint.name)
    made = staging.commit(
        staging.copy_tree(folder, f"{TAG}/"),
        fingerprint=saved.fingerprint,
        config=saved.config,
        parents=[checkpoint],
        metrics=saved.metrics,
        detail={**saved.detail, "source": _digest(checkpoint)},
    )
    discard(checkpoint.store, checkpoint.name, saved.detail["run"], but=made)
    return made


def _unify(raw: Path, target: Path) -> None:
    """One form for stages 1, 2 and 3 out of what DeepSpeed's converter made of one of them."""
    import torch

    sharded = f"zero_pp_rank_0_{MODEL_STATES}"
    found = sharded if (raw / sharded).exists() else MODEL_STATES
    state = torch.load(raw / found, map_location="cpu", weights_only=False)
    optimizer = torch.load(raw / "zero/optimizer_state.pt", map_location="cpu", weights_only=False)
    shapes = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
    step = _step(raw, optimizer, next(iter(shapes)))
    for name, shape in shapes.items():
        (target / "zero" / name).mkdir(parents=True)
        for key in STATES:
            flat = torch.load(raw / f"zero/{name}/{key}.pt", weights_only=False)
            tensor = flat["param"] if isinstance(flat, dict) else flat
            whole = {"param": tensor.reshape(shape).clone(), "cat_dim": 0}
            torch.save(whole, target / f"zero/{name}/{key}.pt")
            # A raw file is not needed twice: the disk holds the state once, not three times.
            (raw / f"zero/{name}/{key}.pt").unlink()
        torch.save(step, target / f"zero/{name}/step.pt")
    # Hyperparameters stay out: they are the config's.
    groups: list[dict[str, list[Any]]] = [{"params": []} for _ in optimizer["param_groups"]]
    common = {
        "ds_version": state["ds_version"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
    }
    torch.save(common, target / "zero/optimizer_state.pt")
    counters = ("dp_world_size", "mp_world_size", "global_steps", "global_samples", "skipped_steps")
    model = {key: state[key] for key in (*counters, "ds_version")} | {
        "parameter_groups": len(groups),
        "module": {n: state["module"][n] for n in state["buffer_names"] if n in state["module"]},
        "lr_scheduler": None,
    }
    for name in (sharded, MODEL_STATES):
        torch.save(model, target / name)


def _step(raw: Path, optimizer: dict[str, Any], parameter: str) -> Any:
    """How often the optimizer stepped: beside each parameter, or in stage 3 in the common file."""
    import torch

    path = raw / f"zero/{parameter}/step.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    return optimizer["optimizer_state_dict"]["state"][0]["step"]
