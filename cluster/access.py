"""Ray's token: made for its owner alone, and whether a cluster is closed to who lacks it.

Whoever holds the token runs code on every node. It never stands in a launcher file, in a job's
arguments or in a runtime environment: files travel by SSH, and Ray's own clients read them.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, UsageError

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def token_path() -> Path:
    """Where Ray looks for a token that its environment does not give."""
    return Path.home() / ".ray" / "auth_token"


def make_token() -> bool:
    """A token file that only its owner can read; one that is there stays. Tells whether it is new.

    Ray would write the file itself, readable for everyone under the usual umask.
    """
    path = token_path()
    if path.exists():
        return False
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written aside, then linked: whoever finds the file finds the whole token in it.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
    return True


def check_own(path: Path) -> None:
    """
    Raises:
        UsageError: if others than its owner can read a token file.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        raise UsageError(
            f"{path} has mode {mode:04o} and others can read it: chmod 600 {path}; if others use "
            "this machine, remove it and make another with `heliostat cluster token`"
        )


def read_token() -> str | None:
    """The token that Ray's clients would use, from the places where they look; None without one."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or token_path()).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def token_file() -> Path:
    """The file that holds the token of `read_token`, for programs that take it from one.

    Raises:
        UsageError: if it is in the environment only.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or token_path()).expanduser()
    try:
        held = path.read_text(encoding="utf-8").strip()
    except OSError:
        held = ""
    if held != read_token():
        raise UsageError(
            f"the token is in $RAY_AUTH_TOKEN, not in {path}: write it there (mode 0600), or name "
            "its file with RAY_AUTH_TOKEN_PATH"
        )
    check_own(path)
    return path.absolute()


JOBS = "/api/jobs/"


def check_closed(address: str) -> int:
    """That a cluster answers who has the token, and nobody else.

    Returns:
        Number of jobs that it knows.

    Raises:
        ClusterError: with the cure.
    """
    stranger = Dashboard(address, token=None).status(JOBS)
    if stranger != 401:
        raise ClusterError(
            f"{address}{JOBS} answers {stranger} to who has no token, not 401: anyone who reaches "
            "it can run code there. Stop it, put one token on every node as ~/.ray/auth_token and "
            "start each with RAY_AUTH_MODE=token"
        )
    token = read_token()
    if token is None:
        raise ClusterError(
            f"{address} is closed, and there is no token here: copy the cluster's to {token_path()}"
            " (mode 0600), or give RAY_AUTH_TOKEN_PATH"
        )
    return len(Dashboard(address, token).get(JOBS))
