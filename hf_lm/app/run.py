"""A training run from recipe to finished folder: tokenizer, data, model, training, evaluation, card."""

import itertools
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed

from ..data.arguments import DataArguments
from ..data.documents import describe_split
from ..errors import CRASH_FILE, InputError, keep_traceback
from ..hardware import hand_back_memory, keep_freed_memory, peak_memory
from ..hub.push import PushCallback
from ..planning.forecast import forecast, in_words
from ..records import VERSION, read_metrics
from ..reports.report import measure_quality
from ..tasks import fields_of, own_keys, task_class
from ..tasks.base import Task
from ..training.arguments import HfLmTrainingArguments
from ..training.callbacks import HfLmProgressCallback, InterruptCallback, SampleCallback, TroubleCallback
from ..training.checkpoints import STOPPER_COUNT, checkpoint_to_resume
from ..training.keys import ModelArguments
from ..training.trainer import HfLmTrainer
from .artifacts import RECIPE_FILE, describe, recipe_of, save_run, write_recipe

# Keys of model and data that a run may change on the way: they do not touch what it trains on.
FREE_TO_CHANGE = {
    "license", "language", "data_license", "data_sha256", "show_examples", "validation_file", "test_file",
    "max_eval_samples",
}  # fmt: skip


# Entries of metrics.json that say what a run took: those of a finished run stay when it is resumed.
COSTS = (
    "predicted", "actual", "train_seconds", "train_tokens_per_second", "total_seconds", "peak_memory_bytes",
    "peak_device_memory_bytes", "model_flops_utilization", "hardware", "processes",
)  # fmt: skip


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run after a step; `checkpoint` holds it."""

    def __init__(self, signal_number: int, checkpoint: str | None):
        super().__init__(f"Stopped by signal {signal_number}. Saved {checkpoint}; --resume continues from there.")
        self.exit_code = 128 + signal_number


def check_output_dir(arguments: HfLmTrainingArguments) -> str | None:
    """
    Look at the output folder before anything is written.

    Returns:
        The checkpoint to resume from, with `resume` or `resume_from_checkpoint`; else None.

    Raises:
        InputError: the folder cannot be written to; or it holds a run and neither `overwrite` nor `resume` is given; or
            it holds other files; or there is nothing to resume.
    """
    folder = Path(arguments.output_dir)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise InputError(f"output_dir: {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output_dir: {place} is not writable.")
    named = str(arguments.resume_from_checkpoint or "")
    if named.lower() in ("true", "false", ""):
        arguments.resume |= named.lower() == "true"
        named = ""
    if arguments.overwrite and arguments.resume:
        raise InputError("overwrite and resume exclude each other.")
    if arguments.resume and named:
        raise InputError("resume and resume_from_checkpoint exclude each other.")
    checkpoint = str(checkpoint_to_resume(arguments, named or None)) if named or arguments.resume else None
    if checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        if arguments.overwrite:
            raise InputError(f"overwrite: would delete {checkpoint}, which resume_from_checkpoint names.")
        return checkpoint
    if not folder.is_dir() or not any(folder.iterdir()):
        return checkpoint
    if not (folder / RECIPE_FILE).exists():
        raise InputError(f"output_dir: {folder} holds files that are not a training run's; name another folder.")
    if not arguments.overwrite:
        raise InputError(f"output_dir: {folder} already holds a run; add --overwrite or --resume, or name another.")
    return checkpoint


def show_examples(task: Task, trainer: HfLmTrainer, count: int) -> None:
    """Print the first training examples as the model sees them; what it does not learn to predict is dimmed."""
    for row in itertools.islice(trainer.train_dataset, count):
        print(task.show(trainer, row, color=sys.stdout.isatty()) + "\n")


def fit(trainer: HfLmTrainer, checkpoint: str | None) -> None:
    """
    Train, from the checkpoint on if there is one, with a progress bar, samples, and signals that save.

    Raises:
        Interrupted: a signal ended the run; it was saved.
    """
    progress, interrupt = HfLmProgressCallback(), InterruptCallback()
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:  # else transformers prints each log
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
    boards = [one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
    for callback in (TroubleCallback(), SampleCallback(boards, trainer.is_sharded), interrupt, PushCallback()):
        trainer.add_callback(callback)
    if trainer.args.early_stopping_patience is not None:
        state = (
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)) if checkpoint else TrainerState()
        )
        stopper = EarlyStoppingCallback(trainer.args.early_stopping_patience)
        saved = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        if saved:  # transformers would count from 0 again
            stopper.early_stopping_patience_counter = saved["attributes"][STOPPER_COUNT]
        trainer.add_callback(stopper)
    try:
        trainer.go_on(checkpoint)
    except UnpicklingError as error:
        raise InputError(
            f"{checkpoint}: optimizer.pt, scheduler.pt or rng_state.pth holds more than numbers."
        ) from error
    finally:
        progress.close()
        interrupt.restore()
    if interrupt.signal is not None:
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        raise Interrupted(interrupt.signal, os.path.join(trainer.args.output_dir, checkpoint))


def keep_run_traceback(error: Exception, arguments: HfLmTrainingArguments) -> None:
    """Write the traceback of a crash to the run's folder, `crash.txt`; to a temporary file if it holds no run yet."""
    folder, process = Path(arguments.output_dir), arguments.process_index
    is_run = (folder / RECIPE_FILE).exists()
    keep_traceback(error, folder if is_run else None, f"crash-{process}.txt" if process else CRASH_FILE)


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: HfLmTrainingArguments
) -> dict:
    """
    Run a recipe.

    Returns:
        What `metrics.json` holds: `bits_per_byte`, `perplexity`, `eval_loss` (nats per token), tokens, seconds, ...; and
        `summary`, the main number in words.

    Raises:
        InputError: something in the recipe, the data or the folders is wrong; nothing was overwritten.
        Interrupted: a signal ended the run; it was saved.
        TrainingDiverged: loss or gradients became NaN or infinite.
    """
    start = time.perf_counter()
    folder = Path(training_arguments.output_dir)
    others = {field.name: field.default for group in own_keys() for field in fields_of(group)}
    keys = {**others, **asdict(model_arguments), **asdict(data_arguments)}  # as manifests of 0.1.0 have them
    if data_arguments.streaming:  # its documents are shared among them
        keys["dataloader_num_workers"] = training_arguments.dataloader_num_workers
    training_arguments.also_decisive = {key: value for key, value in keys.items() if key not in FREE_TO_CHANGE}
    checkpoint = check_output_dir(training_arguments)
    set_seed(training_arguments.seed)
    if not training_arguments.torch_compile:  # a compiled step takes and frees few things, large ones
        keep_freed_memory()
    recipe = recipe_of(model_arguments, data_arguments, training_arguments)
    task = task_class(data_arguments.task)(model_arguments, data_arguments, training_arguments)
    data = task.prepare(checkpoint)
    trainer = task.build_trainer(data)
    before = task.scores_before(trainer, data)
    hand_back_memory()
    predicted = None
    if training_arguments.forecast and training_arguments.world_size == 1 and checkpoint is None:
        predicted = forecast(trainer, time.perf_counter() - start)
        print(f"Predicted: {in_words(predicted)} until it is trained", file=sys.stderr)
    if trainer.is_world_process_zero():  # from here on nothing in the recipe can be wrong
        if split := describe_split(data.rows):
            print(split, file=sys.stderr)
        show_examples(task, trainer, data_arguments.show_examples)
        if training_arguments.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(folder, recipe)
    costs_before = {key: value for key, value in read_metrics(folder).items() if key in COSTS}
    fit(trainer, checkpoint)
    actual = {
        "train_seconds": trainer.progress.seconds,
        "trained_seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
    }
    if trainer.had_finished:  # what the run took is what it took when it was trained
        predicted, actual = costs_before.get("predicted"), costs_before.get("actual", actual)
    elif predicted:
        print(f"Actual: {in_words(actual, predicted)}", file=sys.stderr)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        "version": VERSION,
        "task": data_arguments.task,
        **task.scores(trainer, data, before),
        "train_loss": losses[-1] if losses else None,
    }
    metrics |= {"predicted": predicted, "actual": actual}
    metrics["quality"] = measure_quality(trainer)
    seconds = time.perf_counter() - start
    metrics |= describe(trainer, model_arguments, data_arguments, task.text_language(), seconds)
    if trainer.had_finished:
        metrics |= costs_before
    metrics["summary"] = task.summary(metrics)
    save_run(trainer, metrics)
    return metrics
