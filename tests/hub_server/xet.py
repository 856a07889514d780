"""
The Xet storage that `hf_xet` uses unless it is switched off: a local directory, which the stock client reads and writes
itself when the server names `local://DIRECTORY` as the storage's address. Nothing of its protocol is emulated here; the
server only looks up which Xet hash belongs to a SHA-256, in the shards that the client wrote.
"""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import JSONResponse

from .store import HubStore

RECORD = 48  # bytes of a shard's header and of each of its records
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
END = b"\xff" * 32


def token(store: HubStore) -> JSONResponse:
    """Where the storage is, as `xet-read-token` and `xet-write-token` answer."""
    expires = int(time.time()) + 3600
    address = f"local://{store.xet_directory}"
    return JSONResponse(
        {"casUrl": address, "accessToken": "xet", "exp": expires},
        headers={"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)},
    )


def as_hex(record: bytes) -> str:
    """The first 32 bytes of a record, four little-endian words, as xet writes hashes."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", record[:32]))


def files_of(shard: bytes) -> Iterator[tuple[str, str]]:
    """
    `(sha256, xet hash)` of the files that a shard describes.

    After the header, each file is a record (hash, flags, number of segments), its segments, as many verification
    records if the flags say so, and a record with its SHA-256 if they say so.
    """
    position = RECORD
    while position + RECORD <= len(shard) and shard[position : position + 32] != END:
        record = shard[position : position + RECORD]
        flags, segments = struct.unpack("<2I", record[32:40])
        position += RECORD * (1 + segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_METADATA:
            yield as_hex(shard[position : position + RECORD]), as_hex(record)
            position += RECORD


def hash_of(store: HubStore, sha256: str) -> str | None:
    """The Xet hash of a large file that arrived that way, or None."""
    for path in Path(store.xet_directory).rglob("*.mdb"):
        for known, xet_hash in files_of(path.read_bytes()):
            if known == sha256:
                return xet_hash
    return None
