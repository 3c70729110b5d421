"""One live run per name: a lease in the store that its owner keeps warm.

    <root>/runs/<name>.lease     host:pid, a token, and when it was last renewed

A lease is refused while its owner lives: on the same host that can be asked, of another host a
heartbeat tells. Otherwise it is taken over. On a local disk a file lock makes the taking atomic;
elsewhere two that take it in the same second see in the next heartbeat which of them has it.
"""

import _thread
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.durable import storage_errors
from cluster.errors import StorageError
from cluster.holder import alive, myself
from cluster.storage import Store

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Without a heartbeat for so long, the owner on another host is taken for dead."""


class Lease:
    """Use through `held`."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._path = f"{store.base}/runs/{name}.lease"
        self._token, self._end = uuid.uuid4().hex, threading.Event()
        self.lost = ""
        """Who took it over; empty while it is ours."""

    def take(self) -> None:
        """
        Raises:
            StorageError: while another live run holds it.
        """
        with _exclusively(self._store, self._path):
            found = self._read()
            if found is not None and _lives(found):
                raise StorageError(
                    f"{self._name} is being trained by process {found['holder']}: wait for it, "
                    "or give this run another name"
                )
            self._renew()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._keeper.start()

    def release(self) -> None:
        self._end.set()
        # Or its last heartbeat would bring back what is deleted here.
        self._keeper.join(timeout=HEARTBEAT_SECONDS)
        try:
            found = self._read()
            if found is not None and found["token"] == self._token:
                with storage_errors(f"remove {self._path}"):
                    self._store.filesystem.delete_file(self._path)
        except StorageError as error:
            # It must not hide why the run ended; without heartbeats the lease ends by itself.
            print(f"lease of {self._name}: {error}", flush=True)

    def _keep(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            try:
                found = self._read()
                if found is not None and found["token"] != self._token:
                    self.lost = str(found["holder"])
                    # The main thread sits in Ray; only a signal reaches it there.
                    _thread.interrupt_main()
                    return
                self._renew()
            except StorageError as error:
                print(f"lease of {self._name}: {error}", flush=True)

    def _renew(self) -> None:
        content = {"holder": myself(), "token": self._token, "renewed": time.time()}
        raw = json.dumps(content).encode()
        self._store.write(self._path, lambda stream: stream.write(raw))

    def _read(self) -> dict[str, Any] | None:
        raw = self._store.read(self._path)
        try:
            found = json.loads(raw or b"")
            return {key: found[key] for key in ("holder", "token", "renewed")}
        except (ValueError, TypeError, KeyError):
            return None


@contextmanager
def held(store: Store, name: str) -> Iterator[Lease]:
    """Hold the lease of a run's name.

    Raises:
        StorageError: while another live run holds it, or once another has taken it over because
            this one gave no sign of life.
    """
    lease = Lease(store, name)
    lease.take()
    try:
        yield lease
    except KeyboardInterrupt:
        if not lease.lost:
            raise
        raise StorageError(
            f"{name} was taken over by process {lease.lost}, because this run had given no sign "
            f"of life for {STALE_SECONDS:.0f} s: it goes on there"
        ) from None
    finally:
        lease.release()


def _lives(found: dict[str, Any]) -> bool:
    host, _, pid = str(found["holder"]).rpartition(":")
    if host == socket.gethostname():
        # One's own process may hold it in another thread; a fresh heartbeat says so.
        own = pid == str(os.getpid())
        return _fresh(found) if own else alive(found["holder"])
    return _fresh(found)


def _fresh(found: dict[str, Any]) -> bool:
    return time.time() - float(found["renewed"]) < STALE_SECONDS


@contextmanager
def _exclusively(store: Store, path: str) -> Iterator[None]:
    """Between processes that share a local disk; nothing elsewhere."""
    if not store.is_local:
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield
