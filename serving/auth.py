"""API keys: who may ask for what. Random, kept as digests, revocable within seconds.

The keys of a store lie in `<root>/keys.json` (mode 0600 on a disk), or, where the environment has
`HELIOSTAT_KEYS`, in that variable, with the same content: for clusters that hand out secrets.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.durable import durable
from cluster.errors import ConfigError, StorageError, UsageError
from cluster.storage import Store

ENVIRONMENT = "HELIOSTAT_KEYS"
FILE = "keys.json"
SCOPES = ("generate", "classify")
FORMAT = re.compile(r"^hst-([0-9a-f]{12})-[A-Za-z0-9_-]{43}$")
SECRET_BYTES = 32
DAYS = re.compile(r"^([1-9]\d{0,4})([dhm])$")
SECONDS = {"d": 86_400, "h": 3_600, "m": 60}
NOBODY = hashlib.sha256(b"nobody").hexdigest()
"""What an unknown key is compared with, so that the time tells nothing."""


@dataclass(frozen=True)
class Quota:
    """None allows any number."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None

    @property
    def bounded(self) -> bool:
        return self != Quota()


@dataclass(frozen=True)
class Key:
    """What is stored of a key: everything but the key."""

    id: str
    name: str
    digest: str
    """SHA-256, hexadecimal. The key has 256 random bits: nothing is gained by a slower hash."""
    scopes: tuple[str, ...] = SCOPES
    created: int = 0
    """Unix time, seconds; so are the next two."""
    expires: int | None = None
    revoked: int | None = None
    quota: Quota = Quota()

    def state(self, now: float) -> str:
        """`valid`, `revoked` or `expired`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(
    name: str,
    scopes: Sequence[str] = SCOPES,
    expires: int | None = None,
    quota: Quota = Quota(),  # noqa: B008 (frozen)
) -> tuple[str, Key]:
    """The key itself, shown once, and what is stored of it."""
    identity = secrets.token_hex(6)
    secret = f"hst-{identity}-{secrets.token_urlsafe(SECRET_BYTES)}"
    stored = Key(
        identity, name, digest(secret), tuple(scopes), int(time.time()), expires, None, quota
    )
    return secret, stored


def find(keys: Sequence[Key], presented: str) -> Key | None:
    """The key that was presented, whatever its state; compared in constant time."""
    match = FORMAT.match(presented)
    known = next((key for key in keys if match and key.id == match[1]), None)
    same = hmac.compare_digest(digest(presented), known.digest if known else NOBODY)
    return known if same else None


def encode(keys: Sequence[Key]) -> bytes:
    tree = {"version": 1, "keys": [asdict(key) for key in keys]}
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def decode(content: bytes, place: str) -> tuple[Key, ...]:
    """
    Raises:
        ConfigError: if it is not what `encode` writes.
    """
    try:
        return tuple(_key(tree) for tree in json.loads(content)["keys"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{place} does not hold the keys that `heliostat keys create` writes: restore it, or "
            "remove it and create new keys"
        ) from None


def _key(tree: dict[str, Any]) -> Key:
    fields = dict(tree)
    fields["scopes"] = tuple(fields["scopes"])
    fields["quota"] = Quota(**fields["quota"])
    return Key(**fields)


@dataclass(frozen=True)
class KeyFile:
    """The keys of a store."""

    store: Store

    @property
    def place(self) -> str:
        return self.store.uri_of(self._path)

    @property
    def _path(self) -> str:
        return f"{self.store.base}/{FILE}"

    def read(self) -> tuple[Key, ...] | None:
        """None where there is no key file.

        Raises:
            ConfigError: if others may read it, or it is damaged.
            StorageError: if storage cannot be read.
        """
        if ENVIRONMENT in os.environ:
            return decode(os.environ[ENVIRONMENT].encode(), f"${ENVIRONMENT}")
        content = self.store.read(self._path)
        if content is None:
            return None
        self._check_mode()
        return decode(content, self.place)

    def add(self, key: Key) -> None:
        with self._changing() as keys:
            keys.append(key)

    def revoke(self, identity: str) -> Key:
        """By id or name.

        Raises:
            UsageError: if there is none, or several of that name.
        """
        with self._changing() as keys:
            found = [k for k in keys if identity in (k.id, k.name) and k.revoked is None]
            if len(found) != 1:
                problem = f"{len(found)} keys are named" if found else "no valid key is named"
                raise UsageError(f"{problem} {identity}: take an id from `heliostat keys list`")
            revoked = replace(found[0], revoked=int(time.time()))
            keys[keys.index(found[0])] = revoked
        return revoked

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        if ENVIRONMENT in os.environ:
            raise UsageError(
                f"the keys are in ${ENVIRONMENT}, which this command cannot change: unset it, "
                f"change {self.place}, and hand its content out again"
            )
        with self._locked():
            keys = list(self.read() or ())
            yield keys
            self._write(encode(keys))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time on a disk; object stores have no locks, the last one wins there."""
        if not self.store.is_local:
            yield
            return
        Path(self.store.base).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, content: bytes) -> None:
        if not self.store.is_local:
            self.store.write(self._path, lambda stream: stream.write(content))
            return
        # Nobody else may read it at any moment, not even before it has its name.
        before = os.umask(0o077)
        try:
            with durable(Path(self._path)) as stream:
                stream.write(content)
        except OSError as error:
            raise StorageError(f"cannot write {self.place}: {error.strerror}") from None
        finally:
            os.umask(before)

    def _check_mode(self) -> None:
        if not self.store.is_local:
            return
        mode = Path(self._path).stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(
                f"{self.place} has mode {mode:04o} and others could read or change it: run "
                f"`chmod 600 {self._path}`"
            )


class KeyRing:
    """The keys as an ingress knows them: read again often enough that a change holds in seconds.

    Args:
        read: the keys now, None where there is no key file. Blocking; runs on a thread.
        clock: monotonic, seconds.
    """

    FRESH_SECONDS = 3.0
    """A change is looked for at the first request after so long; nobody waits for it."""
    STALE_SECONDS = 8.0
    """After so long without a look, requests wait for one: a revoked key is refused within ten."""

    def __init__(
        self,
        read: Callable[[], tuple[Key, ...] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._clock = read, clock
        self._read_at = float("-inf")
        self.keys: tuple[Key, ...] | None = None

    @property
    def age(self) -> float:
        return self._clock() - self._read_at

    def load(self) -> None:
        """
        Raises:
            HeliostatError: if the keys cannot be read; those known before are forgotten only when
                they are stale.
        """
        began = self._clock()
        keys = self._read()
        # A key file that vanishes must not open the service: from then on nobody has a key.
        self.keys = () if keys is None and self.keys is not None else keys
        self._read_at = began


def until(duration: str | None, now: float) -> int | None:
    """Unix time at the end of `30d`, `12h` or `15m` from now.

    Raises:
        UsageError: for anything else.
    """
    if duration is None:
        return None
    match = DAYS.match(duration)
    if match is None:
        raise UsageError(f"--expires {duration}: give a number and d, h or m, such as 30d")
    return int(now) + int(match[1]) * SECONDS[match[2]]
