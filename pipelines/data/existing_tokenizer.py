"""A tokenizer that somebody else trained, from a folder or a URI."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs
from tokenizers import Tokenizer

from cluster.errors import SourceError
from cluster.storage import located

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class Existing:
    serialized: str
    """`tokenizer.json`."""
    named: Mapping[str, str]
    """Control tokens by what `transformers` calls them; `eos_token` is always among them."""


def load(path: str) -> Existing:
    """
    Raises:
        SourceError: if it holds no fast tokenizer, or none that ends a text.
    """
    raw = _files(path)
    if FILES[0] not in raw:
        raise SourceError(
            f"data.tokenizer.path {path} holds no tokenizer.json: give the folder of a fast "
            "tokenizer (`AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)` writes one)"
        )
    try:
        serialized = raw[FILES[0]].decode()
        tokenizer = Tokenizer.from_str(serialized)
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise SourceError(f"data.tokenizer.path {path}: tokenizer.json: {error}") from None
    named = {n: t for n, t in _named(path, raw).items() if tokenizer.token_to_id(t) is not None}
    end = named.get("eos_token") or named.get("sep_token")
    if end is None:
        raise SourceError(
            f"data.tokenizer.path {path} names no token that ends a text: give tokenizer_config."
            "json an `eos_token` of its vocabulary"
        )
    return Existing(serialized, {"bos_token": end, "pad_token": end, **named, "eos_token": end})


def digest(path: str) -> dict[str, str]:
    """SHA-256 of the files that it is made of."""
    import hashlib

    return {name: hashlib.sha256(content).hexdigest() for name, content in _files(path).items()}


def _named(path: str, raw: Mapping[str, bytes]) -> dict[str, str]:
    named: dict[str, str] = {}
    for file in reversed(FILES[1:]):  # the config has the last word
        try:
            tree: Any = json.loads(raw.get(file, b"{}"))
        except ValueError as error:
            raise SourceError(f"data.tokenizer.path {path}: {file} is not JSON: {error}") from None
        for name in NAMES:
            token = tree.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            named |= {name: content} if isinstance(content, str) else {}
    return named


def _files(path: str) -> dict[str, bytes]:
    """Those of `FILES` that are there."""
    try:
        if "://" in path:
            filesystem, base = located(path)
        else:
            filesystem, base = fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
        found = {}
        for name in FILES:
            place = f"{base.rstrip('/')}/{name}"
            if filesystem.get_file_info(place).type == fs.FileType.File:
                with filesystem.open_input_stream(place) as stream:
                    found[name] = stream.read()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"data.tokenizer.path {path} cannot be read: {reason}") from None
    return found
