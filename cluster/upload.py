"""A job's working directory: what of a folder goes to the cluster, and how much that is."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UsageError

LARGEST = 500 << 20
"""Ray takes no larger package (RAY_max_grpc_message_size); it keeps it in the head's memory."""
MOST_NAMED = 3


@dataclass(frozen=True)
class Upload:
    folder: Path
    files: int
    size: int
    """Bytes before they are packed."""
    largest: tuple[tuple[str, int], ...]
    """Entries of the folder by their bytes, the largest first."""

    def line(self) -> str:
        return f"{self.folder}: {self.files} files, {shown(self.size)}"


def shown(size: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def measure(folder: Path) -> Upload:
    """What Ray will take of a folder: all but what .rayignore and .gitignore name.

    Raises:
        UsageError: if it is no folder, or more than Ray takes, with what is large in it.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(f"the working directory {folder} is not a folder")
    sizes: Counter[str] = Counter()
    files = 0
    for path in _taken(folder):
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
            files += 1
    largest = tuple(sizes.most_common(MOST_NAMED))
    upload = Upload(folder, files, sizes.total(), largest)
    if upload.size >= LARGEST:
        named = ", ".join(f"{name} {shown(size)}" for name, size in largest)
        raise UsageError(
            f"{upload.line()}, more than the {shown(LARGEST)} that Ray takes: name in "
            f"{folder}/.rayignore what the job does not need ({named})"
        )
    return upload


def _taken(folder: Path) -> list[Path]:
    """As Ray walks it, by its own rules."""
    from ray._private.runtime_env import packaging

    found: list[Path] = []
    git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.getLogger(f"{__name__}.walk")
    quiet.setLevel(logging.ERROR)
    packaging._dir_travel(folder, [], found.append, include_gitignore=git, logger=quiet)
    return found
