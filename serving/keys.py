"""`heliostat keys`: make, list and revoke the API keys of a store."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import UsageError
from cluster.session import open_store
from serving.auth import SCOPES, Key, KeyFile, Quota, new_key, until

MAX_NAME = 64


def create(
    config: RunConfig,
    name: str,
    scopes: Sequence[str],
    expires: str | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrent: int | None,
) -> str:
    """
    Returns:
        The key, which nobody can read again.

    Raises:
        UsageError: for a name, a scope or a duration that is none.
    """
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise UsageError(f"a key's name has 1 to {MAX_NAME} printable characters, not {name!r}")
    unknown = next((scope for scope in scopes if scope not in SCOPES), None)
    if unknown is not None:
        raise UsageError(f"--scope {unknown}: the scopes are {', '.join(SCOPES)}")
    quota = Quota(requests_per_minute, tokens_per_minute, concurrent)
    for field, value in vars(quota).items():
        if value is not None and value < 1:
            raise UsageError(
                f"--{field.replace('_', '-')} {value}: give 1 or more, or leave it out"
            )
    secret, key = new_key(name, scopes or SCOPES, until(expires, time.time()), quota)
    file = KeyFile(open_store(config))
    file.add(key)
    progress.say(
        f"key {key.id} ({name}) may {' and '.join(key.scopes)}{_end(key)}. It is shown this once; "
        f"its digest is in {file.place}. A running service takes it within seconds."
    )
    return secret


def listing(config: RunConfig) -> list[str]:
    """A line per key, without anything that opens a door."""
    keys = KeyFile(open_store(config)).read()
    return [_line(key) for key in keys or ()]


def revoke(config: RunConfig, identity: str) -> None:
    """
    Raises:
        UsageError: if no single key has this id or name.
    """
    key = KeyFile(open_store(config)).revoke(identity)
    progress.say(f"key {key.id} ({key.name}) is revoked; running services refuse it within 10 s")


def _line(key: Key) -> str:
    quota = " ".join(f"{name}={value}" for name, value in vars(key.quota).items() if value)
    state = key.state(time.time())
    made = datetime.fromtimestamp(key.created, UTC).strftime("%Y-%m-%d")
    return f"{key.id}  {state:<8} {made}  {','.join(key.scopes):<18} {key.name}{_end(key)} {quota}"


def _end(key: Key) -> str:
    if key.expires is None:
        return ""
    return f", until {datetime.fromtimestamp(key.expires, UTC).strftime('%Y-%m-%d %H:%M')} UTC"
