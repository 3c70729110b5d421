"""Ends a save before each of its writes, renames, syncs and removals, one process per boundary.

`python -m tests.boundaries FOLDER [EVERY]` prints one line of JSON: how many boundaries of each
kind a save has, and how often which step was found after a death at each, or at every EVERYth.
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from cluster.storage import Damage, Store
from pipelines.training.checkpoint import newest
from tests import saving


class Deaths:
    """Counts boundaries, and dies at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.kinds = at, list[str]()

    def pass_by(self, kind: str) -> bool:
        """Tells a write that it is to die half-way; every other boundary dies here."""
        self.kinds.append(kind)
        if len(self.kinds) - 1 != self.at:
            return False
        if kind != "write":
            os._exit(9)
        return True


class Stream:
    """A file whose writes may be torn."""

    def __init__(self, stream: Any, deaths: Deaths) -> None:
        self._stream, self._deaths = stream, deaths

    def write(self, chunk: Any) -> int:
        if self._deaths.pass_by("write"):
            raw = bytes(chunk)
            self._stream.write(raw[: len(raw) // 2])
            self._stream.flush()
            os._exit(9)
        return int(self._stream.write(chunk))

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Disk(fs.LocalFileSystem):
    """Removes a folder as an operating system does: one file after another."""

    deaths: Deaths

    def delete_file(self, path: str) -> None:
        self.deaths.pass_by("remove")
        os.unlink(path)

    def delete_dir(self, path: str) -> None:
        for entry in sorted(Path(path).rglob("*"), reverse=True):
            self.deaths.pass_by("remove")
            entry.rmdir() if entry.is_dir() else entry.unlink()
        os.rmdir(path)


def watch(store: Store, deaths: Deaths) -> None:
    """Put the counter between durable writes and the disk, in this process."""
    usual = Path.open, Path.replace

    def opened(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        if mode != "wb":
            return usual[0](self, mode, *args, **more)
        deaths.pass_by("open")
        return Stream(usual[0](self, mode, *args, **more), deaths)

    def replaced(self: Path, target: Path) -> Path:
        deaths.pass_by("rename")
        return usual[1](self, target)

    def synced(descriptor: int) -> None:
        deaths.pass_by("sync")

    Path.open, Path.replace, os.fsync = opened, replaced, synced  # type: ignore[method-assign]
    disk = Disk()
    disk.deaths = deaths
    store.__dict__["_opened"] = (disk, store.base)


def die_at(root: Path, boundary: int) -> tuple[int, dict[str, int]]:
    """Save a third checkpoint in a child that dies at a boundary; its status and what it passed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        deaths = Deaths(boundary)
        store = Store(str(root))
        watch(store, deaths)
        saving.save(store, 3)
        os.write(writer, json.dumps(dict(Counter(deaths.kinds))).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    kinds = os.read(reader, 1 << 16)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), json.loads(kinds or b"{}")


def after(root: Path) -> int:
    """What is found after a death, once all of it was checked: the step."""
    store = Store(str(root))
    found = newest(store, saving.NAME, saving.RUN)
    assert found is not None
    step = saving.check(found)
    made = saving.save(store, 4)
    assert newest(store, saving.NAME, saving.RUN) == made and saving.check(made) == 4
    survey = list(store.survey("checkpoint", saving.NAME))
    assert not [item for item in survey if isinstance(item, Damage)], survey
    assert len(survey) == 2, "what is kept"
    return step


def main(folder: Path, every: int) -> None:
    torch.set_num_threads(1)
    # What a process wrote outlives its death without a sync, which only takes time here.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    template = folder / "template"
    for step in (1, 2):
        saving.save(Store(str(template)), step)
    found, boundary, code, kinds = Counter[int](), 0, 9, dict[str, int]()
    while code == 9:
        root = folder / f"at-{boundary}"
        shutil.copytree(template, root)
        code, kinds = die_at(root, boundary)
        found[after(root)] += code == 9
        shutil.rmtree(root)
        boundary += every
    assert code == 0, f"the save ended with {code}"
    print(json.dumps({"kinds": kinds, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
