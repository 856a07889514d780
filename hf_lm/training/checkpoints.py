"""
Checkpoints that a crash cannot spoil.

A save goes into a folder beside its place, is synced to the disk, gets a manifest (each file's size and SHA-256) and is
then renamed to `checkpoint-STEP` in one move: a folder of that name is complete or damaged later, never half-written.
"""

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..errors import InputError

MANIFEST = "manifest.json"
ASIDE = ".saving"
# What exact resumption needs, and what is lost without it.
NEEDED = {
    "optimizer.pt": "the optimizer's state",
    "scheduler.pt": "the place in the learning-rate schedule",
    "trainer_state.json": "the step",
    "rng_state*.pth": "the random number generators' state",
    "*.safetensors*": "the weights",
}


def _hash_and_sync(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def seal(folder: Path, target: Path, **facts) -> None:
    """
    Write the manifest of a finished save and move it into place.

    Args:
        folder: where the save was written, on the same file system as `target`.
        target: its final name; an older checkpoint of that name is replaced.
        facts: further entries of the manifest (step, arguments, ...).
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "files": {str(path.relative_to(folder)): _hash_and_sync(path) for path in files},
        "versions": {name: version(name) for name in ("torch", "transformers", "hf-lm")},
        **facts,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1))
    _hash_and_sync(path)
    _sync_folder(folder)
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)
    _sync_folder(target.parent)


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint that `damage` found nothing wrong with."""
    return json.loads((folder / MANIFEST).read_text())


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, in a few words; None if it is as it was written."""
    try:
        listed = read_manifest(folder)["files"]
        for name, expected in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if _hash_and_sync(path)["sha256"] != expected["sha256"]:
                return f"{name} was changed (its SHA-256 differs)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_valid(run: Path, report=print) -> Path | None:
    """
    The newest checkpoint of a run that is as it was written. Newer, damaged ones are renamed to `damaged-...`, and
    `report` is told why.
    """
    shutil.rmtree(run / ASIDE, ignore_errors=True)
    if not run.is_dir():
        return None
    for name in reversed(sort_checkpoints(str(run), PREFIX_CHECKPOINT_DIR, use_mtime=False)):
        folder = Path(name)
        reason = damage(folder)
        if reason is None:
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        report(f"{folder} is damaged: {reason}. It was set aside as {aside.name}.")
    return None


def require_complete(folder: Path, arguments: dict, allow_changes: bool = False) -> None:
    """
    Refuse to go on from a checkpoint that lacks a part of the run's state or was made with other settings.

    Raises:
        InputError: naming what is missing, or each argument with its old and new value.
    """
    missing = [what for pattern, what in NEEDED.items() if not any(folder.glob(pattern))]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}: the run cannot go on exactly from it.")
    saved = read_manifest(folder).get("arguments", {})
    changed = [f"{key} {saved[key]!r} -> {arguments.get(key)!r}" for key in saved if saved[key] != arguments.get(key)]
    if changed and not allow_changes:
        raise InputError(
            f"{folder} was made with other arguments: {'; '.join(changed)}. Restore them, or add --allow_changes."
        )
