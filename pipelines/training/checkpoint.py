"""Checkpoints: artifacts that all ranks write and rank 0 commits.

    state/...            DeepSpeed's files, as each rank would have written them itself
    ranks/00000.json     what each rank wrote, with hashes: its last file
    history.json         one row per logged step up to this one
    ledger.json          the stretches of steps that led here (`ledger`)

The step is blocked only while the state is copied in memory. A thread of each rank writes it to
storage and reads it back; rank 0's waits until every rank's list is there, writes the manifest and
COMMIT, removes checkpoints that are no longer kept, and begins the next version, so that the next
save finds it ready. Ranks meet in the storage, not in a collective, so that nothing in the
background can be in the way of training. How a save ended they tell each other before the next one:
a failure on one rank ends the run on all of them.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError, HeliostatError, StorageError, TrainingError
from cluster.journal import Journal
from cluster.manifest import sha256
from cluster.storage import Artifact, Damage, FileEntry, Staging, Store
from pipelines.training import ledger
from pipelines.training.agreement import agree, agreed
from pipelines.training.engine import TAG, Engine, World
from pipelines.training.sampler import Sample

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.05
SWEEP_SECONDS = 5.0
"""For removing a failed save before its error is raised; the next save removes what is left."""

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
    """Newest checkpoints that stay."""
    keep_best: int = 0
    """Checkpoints with the lowest `score` that stay beside them."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    seconds: float
    """Spent on committed steps, over all launches of the run."""
    history: History
    led: tuple[ledger.Stretch, ...] = ()


@dataclass(frozen=True)
class Save:
    """One checkpoint on its way from a rank's memory to storage."""

    staging: Staging
    lineage: Lineage
    rank: int
    ranks: int
    states: Mapping[str, Any]
    """File name -> what torch.save writes, or bytes."""
    taken: ledger.Taken
    """Samples of this rank since the checkpoint before."""
    progress: Progress
    """Whose last stretch ends here."""
    detail: Mapping[str, Any]
    complete: bool

    def write(self) -> None:
        """Write what this rank has to write, its list last.

        Raises:
            TrainingError: if a tensor holds values that are not finite.
            StorageError: if storage does not take it, or gives something else back.
        """
        staging, stretch = self.staging, self.progress.led[-1]
        entries = [_write_state(staging, name, state) for name, state in self.states.items()]
        if self.rank == 0:
            entries.append(staging.write_json("history.json", self.progress.history))
            entries.append(staging.write(ledger.FILE, ledger.encode(self.progress.led)))
        ledger.write(staging.store, self.lineage.run, stretch, self.rank, self.taken)
        for entry in entries:
            staging.check(entry)
        listed = {"token": staging.token, "files": [asdict(entry) for entry in entries]}
        staging.write_json(_rank_file(self.rank), listed)

    def commit(self, timeout: float, given_up: threading.Event | None = None) -> Artifact:
        """Wait for every rank's list, then make it an artifact. Rank 0's part.

        Raises:
            StorageError: if a rank did not finish in time, or it cannot be written.
        """
        files = _collect(self.staging, self.ranks, timeout, given_up or threading.Event())
        history = self.progress.history
        last = history[-1] if history else {}
        return self.staging.commit(
            files,
            fingerprint=self.lineage.fingerprint,
            config=self.lineage.config,
            parents=[self.lineage.parent],
            metrics={key: value for key, value in last.items() if key != "step"},
            detail={
                "run": self.lineage.run,
                "step": self.progress.step,
                "seconds": self.progress.seconds,
                "world_size": self.ranks,
                "parent_sha256": self.lineage.parent.digest(),
                "score": score(history, self.progress.led[-1].first),
                **self.detail,
            },
            complete=self.complete,
        )


class CheckpointWriter:
    """Saves one run's checkpoints, at most one in flight.

    Args:
        timeout: seconds that a save may take; a step waits for the save before it no longer.
    """

    def __init__(
        self, store: Store, lineage: Lineage, world: World, timeout: float = 600.0
    ) -> None:
        self._store, self._lineage, self._world, self._timeout = store, lineage, world, timeout
        self._threads: list[threading.Thread] = []
        self._written, self._given_up = threading.Event(), threading.Event()
        self._written.set()
        self._error: HeliostatError | None = None
        self._next: Staging | None = None
        self._last, self._led, self._taken = 0, tuple[ledger.Stretch, ...](), ledger.Taken()

    def begin(self, start: Progress) -> None:
        """Go on from where a run stands, after a launch or a return to an older checkpoint."""
        self._last, self._led, self._taken = start.step, start.led, {}
        if self._world.first and self._next is None and not self._threads:
            self._launch(self._stage_next)

    def record(self, step: int, samples: Sequence[Sample]) -> None:
        """Note what this rank trained on at a step, counted from 1."""
        self._taken[step] = samples

    def save(self, engine: Engine, progress: Progress, *, complete: bool) -> float:
        """Copy the state and write it in the background. Collective.

        Returns:
            Seconds that the step was blocked, waiting for the previous save included.

        Raises:
            StorageError: on all ranks, if the previous save failed on any, is not done after
                `timeout`, or this one cannot begin.
        """
        began = time.monotonic()
        self.wait()
        staging = self._claim()
        stretch = ledger.Stretch(self._last, progress.step, self._world.size, staging.token[:8])
        self._last, self._led = progress.step, (*self._led, stretch)
        taken, self._taken = self._taken, {}
        save = Save(
            staging,
            self._lineage,
            self._world.rank,
            self._world.size,
            engine.snapshot(),
            taken,
            replace(progress, history=list(progress.history), led=self._led),
            {"zero_stage": engine.config.train.zero_stage, "precision": engine.precision},
            complete,
        )
        self._written.clear()
        self._launch(lambda: self._carry_out(save))
        return time.monotonic() - began

    def wait(self) -> None:
        """Block until the save in flight is committed. Collective.

        Raises:
            StorageError: on all ranks, if it failed on any, or is not done after `timeout`.
            TrainingError: on all ranks, if any held values that are not finite.
        """
        deadline = time.monotonic() + self._timeout
        self._agree(self._late() if not self._written.wait(self._timeout) else self._error)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        running = any(thread.is_alive() for thread in self._threads)
        self._agree(self._late() if running else self._error)
        self._threads = []

    def _late(self) -> StorageError:
        return StorageError(
            f"storage {self._store.uri} did not take the checkpoint before this one in "
            f"{self._timeout:.0f} s (train.save_timeout_seconds)"
        )

    def _agree(self, problem: HeliostatError | None) -> None:
        try:
            agree(problem, self._world)
        except HeliostatError:
            self._given_up.set()
            for thread in self._threads:
                thread.join(timeout=SWEEP_SECONDS)
            raise

    def _launch(self, work: Any) -> None:
        thread = threading.Thread(target=self._noting, args=(work,), daemon=True, name="checkpoint")
        self._threads.append(thread)
        thread.start()

    def _noting(self, work: Any) -> None:
        try:
            work()
        except HeliostatError as error:
            self._error = error
        except BaseException as error:
            self._error = TrainingError(f"saving a checkpoint failed: {error!r}")
            raise
        finally:
            self._written.set()

    def _carry_out(self, save: Save) -> None:
        try:
            save.write()
            self._written.set()
            if not self._world.first:
                return
            save.commit(self._timeout, self._given_up)
        except HeliostatError as error:
            # Known before the sweeping, which may take as long as whatever was in the way.
            self._error = error
            self._written.set()
            if self._world.first:
                _swept(save.staging)
            return
        self._next = None
        retire(self._store, self._lineage)
        if not save.complete:
            self._stage_next()

    def _stage_next(self) -> None:
        self._next = self._store.stage("checkpoint", self._lineage.name, run=self._lineage.run)

    def _claim(self) -> Staging:
        """The version that rank 0 has begun."""
        import torch.distributed as dist

        with agreed(self._world):
            if self._world.first and self._next is None:
                self._stage_next()
        told: list[Any] = [self._next]
        dist.broadcast_object_list(told, src=0, device=self._world.device)
        staging: Staging = told[0]
        return staging


def newest(store: Store, name: str, run: str) -> Artifact | None:
    """The newest checkpoint of a run whose every file is as the manifest says.

    A damaged one is passed over, which the journal of the run tells.

    Raises:
        TrainingError: if the run has had checkpoints, and none of them is whole.
    """
    lost: list[str] = []
    had = False
    for found in store.survey("checkpoint", name):
        if isinstance(found, Damage):
            if found.begun and _belongs(found, store, run):
                _tell(store, run, f"checkpoint/{name}@{found.version}", found.reason, lost)
                had = had or found.committed
            continue
        if found.manifest.detail.get("run") != run:
            continue
        try:
            found.verify()
        except ArtifactError as error:
            _tell(store, run, found.id, str(error), lost)
            had = True
            continue
        return found
    if had:
        raise TrainingError(_none_whole(name, lost))
    return None


def _belongs(damage: Damage, store: Store, run: str) -> bool:
    """A manifest that cannot be read may be of any run that has begun to save."""
    if damage.detail is not None:
        return damage.detail.get("run") == run
    return ledger.begun(store, run)


def of_run(store: Store, name: str, run: str) -> list[Artifact]:
    """Checkpoints of a run by their manifests alone, newest first; what is none is passed over."""
    found = (one for one in store.survey("checkpoint", name) if isinstance(one, Artifact))
    return [artifact for artifact in found if artifact.manifest.detail.get("run") == run]


def last(store: Store, name: str) -> Artifact | None:
    """The newest checkpoint of a name by its manifest alone.

    Raises:
        TrainingError: if there were checkpoints of the name and no manifest is whole.
    """
    lost = []
    for found in store.survey("checkpoint", name):
        if isinstance(found, Artifact):
            return found
        if found.committed:
            lost.append(f"checkpoint/{name}@{found.version}: {found.reason}")
    if lost:
        raise TrainingError(_none_whole(name, lost))
    return None


def _none_whole(name: str, lost: Sequence[str]) -> str:
    return (
        f"no checkpoint of {name} is whole ({'; '.join(lost)}): if storage was only away, run the "
        "same command again; else start over with --fresh"
    )


def _tell(store: Store, run: str, identity: str, reason: str, lost: list[str]) -> None:
    lost.append(reason if identity in reason else f"{identity}: {reason}")
    print(f"{lost[-1]}: falling back to the checkpoint before it", flush=True)
    journal, fields = Journal(store, run), {"checkpoint": identity, "reason": reason}
    # A run that is launched again meets the same damage again.
    if all(event.fields != fields for event in journal.events()):
        journal.write("checkpoint_fallback", **fields)


def check_parent(checkpoint: Artifact, parent: Artifact) -> None:
    """
    Raises:
        ArtifactError: if a checkpoint was made from another corpus of the same name and version.
    """
    known = checkpoint.manifest.detail.get("parent_sha256")
    if known is not None and known != parent.digest():
        raise ArtifactError(
            f"{parent.id} is not the one that {checkpoint.id} was trained on, its manifest has "
            "changed: bring that back, or start over with --fresh"
        )


def retire(store: Store, lineage: Lineage) -> None:
    """Remove checkpoints of a run but the newest and the best, and what removals left behind.

    The newest was read back before it was committed: one verified checkpoint always stays.
    """
    survey = list(store.survey("checkpoint", lineage.name))
    artifacts = [found for found in survey if isinstance(found, Artifact)]
    own = [a for a in artifacts if a.manifest.detail.get("run") == lineage.run]
    scored = [a for a in own if a.manifest.detail.get("score") is not None]
    best = sorted(scored, key=lambda a: (a.manifest.detail["score"], -a.version))
    kept = {a.version for a in own[: lineage.keep] + best[: lineage.keep_best]}
    for artifact in own:
        if artifact.version not in kept:
            store.delete(artifact)
    newest_version = artifacts[0].version if artifacts else 0
    for found in survey:
        # A later version was committed since: its writer is gone.
        gone = found.version < newest_version
        if isinstance(found, Damage) and gone and not found.committed:
            store.sweep("checkpoint", lineage.name, found.version)


def score(history: History, first: int) -> float | None:
    """What checkpoints are compared by, lower is better: the last `heldout_loss` since step
    `first`, else the mean training loss since then."""
    rows = [row for row in history if row["step"] > first]
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    if heldout:
        return heldout[-1]
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    return fmean(losses) if losses else None


def progress_of(artifact: Artifact) -> Progress:
    detail = artifact.manifest.detail
    return Progress(
        detail["step"], detail["seconds"], read_history(artifact), ledger.stretches(artifact)
    )


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

    if isinstance(state, bytes):
        return staging.write(f"{TAG}/{name}", state)
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


def _collect(
    staging: Staging, ranks: int, timeout: float, given_up: threading.Event
) -> list[FileEntry]:
    """Wait for the list of every rank.

    Raises:
        StorageError: if one did not come in time, or is of another save.
    """
    deadline = time.monotonic() + timeout
    files: list[FileEntry] = []
    for rank in range(ranks):
        while (raw := staging.store.read(f"{staging.path}/{_rank_file(rank)}")) is None:
            if time.monotonic() > deadline or given_up.is_set():
                raise StorageError(
                    f"{staging.id}: rank {rank} did not write its part in {timeout:.0f} s; the "
                    "checkpoint before it stays"
                )
            time.sleep(POLL_SECONDS)
        listed = json.loads(raw)
        if listed["token"] != staging.token:
            raise StorageError(f"{staging.id}: the part of rank {rank} is another save's")
        files += [FileEntry(**entry) for entry in listed["files"]]
        files.append(FileEntry(_rank_file(rank), sha256(raw), len(raw)))
    return files


def _swept(staging: Staging) -> None:
    """Give the space of a failed save back; where storage is away, the next save does."""
    try:
        staging.abandon()
    except StorageError as error:
        print(f"{staging.id}: {error}", flush=True)


def _rank_file(rank: int) -> str:
    return f"ranks/{rank:05d}.json"
