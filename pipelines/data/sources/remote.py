"""Files behind URIs: object stores through pyarrow, HTTP through fsspec."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from pyarrow import fs

from cluster.errors import SourceError
from cluster.storage import located
from pipelines.data.sources import saved
from pipelines.data.sources.files import Listing, SourceFile
from pipelines.data.sources.opening import http_filesystem, is_http, open_binary, why


def listing(source: str) -> Listing:
    """Files of a URI: one object, everything below a prefix, or a pattern with `*`.

    `*` matches any characters, `/` among them. HTTP has no folders: each URI is one file.

    Raises:
        SourceError: if there is nothing, or the place cannot be reached.
    """
    if is_http(source):
        return Listing((_http_file(source),))
    root = source.split("*", 1)[0].rpartition("/")[0] if "*" in source else source
    try:
        filesystem, base = located(root)
        return list_filesystem(source, root, filesystem, base.rstrip("/"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"data.sources: {source} cannot be listed: {reason}") from None


def local_path(uri: str) -> str:
    """Path of a `file://` URI, patterns included.

    Raises:
        SourceError: if it names another host or is no URI.
    """
    root = uri.split("*", 1)[0].rpartition("/")[0] if "*" in uri else uri
    try:
        base = located(root)[1]
    except (OSError, ValueError) as error:
        raise SourceError(f"data.sources: {uri} cannot be listed: {error}") from None
    return base + uri[len(root) :]


def list_filesystem(source: str, root: str, filesystem: fs.FileSystem, base: str) -> Listing:
    """The listing of `base` in a filesystem that `root` opens.

    Raises:
        SourceError: if there is nothing.
    """
    here = filesystem.get_file_info(base)
    if here.type == fs.FileType.File:
        infos = [here]
    else:
        infos = filesystem.get_file_info(
            fs.FileSelector(base, allow_not_found=True, recursive=True)
        )
    pattern = base + source[len(root) :]
    files: dict[str, SourceFile] = {}
    for info in sorted(infos, key=lambda info: info.path):
        if info.type != fs.FileType.File:
            continue
        if "*" in source and not fnmatchcase(info.path, pattern):
            continue
        inside = info.path[len(base) :].lstrip("/")
        shown = f"{source}/{inside}" if inside else source
        files[inside] = SourceFile(
            shown, info.path, root, info.size or 0, info.mtime_ns or 0, inside
        )
    if not files:
        raise SourceError(f"data.sources: there is nothing at {source}")

    def content(inside: str) -> bytes:
        with open_binary(files[inside]) as stream:
            return stream.read(saved.MAX_STATE_BYTES)

    found = saved.rows(source, list(files), content)
    return Listing(tuple(files[inside] for inside in found.files), found.rejects, found.ignored)


def read_list(file: SourceFile, max_bytes: int) -> list[str]:
    """The URIs that a text file names, one per line.

    Raises:
        SourceError: naming the line that is none, or why the file cannot be read.
    """
    try:
        with open_binary(file) as stream:
            raw = stream.read(max_bytes + 1)
        lines = raw.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(f"data.sources: {file.path}: {why(error)}") from None
    except UnicodeDecodeError:
        raise SourceError(f"data.sources: {file.path} is not UTF-8: save it as UTF-8") from None
    if len(raw) > max_bytes:
        raise SourceError(f"data.sources: {file.path} has over {max_bytes} bytes: cut it")
    return list(_uris(file.path, lines))


def _uris(path: str, lines: Iterable[str]) -> Iterable[str]:
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if "://" not in line or line.startswith("file:"):
            raise SourceError(
                f"data.sources: line {number} of {path} is no URI of a remote file: write "
                "https://..., s3://... or gs://..., or give local files as sources of their own"
            )
        yield line


def _http_file(url: str) -> SourceFile:
    """
    Raises:
        SourceError: if the server does not give it, or does not say how long it is.
    """
    try:
        info = http_filesystem().info(url)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"data.sources: {url} cannot be reached: {reason}") from None
    stamp = str(info.get("ETag") or info.get("Last-Modified") or "")
    digest = hashlib.blake2b(stamp.encode(), digest_size=7).digest()
    name = url.split("?", 1)[0].rpartition("/")[2]
    file = SourceFile(url, url, url, int(info.get("size") or 0), int.from_bytes(digest), name)
    return replace(file, mtime_ns=0) if not stamp else file
