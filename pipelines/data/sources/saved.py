"""Folders that Hugging Face `datasets` saved: which of their files hold rows.

`Dataset.save_to_disk` writes Arrow files, `dataset_info.json` and `state.json`, which names the
Arrow files; a `DatasetDict` is a folder of such folders beside `dataset_dict.json`. What `map` and
`filter` cached beside them (`cache-*.arrow`) belongs to no dataset any more.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipelines.data.sources.files import Reject

INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"
MAX_STATE_BYTES = 64 << 20


@dataclass(frozen=True)
class Rows:
    """Files of a folder without what says something about rows, or is left over."""

    files: tuple[str, ...]
    """Paths inside of the folder."""
    rejects: tuple[Reject, ...]
    ignored: Counter[str]
    """As in `Listing`."""


def rows(source: str, files: Sequence[str], read: Callable[[str], bytes]) -> Rows:
    """
    Args:
        files: paths inside of a folder.
        read: content of one of them; `OSError` where it cannot be read.
    """
    present, beside, rejects = set(files), set[str](), list[Reject]()
    for folder in sorted({_parent(f) for f in files if PurePosixPath(f).name == STATE}):
        if f"{folder}{INFO}" not in present:
            continue
        listed = _data_files(read, f"{folder}{STATE}")
        if listed is None:
            reason = "not the state of a saved dataset, so that its files are unknown"
            rejects.append(Reject(f"{source}/{folder}{STATE}", None, reason))
            listed = []
        data = {f"{folder}{name}" for name in listed}
        lost = sorted(data - present)
        rejects += [
            Reject(f"{source}/{name}", None, "named by state.json, and gone") for name in lost
        ]
        inside = {f for f in files if _parent(f) == folder}
        beside |= {f for f in inside if f.endswith((".arrow", INFO, STATE))} - data
    beside |= {f for f in files if PurePosixPath(f).name == SPLITS}
    ignored = Counter({"bookkeeping of a saved dataset": len(beside)})
    return Rows(tuple(f for f in files if f not in beside), tuple(rejects), +ignored)


def _parent(path: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return folder + slash


def _data_files(read: Callable[[str], bytes], path: str) -> list[str] | None:
    """File names only: a path would lead out of the folder."""
    try:
        names = [entry["filename"] for entry in json.loads(read(path))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    plain = all(isinstance(name, str) and "/" not in name and name != ".." for name in names)
    return names if plain else None
