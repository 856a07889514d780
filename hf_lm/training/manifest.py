"""
The manifest of a checkpoint: its commit record. It is written last, atomically: a checkpoint with a manifest is complete
or was damaged later, one without was never finished.
"""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from ..files import fsync, read_json, sha256_of, write_json

MANIFEST = "manifest.json"
VERSION = 2  # 1: without the entry `version`
PACKAGES = ("torch", "transformers", "hf-lm")
WINDOW = 100  # losses that a checkpoint keeps, to tell a spike by

version_of = cache(metadata.version)  # looks through all that is installed


class FileFacts(TypedDict):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class ProgressFacts(TypedDict):
    """The place in the data, and counts."""

    batches: int  # micro-batches of each process
    rows: int | None  # of the training data; None for a stream
    tokens: int
    seconds: float
    divergences: int
    losses: list[float]  # of the last updates, mean over all processes


class Manifest(TypedDict, total=False):
    """What `manifest.json` holds."""

    version: int
    files: dict[str, FileFacts]
    versions: dict[str, str]
    step: int
    arguments: dict  # all that could change the weights
    progress: ProgressFacts


@dataclass
class Progress:
    """Counts of a run that continue over a resume. `tokens` are those of all processes, `seconds` those of training."""

    rows: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    divergences: int = 0
    losses: deque = field(default_factory=lambda: deque(maxlen=WINDOW))
    clock: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Time from here on counts as training."""
        self.clock = time.perf_counter()

    def count_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def facts(self, batches: int) -> ProgressFacts:
        return {
            "batches": batches, "rows": self.rows, "tokens": self.tokens, "seconds": self.seconds,
            "divergences": self.divergences, "losses": list(self.losses),
        }  # fmt: skip

    def restore(self, facts: ProgressFacts) -> None:
        self.tokens, self.seconds, self.divergences = facts["tokens"], facts["seconds"], facts["divergences"]
        self.losses.extend(facts["losses"])


def file_facts(path: Path) -> FileFacts:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def commit(folder: Path, leave_out: str, **facts) -> None:
    """
    Write the manifest of a checkpoint whose files are complete; they are on the disk before it is.

    Args:
        leave_out: name of a file that is none of the checkpoint.
        facts: entries of `Manifest` beside files and versions.
    """
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and path.name not in (leave_out, MANIFEST)]
    with ThreadPoolExecutor() as threads:  # both release the GIL: the disk works while bytes are hashed
        hashes, synced = threads.map(file_facts, files), threads.map(fsync, paths)
        listed = {path.relative_to(folder).as_posix(): of for path, of in zip(files, hashes, strict=True)}
        list(synced)
    fsync(folder)
    versions = {name: version_of(name) for name in PACKAGES}
    manifest: Manifest = {"version": VERSION, "files": listed, "versions": versions, **facts}
    write_json(folder / MANIFEST, manifest)
    fsync(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; `{}` without one."""
    return read_json(folder / MANIFEST)
