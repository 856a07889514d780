"""A training run from recipe to finished folder: tokenizer, data, model, training, evaluation, card."""

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import set_seed

from ..configuration_hf_lm import HfLmConfig
from ..data.arguments import DataArguments
from ..data.collator import PackedCollator
from ..data.documents import load_documents
from ..data.packing import pack_documents
from ..errors import InputError
from ..hub.push import PushCallback
from ..modeling_hf_lm import HfLmForCausalLM
from ..tokenization import train_tokenizer
from .arguments import HfLmTrainingArguments, ModelArguments
from .artifacts import RECIPE_FILE, describe, recipe_of, save_run, write_recipe
from .callbacks import HfLmProgressCallback, InterruptCallback, SampleCallback
from .checkpoints import newest_valid, require_complete
from .hardware import best_attention, keep_freed_memory
from .trainer import HfLmTrainer


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run after a step; `checkpoint` holds it."""

    def __init__(self, signal_number: int, checkpoint: str | None):
        super().__init__(f"Stopped by signal {signal_number}. Saved {checkpoint}; --resume goes on from there.")
        self.exit_code = 128 + signal_number


def check_output_dir(arguments: HfLmTrainingArguments) -> str | None:
    """
    Look at the output folder before anything is written.

    Returns:
        The checkpoint to go on from, with `resume`; else None.

    Raises:
        InputError: the folder holds a run and neither `overwrite` nor `resume` is given; or it holds other files; or
            there is nothing to resume.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file.")
    if arguments.overwrite and arguments.resume:
        raise InputError("overwrite and resume exclude each other.")
    if arguments.resume:
        checkpoint = newest_valid(folder, report=lambda line: print(line, file=sys.stderr))
        if checkpoint is None:
            raise InputError(f"output_dir: {folder} holds no valid checkpoint to resume from.")
        require_complete(checkpoint, arguments.decisive(), arguments.allow_changes)
        return str(checkpoint)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / RECIPE_FILE).exists():
        raise InputError(f"output_dir: {folder} holds files that are not a training run's; name another folder.")
    if not arguments.overwrite:
        raise InputError(f"output_dir: {folder} already holds a run; add --overwrite or --resume, or name another.")
    return None


def is_finished(checkpoint: str) -> bool:
    """Whether the checkpoint is of the run's last step: the stock trainer would train one step more."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def build_tokenizer(model_arguments: ModelArguments, documents):
    """The named tokenizer, the checkpoint's, or a new one trained on the documents."""
    name = model_arguments.tokenizer_name or model_arguments.model_name_or_path
    if name is None:
        texts = (row["text"] for row in documents)
        return train_tokenizer(texts, vocab_size=model_arguments.vocab_size, kind=model_arguments.tokenizer_kind)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer_name: no tokenizer can be loaded from {name}: {error}") from error


def build_model(model_arguments: ModelArguments, tokenizer, block_size: int, device: str) -> torch.nn.Module:
    """A new model that fits the tokenizer, or the named checkpoint with its configuration overridden."""
    attention = model_arguments.attn_implementation or best_attention(device, block_size)
    fields = model_arguments.config_fields()
    unknown = sorted(set(fields) - set(HfLmConfig.__dataclass_fields__))
    if unknown and model_arguments.model_name_or_path is None:
        raise InputError(f"config_overrides: HfLmConfig has no field {', '.join(unknown)}.")
    if model_arguments.model_name_or_path is not None:
        try:
            config = AutoConfig.from_pretrained(model_arguments.model_name_or_path)
            for name, value in fields.items():
                setattr(config, name, value)
            return AutoModelForCausalLM.from_pretrained(
                model_arguments.model_name_or_path, config=config, attn_implementation=attention
            )
        except OSError as error:
            raise InputError(f"model_name_or_path: {model_arguments.model_name_or_path}: {error}") from error
    config = HfLmConfig(
        attn_implementation=attention,
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": block_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **fields,
        },
    )
    model = HfLmForCausalLM(config)
    special = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=min(256, block_size), **special
    )
    return model


def build_trainer(model_arguments: ModelArguments, data_arguments: DataArguments, arguments, checkpoint: str | None):
    """Tokenizer, data and model of a recipe, in a trainer that is ready to run."""
    with arguments.main_process_first(desc="data"):  # the others read its cache
        documents = load_documents(data_arguments)
        if checkpoint:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        else:
            tokenizer = build_tokenizer(model_arguments, documents["train"])
        blocks = {name: pack_documents(rows, tokenizer, data_arguments.block_size) for name, rows in documents.items()}
    model = build_model(model_arguments, tokenizer, data_arguments.block_size, arguments.device.type)
    evaluation = blocks.get("validation")
    if isinstance(evaluation, IterableDataset):  # what is held out is read again and again
        evaluation = Dataset.from_list(list(evaluation)).with_format("numpy")
    if evaluation is None:
        arguments.eval_strategy = "no"
    return HfLmTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=evaluation,
        eval_bytes=None if evaluation is None else [int(size) for size in evaluation["num_bytes"]],
        data_collator=PackedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def fit(trainer: HfLmTrainer, checkpoint: str | None) -> None:
    """
    Train, from the checkpoint on if there is one, with a progress bar, samples, and signals that save.

    Raises:
        Interrupted: a signal ended the run; it was saved.
    """
    progress, interrupt = HfLmProgressCallback(trainer), InterruptCallback()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    for callback in (progress, SampleCallback(trainer, trainer.processing_class), interrupt, PushCallback()):
        trainer.add_callback(callback)
    start = time.perf_counter()
    if checkpoint and is_finished(checkpoint):
        print(f"The run of {checkpoint} has finished training; only what comes after is done.", file=sys.stderr)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            progress.close()
    trainer.train_seconds = time.perf_counter() - start
    if interrupt.signal is not None:
        raise Interrupted(interrupt.signal, newest_valid(Path(trainer.args.output_dir)))


def scores_of(trainer: HfLmTrainer) -> dict:
    """The last training loss and, if something is held out, the numbers on it."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scores = {"train_loss": losses[-1] if losses else None}
    if trainer.eval_dataset is not None:
        held_out = trainer.evaluate()
        names = ("bits_per_byte", "perplexity", "loss", "tokens")
        numbers = {name if name[0] in "bp" else f"eval_{name}": held_out[f"eval_{name}"] for name in names}
        interval = [held_out["eval_bits_per_byte_low"], held_out["eval_bits_per_byte_high"]]
        scores = {**numbers, "bits_per_byte_interval": interval, **scores}
    return scores


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: HfLmTrainingArguments
) -> dict:
    """
    Run a recipe.

    Returns:
        What `metrics.json` holds: `bits_per_byte`, `perplexity`, `eval_loss` (nats per token), tokens, seconds, ...

    Raises:
        InputError: something in the recipe, the data or the folders is wrong; nothing was overwritten.
        Interrupted: a signal ended the run; it was saved.
        TrainingDiverged: the loss became NaN or infinite.
    """
    start = time.perf_counter()
    folder = Path(training_arguments.output_dir)
    checkpoint = check_output_dir(training_arguments)
    set_seed(training_arguments.seed)
    keep_freed_memory()
    recipe = recipe_of(model_arguments, data_arguments, training_arguments)
    trainer = build_trainer(model_arguments, data_arguments, training_arguments, checkpoint)
    if trainer.is_world_process_zero():  # from here on nothing in the recipe can be wrong
        if training_arguments.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(folder, recipe)
    fit(trainer, checkpoint)
    metrics = scores_of(trainer)
    metrics |= describe(trainer, model_arguments, data_arguments, time.perf_counter() - start)
    save_run(trainer, metrics)
    return metrics
