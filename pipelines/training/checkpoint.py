"""Checkpoints: artifacts that all ranks write and rank 0 commits.

    state/...            DeepSpeed's files, as each rank would have written them itself
    ranks/00000.json     what each rank wrote, with hashes: its last file
    history.json         one row per logged step up to this one

The step is blocked only while the state is copied in memory. A thread of each rank writes it to
storage; rank 0's waits until every rank's list is there, writes the manifest and COMMIT, and
removes checkpoints that are no longer kept. Ranks meet in the storage, not in a collective, so that
nothing in the background can be in the way of training.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, HeliostatError, StorageError, TrainingError
from cluster.storage import Artifact, FileEntry, Staging, Store
from pipelines.training.engine import TAG, Engine, World

if TYPE_CHECKING:
    import torch

COMMIT_TIMEOUT_SECONDS = 600.0
"""How long rank 0 waits for the other ranks' files before it gives a checkpoint up."""
POLL_SECONDS = 0.05

History = list[dict[str, float]]


@dataclass(frozen=True)
class Lineage:
    """What a run's checkpoints have in common in their manifests."""

    name: str
    run: str
    fingerprint: str
    config: Mapping[str, Any]
    parent: Artifact
    keep: int


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    seconds: float
    """Spent on committed steps, over all launches of the run."""
    history: History


class CheckpointWriter:
    """Saves one run's checkpoints, at most one in flight."""

    def __init__(self, store: Store, lineage: Lineage, world: World) -> None:
        self._store, self._lineage, self._world = store, lineage, world
        self._thread: threading.Thread | None = None
        self._error: HeliostatError | None = None

    def save(self, engine: Engine, progress: Progress, *, complete: bool) -> float:
        """Copy the state and write it in the background. Collective.

        Returns:
            Seconds that the step was blocked, waiting for the previous save included.

        Raises:
            StorageError: if the previous save failed on this rank, or this one cannot begin.
        """
        began = time.monotonic()
        self.wait()
        staging = self._begin()
        states = engine.snapshot()
        detail = {
            "run": self._lineage.run,
            "step": progress.step,
            "seconds": progress.seconds,
            "world_size": self._world.size,
            "zero_stage": engine.config.train.zero_stage,
            "precision": engine.precision,
        }
        arguments = (staging, states, list(progress.history), detail, complete)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()
        return time.monotonic() - began

    def wait(self) -> None:
        """Block until the save in flight is done.

        Raises:
            HeliostatError: the reason, if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _begin(self) -> Staging:
        """Rank 0 claims the next version and tells the others; all raise where it cannot."""
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self._world.first:
            try:
                told = [self._store.stage("checkpoint", self._lineage.name).version, None]
            except HeliostatError as error:
                told = [None, str(error)]
        dist.broadcast_object_list(told, src=0, device=self._world.device)
        version, problem = told
        if problem is not None:
            raise StorageError(problem)
        return Staging(self._store, "checkpoint", self._lineage.name, version)

    def _write(
        self,
        staging: Staging,
        states: dict[str, Any],
        history: History,
        detail: dict[str, Any],
        complete: bool,
    ) -> None:
        rank = self._world.rank
        try:
            entries = [_write_state(staging, name, state) for name, state in states.items()]
            if self._world.first:
                entries.append(staging.write_json("history.json", history))
            staging.write_json(_rank_file(rank), {"files": [asdict(entry) for entry in entries]})
            if self._world.first:
                self._commit(staging, history, detail, complete)
        except HeliostatError as error:
            self._error = error
            _tell_failure(staging, rank, str(error))

    def _commit(
        self, staging: Staging, history: History, detail: dict[str, Any], complete: bool
    ) -> None:
        files = _collect(staging, self._world.size)
        last = history[-1] if history else {}
        staging.commit(
            files,
            fingerprint=self._lineage.fingerprint,
            config=self._lineage.config,
            parents=[self._lineage.parent],
            metrics={key: value for key, value in last.items() if key != "step"},
            detail=detail,
            complete=complete,
        )
        retire(self._store, self._lineage)


def newest(store: Store, name: str, run: str) -> Artifact | None:
    """The newest checkpoint of a run whose every file is as the manifest says.

    A damaged one is passed over, and said so.
    """
    for artifact in reversed(store.versions("checkpoint", name)):
        if artifact.manifest.detail.get("run") != run:
            continue
        try:
            artifact.verify()
        except ArtifactError as error:
            print(f"{error}: falling back to the checkpoint before it", flush=True)
            continue
        return artifact
    return None


def retire(store: Store, lineage: Lineage) -> None:
    """Remove checkpoints of a run beyond the newest that are kept."""
    versions = store.versions("checkpoint", lineage.name)
    own = [a for a in versions if a.manifest.detail.get("run") == lineage.run]
    for artifact in own[: -lineage.keep]:
        store.delete(artifact)


def progress_of(artifact: Artifact) -> Progress:
    detail = artifact.manifest.detail
    return Progress(detail["step"], detail["seconds"], read_history(artifact))


def read_history(artifact: Artifact) -> History:
    """One row per logged step: `step`, `loss`, `learning_rate`, `gradient_norm`, ..."""
    history: History = artifact.read_json("history.json")
    return history


def load_weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a checkpoint in fp32, by their Hugging Face names.

    Raises:
        ArtifactError: if a file is missing or damaged.
    """
    import torch

    with artifact.local(f"{TAG}/") as folder:
        if artifact.manifest.detail["zero_stage"] == 0:
            state = torch.load(
                folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
            )["module"]
        else:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=TAG)
        # Copies, because the files that the tensors may still point into are about to go away.
        return {
            name: (t.detach().float() if t.is_floating_point() else t.detach()).clone()
            for name, t in state.items()
        }


def _write_state(staging: Staging, name: str, state: Any) -> FileEntry:
    import torch

    if not _finite(state):
        raise TrainingError(
            f"{name} holds values that are not finite: not saved, the checkpoint before it stays"
        )
    return staging.write_with(f"{TAG}/{name}", lambda stream: torch.save(state, stream))


def _finite(state: Any) -> bool:
    import torch

    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or bool(torch.isfinite(state).all())
    if isinstance(state, Mapping):
        return all(map(_finite, state.values()))
    if isinstance(state, (list, tuple)):
        return all(map(_finite, state))
    return True


def _collect(staging: Staging, ranks: int) -> list[FileEntry]:
    """Wait for the list of every rank.

    Raises:
        StorageError: if a rank failed or did not finish in time.
    """
    deadline = time.monotonic() + COMMIT_TIMEOUT_SECONDS
    files: list[FileEntry] = []
    for rank in range(ranks):
        while (raw := staging.store.read(f"{staging.path}/{_rank_file(rank)}")) is None:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"checkpoint {staging.name}@{staging.version}: rank {rank} wrote nothing in "
                    f"{COMMIT_TIMEOUT_SECONDS:.0f} s; the checkpoint before it stays"
                )
            time.sleep(POLL_SECONDS)
        listed = json.loads(raw)
        if "error" in listed:
            raise StorageError(f"rank {rank}: {listed['error']}")
        files += [FileEntry(**entry) for entry in listed["files"]]
    return files


def _rank_file(rank: int) -> str:
    return f"ranks/{rank:05d}.json"


def _tell_failure(staging: Staging, rank: int, reason: str) -> None:
    """Let rank 0 know at once; on a full disk it may have to find out by waiting."""
    try:
        staging.write_json(_rank_file(rank), {"error": reason})
    except StorageError as error:
        print(f"checkpoint {staging.name}@{staging.version}: {error}", flush=True)
