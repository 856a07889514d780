"""
Checkpoints that a crash cannot spoil.

A save goes into a folder beside its place, is synced to the disk, gets a manifest (each file's size and SHA-256) and is
then renamed to `checkpoint-STEP` in one move: a folder of that name is complete or damaged later, never half-written.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch.serialization import get_crc32_options, set_crc32_options
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..errors import InputError
from ..files import fsync, sha256_of, write_json
from .arguments import decisive

MANIFEST = "manifest.json"
ASIDE = "_saving"  # with such a name, the trainer's pushes to the Hub leave it out
# What exact resumption needs, and what is lost without it.
NEEDED = {"trainer_state.json": "the step", "*.safetensors*": "the weights"}
CAN_START_ANEW = {
    ("optimizer.*", "global_step*"): "the optimizer's state",  # the second is DeepSpeed's
    ("scheduler.pt",): "the place in the learning-rate schedule",
    ("rng_state*.pth",): "the random number generators' state",
}
PACKAGES = ("torch", "transformers", "hf-lm")
PROGRESS = "progress"  # entry of the manifest: the place in the data, and counts


version = cache(metadata.version)  # looks through all that is installed


def _facts(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


@contextmanager
def without_crc32() -> Iterator[None]:
    """`torch.save` without a CRC-32 of each tensor: it takes longer than the SHA-256 that the manifest has instead."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


@contextmanager
def whole_or_nothing(run: Path, name: str) -> Iterator[None]:
    """
    What goes wrong while a checkpoint is saved leaves nothing of it.

    Raises:
        RuntimeError: says what it was.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(run / ASIDE, ignore_errors=True)
        raise RuntimeError(f"{run / name} could not be saved, those before are whole: {error}") from error


def seal(folder: Path, target: Path, **facts) -> None:
    """
    Write the manifest of a finished save and move it into place.

    Args:
        folder: where the save was written, on the same file system as `target`.
        target: its final name; an older checkpoint of that name is replaced.
        facts: further entries of the manifest (step, arguments, ...).
    """
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as threads:  # both leave Python to the others: the disk works while bytes are hashed
        written, synced = threads.map(_facts, files), threads.map(fsync, paths)
        written, _ = list(written), list(synced)
    manifest = {
        "files": {str(path.relative_to(folder)): of for path, of in zip(files, written, strict=True)},
        "versions": {name: version(name) for name in PACKAGES},
        **facts,
    }
    write_json(folder / MANIFEST, manifest)
    if target.exists():
        os.rename(target, folder.with_name(f"old-{target.name}"))
    os.rename(folder, target)
    fsync(target.parent)


def rotate(run: Path, limit: int | None, keep: list[Path]) -> None:
    """
    Delete the oldest checkpoints of a run until `limit` valid ones are left, each of them in one move.

    Args:
        limit: None or 0 for no limit.
        keep: what stays in any case: the one just written, the best one.
    """
    folders = [Path(name) for name in sort_checkpoints(str(run), PREFIX_CHECKPOINT_DIR, use_mtime=False)]
    whole = [folder for folder in folders if damage(folder, contents=False) is None]
    too_many = len(whole) - limit if limit else 0
    (run / ASIDE).mkdir(exist_ok=True)
    for folder in [folder for folder in whole if folder not in keep][: max(too_many, 0)]:
        os.rename(folder, run / ASIDE / folder.name)
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint that `damage` found nothing wrong with."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def damage(folder: Path, contents: bool = True) -> str | None:
    """
    Why a checkpoint cannot be trusted, in a few words; None if it is as it was written.

    Args:
        contents: look at every byte; else only at which files there are, and at their sizes.
    """
    try:
        listed = read_manifest(folder)["files"]
        for name, expected in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if contents and _facts(path)["sha256"] != expected["sha256"]:
                return f"{name} was changed (its SHA-256 differs)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_valid(run: Path, report=print) -> Path | None:
    """
    The newest checkpoint of a run that is as it was written. Newer, damaged ones are renamed to `_damaged-...`, and
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
        aside = folder.with_name(f"_damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        report(f"{folder} is damaged: {reason}. It was set aside as {aside.name}.")
    return None


def require_complete(
    folder: Path, arguments: dict, allow_changes: bool = False, restart_missing_state: bool = False, report=print
) -> None:
    """
    Refuse to go on from a checkpoint that lacks a part of the run's state or was made with other settings.

    Args:
        restart_missing_state: let parts start anew that can; `report` is told which.

    Raises:
        InputError: naming what is missing, or each argument with its old and new value.
    """
    manifest = read_manifest(folder)
    lost = [what for pattern, what in NEEDED.items() if not any(folder.glob(pattern))]
    if lost:
        raise InputError(f"{folder} lacks {', '.join(lost)}: the run cannot go on from it.")
    missing = [what for patterns, what in CAN_START_ANEW.items() if not any(any(folder.glob(p)) for p in patterns)]
    missing += [] if PROGRESS in manifest else ["the place in the data"]
    if missing and not restart_missing_state:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}: the run cannot go on exactly from it. Add --restart_missing_state "
            "to start these anew."
        )
    if missing:
        report(f"{folder} lacks {', '.join(missing)}: the run goes on with these started anew.")
    saved = manifest.get("arguments", {})
    changed = [f"{key} {saved[key]!r} -> {arguments.get(key)!r}" for key in saved if saved[key] != arguments.get(key)]
    if changed and not allow_changes:
        raise InputError(
            f"{folder} was made with other arguments: {'; '.join(changed)}. Restore them, or add --allow_changes."
        )


def checkpoint_to_resume(arguments, named: str | None = None) -> Path:
    """
    The newest valid checkpoint in `output_dir`, or the one that is named; one process looks, all learn what it found.

    Args:
        arguments: `HfLmTrainingArguments`, or what `add_own_keys` has made of others.
        named: one without a manifest (the stock trainer's) is taken as it is.

    Raises:
        InputError: there is none, or it is damaged, or see `require_complete`.
    """

    def report(line: str) -> None:
        print(line, file=sys.stderr)

    found: list = [None, None]
    if arguments.process_index == 0:
        try:
            found[0] = Path(named) if named else newest_valid(Path(arguments.output_dir), report)
            if found[0] is None:
                raise InputError(f"output_dir: {arguments.output_dir} holds no valid checkpoint to resume from.")
            if named and not (found[0] / TRAINER_STATE_NAME).exists():
                raise InputError(f"resume_from_checkpoint: {named} is no checkpoint.")
            if (found[0] / MANIFEST).exists():
                if named and (reason := damage(found[0])):
                    raise InputError(f"{named} is damaged: {reason}.")
                choices = (arguments.allow_changes, arguments.restart_missing_state)
                require_complete(found[0], decisive(arguments), *choices, report)
        except InputError as error:
            found[1] = error
    checkpoint, error = broadcast_object_list(found)
    if error is not None:
        raise error
    return checkpoint
