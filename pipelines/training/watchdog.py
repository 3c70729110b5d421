"""Signs of life: each worker gives them, the driver reads them, and replaces who gives none.

A thread of each worker tells the board (`telemetry.Board`) about once a second where its training
thread is. It does not meet the other ranks, so that one which hangs is one which is silent, however
many others wait for it in a collective. What to make of the signs is decided in `guard`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import progress
from cluster.errors import HeliostatError
from cluster.journal import Journal
from cluster.storage import Store
from cluster.telemetry import Sign
from pipelines.training import guard
from pipelines.training.diary import Suspects, named
from pipelines.training.meter import OwnTime

if TYPE_CHECKING:
    from pipelines.training.engine import World

SIGN_SECONDS = 1.0
ANSWER_SECONDS = 10.0
"""How long a sign may take to reach the board."""
DUMP_SECONDS = 20.0
MOST_DUMPS = 8
WORTH_A_WORD = 10.0
"""Seconds of a rank's silence from which on the driver's log says so, for `heliostat why`."""
SLOW_LOOKS = 3
"""Times in a row, a second or more apart, that a rank must be seen slow before it is named."""
PROFILER = "py-spy"

ASKED_TO_END = threading.Event()
"""Set in a worker that received SIGTERM."""


class Preempted(RuntimeError):
    """A worker was told to end and everything is committed: Ray Train starts the workers again."""


class Pulse:
    """A worker's signs of life, from a thread of its own. A context manager."""

    def __init__(self, board: Any, world: World, start_id: str, start: int) -> None:
        self._board, self._world, self._start_id, self._start = board, world, start_id, start
        self._place: tuple[int, guard.Phase, int] = (start, "start", start)
        self._own, self._step_seconds = OwnTime(), 0.0
        self._stop_asked, self._end = False, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="pulse")

    @staticmethod
    def of(board: Any, world: World, start: int) -> Pulse:
        """For this start of the workers. Collective."""
        import torch.distributed as dist

        told = [uuid.uuid4().hex]
        dist.broadcast_object_list(told, src=0, device=world.device)
        return Pulse(board, world, told[0], start)

    @property
    def signals(self) -> tuple[bool, bool]:
        """Whether the driver wants the run to end; whether this worker was told to end."""
        return self._stop_asked, ASKED_TO_END.is_set()

    def at(self, phase: guard.Phase, batch: int | None = None) -> None:
        """What the training thread is about to do, and with which batch."""
        step, _, before = self._place
        self._place = step, phase, before if batch is None else batch

    def done(self, step: int, *, own: float, seconds: float) -> None:
        """A step is: after how many, with its rank's own seconds, and all of them."""
        self._own.add(own, seconds)
        self._step_seconds, self._place = seconds, (step, "data", self._place[2] + 1)

    def __enter__(self) -> Pulse:
        if self._board is not None:
            import ray
            import torch.distributed as dist

            if self._world.first:
                ray.get(self._board.begin.remote(self._start_id))
            dist.barrier()
            _listen_for_sigterm()
            # The board hears of every rank before any of them is done with a step.
            self._tell()
            dist.barrier()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._board is None:
            return
        self._end.set()
        self._thread.join(ANSWER_SECONDS)
        if kind is None:
            if self._world.first:
                self._board.begin.remote("")
        else:
            self._tell()  # where exactly it ended

    def _beat(self) -> None:
        while not self._end.wait(SIGN_SECONDS):
            self._tell()

    def _tell(self) -> None:
        import ray

        try:
            asked = ray.get(self._board.sign.remote(self._sign()), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return  # the driver is gone or busy; a later sign will do
        self._stop_asked = self._stop_asked or bool(asked)

    def _sign(self) -> Sign:
        import psutil
        import ray

        step, phase, batch = self._place
        return Sign(
            start_id=self._start_id,
            rank=self._world.rank,
            ranks=self._world.size,
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            node=ray.get_runtime_context().get_node_id(),
            start=self._start,
            step=step,
            phase=phase,
            batch=batch,
            step_seconds=self._step_seconds,
            longest=self._own.longest,
            own=self._own.usual,
        )


def _listen_for_sigterm() -> None:
    """Set `ASKED_TO_END` at SIGTERM; a second one ends the worker as usual.

    Python takes signal handlers in the main thread only, which runs the calls of Ray's actor; the
    training function runs in another one.
    """
    import ray

    ray.get(ray.get_runtime_context().current_actor.execute.remote(_take_sigterm))


def _take_sigterm() -> None:
    usual = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        ASKED_TO_END.set()
        signal.signal(signal.SIGTERM, usual)

    signal.signal(signal.SIGTERM, note)


class Watchdog:
    """The driver's eye on the signs of life."""

    def __init__(self, board: Any, store: Store, run: str, hang_seconds: float) -> None:
        self._board, self._store, self._seconds = board, store, hang_seconds
        self._journal = Journal(store, run)
        self._replaced: set[str] = set()
        self._looked = 0.0
        self._slow: tuple[int, int] = (-1, 0)
        self._named: set[tuple[str, int]] = set()
        self._told: set[tuple[str, int, int]] = set()
        self.slow_rank = -1

    def look(self) -> None:
        """Read the signs, at most once per `SIGN_SECONDS`, and act on them.

        Raises:
            ray.exceptions.RayError: if the board is gone.
        """
        import ray

        if time.monotonic() - self._looked < SIGN_SECONDS:
            return
        self._looked = time.monotonic()
        signs = ray.get(self._board.signs.remote(), timeout=30)
        suspects = guard.hung(signs, self._seconds)
        if suspects and suspects[0].start_id not in self._replaced:
            self._replaced.add(suspects[0].start_id)
            silent = {sign.rank: still for sign, _, still in signs}
            self._replace(suspects[:MOST_DUMPS], silent)
        self._tell_silent(signs)
        self._note_slow([sign for sign, _, _ in signs])

    def _tell_silent(self, signs: Sequence[tuple[Sign, float, float]]) -> None:
        """Once per rank and step, of those from which no sign comes at all."""
        for sign, since, _ in signs:
            key = (sign.start_id, sign.rank, sign.step)
            if since >= WORTH_A_WORD and key not in self._told:
                self._told.add(key)
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - since))
                progress.say(
                    f"pretrain: rank {sign.rank} (process {sign.pid} on node {sign.node[:8]}) at "
                    f"step {sign.step}, {sign.phase}, silent since {when} UTC"
                )

    def _replace(self, suspects: Sequence[Sign], seconds: Mapping[int, float]) -> None:
        """Dump their stacks and kill them; Ray Train then starts all workers again."""
        for sign in suspects:
            stack = on_node(sign.node, dump_and_kill, sign.pid, sign.born)
            if stack is None:
                continue  # died in the meantime, which Ray Train sees by itself
            path = f"runs/{self._journal.run}/stacks/{time.time_ns()}-rank{sign.rank}.txt"
            self._store.write(f"{self._store.base}/{path}", _writer_of(stack))
            self._journal.write(
                "hung_rank",
                rank=sign.rank,
                pid=sign.pid,
                node=sign.node,
                step=sign.step,
                phase=sign.phase,
                silent_seconds=round(seconds[sign.rank], 1),
                stacks=path,
            )

    def _note_slow(self, signs: Sequence[Sign]) -> None:
        found = guard.slow(signs)
        rank = found.rank if found else -1
        self._slow = (rank, self._slow[1] + 1 if rank == self._slow[0] else 1)
        if self._slow[1] < SLOW_LOOKS:
            return
        self.slow_rank = rank
        if found is None or (found.start_id, rank) in self._named:
            return
        self._named.add((found.start_id, rank))
        others = sorted(sign.own for sign in signs if sign.rank != rank)
        self._journal.write(
            "slow_rank",
            rank=rank,
            pid=found.pid,
            node=found.node,
            step=found.step,
            own_seconds=found.own,
            others_seconds=others[len(others) // 2],
        )


@dataclass(frozen=True)
class Ending:
    """Of one start of the workers."""

    step: int | None
    """Steps done, as far as is known."""
    diagnosis: str = ""
    """Why it is no use to start again, with the documents; empty where it is."""


class Deaths:
    """How the starts of the workers ended, under one command. Lives in Ray Train's controller."""

    def __init__(self, board: Any, suspects: Suspects) -> None:
        self._board, self._suspects = board, suspects
        self._known: list[guard.Death] = []

    def another(self, errors: Sequence[str]) -> Ending:
        """Add the end of a start.

        Args:
            errors: of the workers that had a word to say.
        """
        import ray

        try:
            signs = [sign for sign, _, _ in ray.get(self._board.signs.remote(), timeout=30)]
            # The next start may die before it gives a sign, and is not to be judged by these.
            self._board.begin.remote("")
        except ray.exceptions.RayError:
            return Ending(None)
        death = guard.death(signs, errors)
        if death is None:
            return Ending(None)
        self._known.append(death)
        reason = guard.crash_loop(self._known)
        batch = max(sign.batch for sign in signs)
        return Ending(death.step, f"{reason}; {named(self._suspects.of(batch))}" if reason else "")


def _writer_of(text: str) -> Callable[[Any], object]:
    return lambda stream: stream.write(text.encode())


def on_node(node: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on a node; None where the node is gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(work)
    try:
        return ray.get(task.remote(*arguments), timeout=DUMP_SECONDS * 3)
    except (ray.exceptions.RayError, TimeoutError):
        return None


def dump_and_kill(pid: int, born: float) -> str | None:
    """Stacks of a process of this host, then SIGKILL; None where it is there no more.

    Args:
        born: Unix time at which it began.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - born) > 1 or process.status() == psutil.STATUS_ZOMBIE:
            return None
        state = process.status()
        stack = _stacks(pid, stopped=state == psutil.STATUS_STOPPED)
        process.kill()
    except psutil.NoSuchProcess:
        return None
    return f"process {pid}, {state}\n{stack}"


def _stacks(pid: int, *, stopped: bool) -> str:
    """Of all threads; a process that is stopped already cannot be stopped to be read."""
    beside = Path(sys.executable).with_name(PROFILER)
    command = [str(beside) if beside.exists() else PROFILER]
    command += ["dump", "--pid", str(pid), *(["--nonblocking"] if stopped else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}"
    return done.stdout or f"no stacks: {done.stderr.strip()}"


def stoppable(work: Callable[[], None], ask: Callable[[], bool], grace: float) -> None:
    """Run something long that Ctrl-C or SIGTERM ask to end, and that then has time to.

    A second Ctrl-C ends it at once.

    Args:
        ask: tells it; returns whether it is worth waiting.

    Raises:
        KeyboardInterrupt: after it was asked to end.
    """
    failures: list[BaseException] = []
    # Not `Thread.join`: interrupted by a signal, Python 3.11's takes the thread for ended.
    over = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=run, daemon=True, name="stoppable")
    with _sigterm_interrupts():
        try:
            thread.start()
            while not over.wait(0.2):
                pass
        except KeyboardInterrupt:
            if ask():
                over.wait(grace)
            raise
    if failures:
        raise failures[0]


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as if it were Ctrl-C; only the main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def asked_to_stop(board: Any) -> bool:
    """Ask the workers behind a board to commit and end; tells whether any were at work."""
    import ray

    try:
        board.stop.remote()
        signs = ray.get(board.signs.remote(), timeout=5)
    except (ray.exceptions.RayError, HeliostatError):
        return False
    # Signs come once a second: the last ones may be from before a step that is done by now.
    return bool(signs) and len(signs) == signs[0][0].ranks
