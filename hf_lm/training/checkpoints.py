"""
Checkpoints that a crash cannot spoil.

A save is marked as uncommitted first. When all its files are written, `CommitCallback` hashes and syncs them in a thread
and writes the manifest: until then the checkpoint does not count, and a resume deletes it.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch.serialization import get_crc32_options, set_crc32_options
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import EarlyStoppingCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..errors import Failure, InputError
from .arguments import decisive
from .manifest import MANIFEST, Progress, commit, file_facts, read_manifest

UNCOMMITTED = ".uncommitted"  # a file in a checkpoint that is being written
TRASH = "_deleted"  # with such a name, the trainer's pushes to the Hub leave it out
# What exact resumption needs, and what is lost without it.
NEEDED = {"trainer_state.json": "the step", "*.safetensors*": "the weights"}
CAN_START_ANEW = {
    ("optimizer.*", "global_step*"): "the optimizer's state",  # the second is DeepSpeed's
    ("scheduler.pt",): "the place in the learning-rate schedule",
    ("rng_state*.pth",): "the random number generators' state",
}
STOPPER_COUNT = "early_stopping_patience_counter"  # of transformers' callback, as checkpoints hold it


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """
    Leave nothing of a checkpoint that cannot be saved.

    Raises:
        Failure: says what it was.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Failure(f"{folder} could not be saved, those before are whole: {error}") from error


@contextmanager
def writing(folder: Path, is_mine: bool) -> Iterator[None]:
    """
    Mark a checkpoint as uncommitted, and write its files without a CRC-32 of each tensor: it takes longer than the SHA-256
    that the manifest has instead.

    Args:
        is_mine: whether this process writes the shared files.
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        with whole_or_nothing(folder):
            if is_mine:
                shutil.rmtree(folder, ignore_errors=True)  # of the same step, before a rollback or a resume
                folder.mkdir(parents=True)
                (folder / UNCOMMITTED).touch()
            yield
    finally:
        set_crc32_options(before)


class CommitCallback(TrainerCallback):
    """
    Commits each checkpoint in a thread while training continues; callbacks that read it in `on_save` wait for it.

    Args:
        progress: the run's, for the manifest.

    Attributes:
        limit: the run's `save_total_limit`, which transformers must not see: it would delete before the commit.
        is_awaited: whether another callback does something in `on_save`.
    """

    def __init__(self, progress: Progress):
        self.progress, self.is_awaited, self.limit = progress, False, None
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not args.should_save or not (folder / UNCOMMITTED).exists():  # committed before it was pushed
            return
        self.progress.count_time()
        facts = {
            "step": state.global_step,
            "arguments": decisive(args),
            "progress": self.progress.facts(state.global_step * args.gradient_accumulation_steps),
        }
        keep = [folder] + ([Path(state.best_model_checkpoint)] if state.best_model_checkpoint else [])
        self.pending = self.thread.submit(self._commit, folder, facts, self.limit, keep)
        if self.is_awaited:
            self.wait()

    def on_train_end(self, args, state, control, **kwargs):
        self.wait()
        if args.should_save and self.limit == 1 and state.best_model_checkpoint:  # as transformers: the best alone
            rotate(Path(args.output_dir), 1, [Path(state.best_model_checkpoint)])

    @staticmethod
    def _commit(folder: Path, facts: dict, limit: int | None, keep: list[Path]) -> None:
        with whole_or_nothing(folder):
            commit(folder, leave_out=UNCOMMITTED, **facts)
            (folder / UNCOMMITTED).unlink(missing_ok=True)
        rotate(folder.parent, limit, keep)

    def wait(self) -> None:
        """Wait until the last checkpoint is committed; raise what prevented it."""
        self.pending.result()

    def raise_failure(self) -> None:
        """Raise what prevented the last commit, if that is known already."""
        if self.pending.done():
            self.pending.result()


def rotate(run: Path, limit: int | None, keep: list[Path]) -> None:
    """
    Delete the oldest checkpoints of a run until `limit` valid ones are left, each of them by one rename.

    Args:
        limit: None or 0 for no limit.
        keep: what stays in any case: the one just written, the best one.
    """
    folders = [Path(name) for name in sort_checkpoints(str(run), PREFIX_CHECKPOINT_DIR, use_mtime=False)]
    whole = [folder for folder in folders if damage(folder, contents=False) is None]
    too_many = len(whole) - limit if limit else 0
    (run / TRASH).mkdir(exist_ok=True)
    for folder in [folder for folder in whole if folder not in keep][: max(too_many, 0)]:
        os.rename(folder, run / TRASH / folder.name)
    shutil.rmtree(run / TRASH, ignore_errors=True)


def damage(folder: Path, contents: bool = True) -> str | None:
    """
    Why a checkpoint cannot be trusted, in a few words; None if it is intact.

    Args:
        contents: look at every byte; else only at which files there are, and at their sizes.
    """
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}"
    try:
        for name, expected in read_manifest(folder)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if contents and file_facts(path)["sha256"] != expected["sha256"]:
                return f"{name} was changed (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_valid(run: Path, report=print) -> Path | None:
    """
    Find the newest valid checkpoint of a run. Uncommitted ones are deleted; newer, damaged ones are renamed
    to `_damaged-...`, and `report` is told why.
    """
    shutil.rmtree(run / TRASH, ignore_errors=True)
    if not run.is_dir():
        return None
    for name in reversed(sort_checkpoints(str(run), PREFIX_CHECKPOINT_DIR, use_mtime=False)):
        folder = Path(name)
        reason = damage(folder)
        if reason is None:
            return folder
        if (folder / UNCOMMITTED).exists():
            shutil.rmtree(folder)
            continue
        damaged = folder.with_name(f"_damaged-{folder.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(folder, damaged)
        report(f"{folder} is damaged: {reason}. It was renamed to {damaged.name}.")
    return None


def is_finished(state: TrainerState, arguments) -> bool:
    """Whether a checkpoint's state is of the run's last step: the stock trainer would train one step more."""
    stopper = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
    if stopper and stopper["attributes"][STOPPER_COUNT] >= stopper["args"]["early_stopping_patience"]:
        return True
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return state.epoch >= arguments.num_train_epochs


def require_complete(
    folder: Path, arguments: dict, allow_changes: bool = False, restart_missing_state: bool = False, report=print
) -> None:
    """
    Refuse to resume from a checkpoint that lacks a part of the run's state or was made with other settings.

    Args:
        restart_missing_state: let parts start anew that can; `report` is told which.

    Raises:
        InputError: naming what is missing, or each argument with its old and new value.
    """
    manifest = read_manifest(folder)
    lost = [what for pattern, what in NEEDED.items() if not any(folder.glob(pattern))]
    if lost:
        raise InputError(f"{folder} lacks {', '.join(lost)}: the run cannot resume from it.")
    missing = [what for patterns, what in CAN_START_ANEW.items() if not any(any(folder.glob(p)) for p in patterns)]
    missing += [] if "progress" in manifest else ["the place in the data"]
    if missing and not restart_missing_state:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}: the run cannot resume exactly from it. Add --restart_missing_state "
            "to start these anew."
        )
    if missing:
        report(f"{folder} lacks {', '.join(missing)}: the run resumes with these started anew.")
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
