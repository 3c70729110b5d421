"""Encryption of a corpus at rest: Parquet modular encryption (AES-256-GCM, footers included).

One key is in the environment of every node and never in a config, a log, an artifact or an argument
of a task. Each file is encrypted with a key of its own that follows from that one and from the
file's place, so that no two files share a key and a file that was moved or exchanged is refused.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet.encryption as pe

from cluster.errors import UsageError

VARIABLE = "HELIOSTAT_CORPUS_KEY"
_HEX = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Sealing:
    """Whether and how the files of a corpus are encrypted. Holds no key."""

    on: bool = False

    @property
    def key_name(self) -> str | None:
        """Tells one key from another without telling anything of it; None without encryption.

        Raises:
            UsageError: if encryption is on and there is no key.
        """
        return _digest(_key(), b"name of the key", 8).hex() if self.on else None

    def writing(self, place: str) -> dict[str, Any]:
        """Options of `pq.write_table`.

        Args:
            place: of the file, the artifact's id before it.
        """
        if not self.on:
            return {}
        options = {"aad_prefix": place.encode(), "store_aad_prefix": False}
        sealed = pe.create_encryption_properties(_file_key(place), **options)
        return {"encryption_properties": sealed}

    def reading(self, place: str) -> dict[str, Any]:
        """Options of `pq.ParquetFile` and `pq.read_table`."""
        if not self.on:
            return {}
        opened = pe.create_decryption_properties(_file_key(place), aad_prefix=place.encode())
        return {"decryption_properties": opened}


def check_key(identity: str, key_name: str | None) -> None:
    """
    Args:
        key_name: of the key that a finished corpus was encrypted with; None for one in the clear.

    Raises:
        UsageError: if the key is missing or another one.
    """
    if key_name is not None and Sealing(on=True).key_name != key_name:
        raise UsageError(
            f"{identity} was encrypted with another key than {VARIABLE} holds: set the one that it "
            "was prepared with"
        )


def _key() -> bytes:
    given = os.environ.get(VARIABLE, "")
    if not given:
        raise UsageError(
            f"the corpus is encrypted and {VARIABLE} is not set: set it on every node before Ray "
            "starts there, to 64 hexadecimal digits such as `openssl rand -hex 32` gives"
        )
    if not _HEX.fullmatch(given):
        raise UsageError(
            f"{VARIABLE} has {len(given)} characters and is not 64 hexadecimal digits: take what "
            "`openssl rand -hex 32` gives"
        )
    return bytes.fromhex(given)


def _file_key(place: str) -> bytes:
    return _digest(_key(), b"key of the file " + place.encode(), 32)


def _digest(key: bytes, content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, key=key, digest_size=size).digest()
