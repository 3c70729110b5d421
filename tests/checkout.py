"""A user's checkout, somewhere else."""

import shutil
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def checkout(target: Path, names: Sequence[str]) -> Path:
    """Copies of some files and folders of this one in a new folder."""
    target.mkdir()
    for name in names:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target
