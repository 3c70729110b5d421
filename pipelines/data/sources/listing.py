"""Which files the sources hold: builtin corpora, local files, folders and globs."""

import functools
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import SourceError
from pipelines.data.sources import remote, saved
from pipelines.data.sources.files import (
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    Listing,
    Payload,
    Reading,
    Reject,
    SourceFile,
    extension_of,
)
from pipelines.data.sources.opening import open_binary

BUILTIN = "builtin:"
DIGITS_SOURCE = "builtin:digits"
STDLIB_SOURCE = "builtin:python-stdlib"
PACKAGES_SOURCE = "builtin:package-docs"
REFERENCE_SOURCE = "builtin:python-reference"
BUILTINS: dict[str, Payload] = {
    STDLIB_SOURCE: "text",
    PACKAGES_SOURCE: "text",
    REFERENCE_SOURCE: "text",
    DIGITS_SOURCE: "image",
}
PACKAGE_DOCS = re.compile(r"METADATA|(?:LICEN[CS]E|COPYING|NOTICE|AUTHORS)\b.*", re.IGNORECASE)
"""Files beside an installed package that people wrote: its description, its licences."""
DIGITS_BYTES = 1797 * 64
"""1,797 images of 8 x 8 grey values."""
URL_LIST = ".urls"
"""Ending of a text file that names one URI per line."""
MAX_LIST_BYTES = 64 << 20
WAY_OUT = "a link that leads out of its source: name its target, or a folder that holds both"
REFUSED = {
    "an archive: unpack it first": ".tar .tgz .tbz2 .txz .zip .7z .rar .jar .whl",
    "a pickle: never opened, because it can run code": ".pkl .pickle .pt .pth .joblib",
}
_REFUSED = {ending: reason for reason, endings in REFUSED.items() for ending in endings.split()}


def listing(
    sources: Sequence[str], payload: Payload, readings: Mapping[str, Reading] | None = None
) -> Listing:
    """Find the files of every source.

    Args:
        readings: how files become documents, by source as the recipe names it.

    Raises:
        SourceError: if a source does not exist or has no file that fits the payload.
    """
    files: dict[str, SourceFile] = {}
    rejects: list[Reject] = []
    ignored: Counter[str] = Counter()
    for source in sources:
        found = _list_source(_named(source), payload)
        reading = (readings or {}).get(source, Reading())
        own = (replace(f, source=_named(source), reading=reading) for f in found.files)
        files.update((file.path, file) for file in own)
        rejects += found.rejects
        ignored.update(found.ignored)
    in_order = sorted(files.values(), key=lambda f: (f.source, f.path))
    return Listing(tuple(in_order), tuple(dict.fromkeys(rejects)), ignored)


def summary(sources: Sequence[str], found: Listing) -> dict[str, Any]:
    """What the fingerprint of a corpus covers: names, sizes and times of the files, not content.

    A builtin source is named by the version of the software that carries it instead.
    """
    tree: dict[str, Any] = {}
    for source in map(_named, sources):
        files = [f for f in found.files if f.source == source]
        builtin = source in BUILTINS
        rows = [[f.inside, f.size, 0 if builtin else f.mtime_ns] for f in files]
        tree[source] = {
            "files": len(files),
            "bytes": sum(f.size for f in files),
            "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        }
        if builtin:
            tree[source]["version"] = _builtin_version(source)
    return tree


def _named(source: str) -> str:
    return source.rstrip("/") or source


def _list_source(source: str, payload: Payload) -> Listing:
    if source.startswith(BUILTIN):
        return _list_builtin(source, payload)
    if source.endswith(URL_LIST):
        return _list_urls(source, payload)
    return _fitting(source, payload, _list_place(source))


def _list_place(source: str) -> Listing:
    if "://" not in source:
        return _list_local(source, Path(source).expanduser().absolute())
    if source.startswith("file://"):
        return _list_local(source, Path(remote.local_path(source)))
    return remote.listing(source)


def _list_urls(source: str, payload: Payload) -> Listing:
    """The files that a text file names by their URIs; lines that begin with `#` say nothing."""
    found = _list_place(source)
    if len(found.files) != 1:
        raise SourceError(f"data.sources: {source} is no single text file of URIs")
    urls = remote.read_list(found.files[0], MAX_LIST_BYTES)
    parts = [remote.listing(url) for url in urls]
    files = {file.path: file for part in parts for file in part.files}
    listed = [
        replace(file, path=f"{source}/{path}", inside=path) for path, file in sorted(files.items())
    ]
    return _fitting(source, payload, Listing(tuple(listed)))


def _list_builtin(source: str, payload: Payload) -> Listing:
    if source not in BUILTINS:
        raise SourceError(f"no source {source}: the builtin ones are {', '.join(BUILTINS)}")
    if BUILTINS[source] != payload:
        raise SourceError(
            f"{source} holds {BUILTINS[source]} documents and the recipe's family takes {payload}: "
            "give data.sources another source"
        )
    if source == DIGITS_SOURCE:
        return Listing((SourceFile(source, source, "", DIGITS_BYTES, 0, ""),))
    if source == PACKAGES_SOURCE:
        return _list_packages(source)
    if source == REFERENCE_SOURCE:
        topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
        return _local_files([(str(topics), f"{source}/{topics.name}", topics.name)])
    # Test suites are most of the bytes and little like the code that they test.
    tests = {"test", "tests", "idle_test"}
    outside = {"site-packages", "dist-packages", "__pycache__", *tests}
    found = _walk(source, Path(sysconfig.get_path("stdlib")), outside)
    files = [file for file in found.files if file.extension == ".py"]
    if not files:
        raise SourceError(f"{source}: this Python comes without the sources of its library")
    return Listing(tuple(files))


def _list_packages(source: str) -> Listing:
    top = Path(sysconfig.get_path("purelib"))
    found = sorted(
        path
        for folder in top.glob("*.dist-info")
        for path in folder.rglob("*")
        if PACKAGE_DOCS.fullmatch(path.name) and path.is_file()
    )
    if not found:
        raise SourceError(f"{source}: no package is installed beside this Python")
    inside = [path.relative_to(top).as_posix() for path in found]
    return _local_files(
        [(str(p), f"{source}/{name}", name) for p, name in zip(found, inside, strict=True)]
    )


def _builtin_version(source: str) -> str:
    if source == DIGITS_SOURCE:
        return f"scikit-learn {metadata.version('scikit-learn')}"
    return f"python {platform.python_version()}"


def _fitting(source: str, payload: Payload, found: Listing) -> Listing:
    """Keep files that a reader is for; one that was named itself, or all of whose kind were named
    by a pattern such as `*.en.gz`, is always tried."""
    known = TEXT_EXTENSIONS if payload == "text" else IMAGE_EXTENSIONS
    wanted = extension_of(source) if glob.has_magic(source) else None
    files: list[SourceFile] = []
    rejects: list[Reject] = []
    ignored = Counter(found.ignored)
    for file in found.files:
        ending = PurePosixPath(file.location.lower()).suffix
        reason = _REFUSED.get(file.extension) or _REFUSED.get(ending)
        if reason:
            rejects.append(Reject(file.path, None, reason))
        elif file.extension in known or file.path == source or file.extension == wanted:
            files.append(file)
        else:
            ignored[file.extension or "no extension"] += 1
    if not files and not found.rejects and not rejects:
        others = ", ".join(f"{n} {kind}" for kind, n in ignored.most_common(3))
        raise SourceError(
            f"data.sources: {source} holds no {payload} files"
            + (f" (only {others})" if others else "")
            + f": give files or folders of {', '.join(sorted(known)[:6])}, ..."
        )
    return Listing(tuple(files), (*found.rejects, *rejects), ignored)


def _list_local(source: str, path: Path) -> Listing:
    if glob.has_magic(str(path)) and not path.exists():
        return _list_glob(source, path)
    if path.is_dir():
        return _without_ways_out(path, _walk(source, path))
    if not path.exists():
        raise SourceError(f"data.sources: {source} does not exist")
    return _local_files([(str(path), source, path.name)])


def _list_glob(source: str, pattern: Path) -> Listing:
    matches = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    files = [path for path in matches if not path.is_dir()]
    if not files:
        raise SourceError(f"data.sources: no file matches {source}")
    base = os.path.commonpath([path.parent for path in files])
    inside = [path.relative_to(base).as_posix() for path in files]
    found = _local_files(
        [(str(p), f"{source}/{name}", name) for p, name in zip(files, inside, strict=True)]
    )
    parts = pattern.parts
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), parts)
    return _without_ways_out(Path(*plain), found)


def _without_ways_out(top: Path, found: Listing) -> Listing:
    """Whoever can put a link into a folder could have any file of this machine read.

    Args:
        top: what the recipe itself names; it may be a link.
    """
    root = os.path.realpath(top)
    real_folder = functools.cache(os.path.realpath)
    files: list[SourceFile] = []
    rejects = list(found.rejects)
    for file in found.files:
        folder, name = os.path.split(file.location)
        linked = os.path.islink(file.location)
        target = os.path.realpath(file.location) if linked else f"{real_folder(folder)}/{name}"
        if os.path.commonpath([root, target]) == root:
            files.append(file)
        else:
            rejects.append(Reject(file.path, None, WAY_OUT))
    return Listing(tuple(files), tuple(rejects), found.ignored)


def _walk(source: str, top: Path, outside: Container[str] = ()) -> Listing:
    """Every file below a folder. Hidden ones are counted; linked folders are not entered, because
    links may form a circle.

    Args:
        outside: names of folders that do not belong to the source.
    """
    entries: list[tuple[str, str, str]] = []
    rejects: list[Reject] = []
    ignored: Counter[str] = Counter()
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=unreadable.append):
        inside = os.path.relpath(folder, top)
        prefix = "" if inside == "." else f"{inside}/"
        before = list(folders)
        visible = [n for n in folders if not n.startswith(".") and n not in outside]
        linked = [n for n in visible if os.path.islink(os.path.join(folder, n))]
        rejects += [
            Reject(_printable(f"{source}/{prefix}{name}"), None, "a link to a folder")
            for name in linked
        ]
        folders[:] = [name for name in visible if name not in linked]
        hidden = sum(name.startswith(".") for name in [*before, *names])
        ignored.update({"hidden": hidden} if hidden else {})
        entries += [
            (os.path.join(folder, name), f"{source}/{prefix}{name}", f"{prefix}{name}")
            for name in names
            if not name.startswith(".")
        ]
    rejects += [
        Reject(_printable(str(error.filename)), None, f"cannot be read: {_why(error)}")
        for error in unreadable
    ]
    by_inside = {entry[2]: entry for entry in entries}
    data = saved.rows(source, list(by_inside), lambda inside: _bounded(by_inside[inside][0]))
    found = _local_files([by_inside[inside] for inside in data.files])
    rejects += [*data.rejects, *found.rejects]
    return Listing(found.files, tuple(rejects), ignored + data.ignored)


def _bounded(path: str) -> bytes:
    with open_binary(SourceFile(path, path, "", 0, 0, "")) as stream:
        return stream.read(saved.MAX_STATE_BYTES)


def _local_files(entries: Sequence[tuple[str, str, str]]) -> Listing:
    """Files by (location, shown path, path inside of the source)."""
    files: list[SourceFile] = []
    rejects: list[Reject] = []
    for location, shown, inside in entries:
        if shown != _printable(shown):
            rejects.append(Reject(_printable(shown), None, "its name is not UTF-8"))
            continue
        try:
            info = os.stat(location)
        except OSError as error:
            rejects.append(Reject(shown, None, _why(error)))
            continue
        if stat.S_ISREG(info.st_mode):
            files.append(SourceFile(shown, location, "", info.st_size, info.st_mtime_ns, inside))
        else:
            rejects.append(Reject(shown, None, "not a regular file"))
    return Listing(tuple(files), tuple(rejects))


def _printable(text: str) -> str:
    """File names are bytes; those that are not UTF-8 are shown with escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
