"""A training run from recipe to finished folder: tokenizer, data, model, training, evaluation, card."""

import json
import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import set_seed

from ..configuration_hf_lm import HfLmConfig
from ..data.arguments import DataArguments
from ..data.collator import PackedCollator
from ..data.documents import data_sha256, load_documents
from ..data.packing import pack_documents
from ..errors import InputError
from ..modeling_hf_lm import HfLmForCausalLM
from ..tokenization import train_tokenizer
from .arguments import HfLmTrainingArguments, ModelArguments
from .callbacks import HfLmProgressCallback, InterruptCallback, SampleCallback
from .checkpoints import newest_valid, require_complete
from .curve import plot_loss_curve
from .hardware import best_attention, keep_freed_memory
from .trainer import HfLmTrainer

RECIPE_FILE = "recipe.yaml"  # what a folder must hold to count as one of our runs
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "hf-lm")


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
    return HfLmForCausalLM(config)


def describe(model, trainer: HfLmTrainer, arguments, sha256: str | None, seconds: float) -> dict:
    """What was run, on what, with what: everything in metrics.json that is not a score."""
    model_arguments, data_arguments, training_arguments = arguments
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "train_tokens": trainer.train_tokens,
        "train_seconds": trainer.train_seconds,
        "train_tokens_per_second": trainer.train_tokens / max(trainer.train_seconds, 1e-9),
        "total_seconds": seconds,
        "peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "total_flos": trainer.state.total_flos,
        "seed": training_arguments.seed,
        "processes": training_arguments.world_size,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if training_arguments.device.type == "cpu"
        else torch.cuda.get_device_name(),
        "data": {
            "train_file": ", ".join(data_arguments.train_file or []) or None,
            "dataset_name": data_arguments.dataset_name,
            "sha256": sha256,
            "validation_bytes": trainer.eval_bytes,
        },
        "versions": {name: version(name) for name in PACKAGES},
    }
    if training_arguments.device.type == "cuda":
        metrics["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return metrics


def save_run(trainer: HfLmTrainer, tokenizer, metrics: dict, arguments) -> None:
    """Everything the finished folder holds; on the main process only."""
    from ..hub import write_card

    folder = Path(trainer.args.output_dir)
    trainer.model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; recipe.yaml says the same
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        plot_loss_curve(trainer.state.log_history, folder / "loss_curve.png")
        write_card(folder)


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: HfLmTrainingArguments,
    recipe: dict | None = None,
) -> dict:
    """
    Run a recipe.

    Args:
        recipe: the keys as the user gave them, kept in the output folder.

    Returns:
        What `metrics.json` holds: `bits_per_byte`, `perplexity`, `eval_loss` (nats per token), tokens, seconds, ...

    Raises:
        InputError: something in the recipe, the data or the folders is wrong; nothing was overwritten.
        Interrupted: a signal ended the run; it was saved.
        TrainingDiverged: the loss became NaN or infinite.
    """
    start = time.perf_counter()
    checkpoint = check_output_dir(training_arguments)
    set_seed(training_arguments.seed)
    keep_freed_memory()
    folder = Path(training_arguments.output_dir)

    with training_arguments.main_process_first(desc="data"):  # the others read its cache
        documents = load_documents(data_arguments)
        tokenizer = (
            AutoTokenizer.from_pretrained(checkpoint)
            if checkpoint
            else build_tokenizer(model_arguments, documents["train"])
        )
        blocks = {name: pack_documents(rows, tokenizer, data_arguments.block_size) for name, rows in documents.items()}
    model = build_model(model_arguments, tokenizer, data_arguments.block_size, training_arguments.device.type)
    if getattr(model.generation_config, "max_new_tokens", None) is None and model_arguments.model_name_or_path is None:
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            max_new_tokens=256,
            **{key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
    evaluation = blocks.get("validation")
    if isinstance(evaluation, IterableDataset):  # what is held out is read again and again
        evaluation = Dataset.from_list(list(evaluation)).with_format("numpy")
    if evaluation is None:
        training_arguments.eval_strategy = "no"

    trainer = HfLmTrainer(
        model=model,
        args=training_arguments,
        train_dataset=blocks["train"],
        eval_dataset=evaluation,
        eval_bytes=None if evaluation is None else int(np.sum(evaluation["num_bytes"])),
        data_collator=PackedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    progress, interrupt = HfLmProgressCallback(trainer), InterruptCallback()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    for callback in (progress, SampleCallback(trainer, tokenizer), interrupt):
        trainer.add_callback(callback)

    if trainer.is_world_process_zero():
        if training_arguments.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe or {}, sort_keys=False, allow_unicode=True))
    training_start = time.perf_counter()
    if checkpoint and is_finished(checkpoint):
        print(f"The run in {folder} has finished training; only what comes after is done.", file=sys.stderr)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            progress.close()
    trainer.train_seconds = time.perf_counter() - training_start
    if interrupt.signal is not None:
        raise Interrupted(interrupt.signal, newest_valid(folder))

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {"train_loss": losses[-1] if losses else None}
    if evaluation is not None:
        scores = trainer.evaluate()
        metrics = {
            "bits_per_byte": scores.get("eval_bits_per_byte"),
            "perplexity": scores["eval_perplexity"],
            "eval_loss": scores["eval_loss"],
            "eval_tokens": scores["eval_tokens"],
            **metrics,
        }
    metrics |= describe(
        model,
        trainer,
        (model_arguments, data_arguments, training_arguments),
        data_sha256(data_arguments),
        time.perf_counter() - start,
    )
    save_run(trainer, tokenizer, metrics, (model_arguments, data_arguments, training_arguments))
    return metrics
