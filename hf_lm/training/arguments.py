"""The keys of a training recipe: a YAML file first, the command line over it, every key and type checked."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar, get_type_hints

from transformers import TrainingArguments
from transformers.utils import logging

from ..configuration_hf_lm import HfLmConfig
from ..data.arguments import DataArguments
from ..errors import InputError, one_line
from ..hardware import device_type, has_fast_bfloat16
from ..synonyms import hint
from .keys import ModelArguments, TrainingKeys, defaults_of_run
from .metrics import decide_direction, greater_is_better
from .optimizers import OPTIMIZERS
from .recipe_file import Key, expand_path, read_recipe, read_words
from .verdicts import refuse_arguments

logger = logging.get_logger(__name__)
AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "learning_rate": 0, "muon_learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "neftune_noise_alpha": 0,
    "warmup_steps": 0, "logging_steps": 0, "eval_steps": 0, "eval_delay": 0, "save_steps": 0, "save_total_limit": 0,
    "sample_tokens": 1, "max_divergences": 0, "dataloader_num_workers": 0,
}  # fmt: skip


@dataclass
class HfLmTrainingArguments(TrainingKeys, TrainingArguments):
    """
    `TrainingArguments` with the defaults of from-scratch training and a few keys of our own.

    On Moby-Dick, in bits per byte after 400 steps (three seeds, p < 0.005, `recipes/benchmarks/defaults.py`), the
    schedule gains 0.067 over cosine, `lr_decay_ratio` 0.4 gains 0.015 over 0.6, and `muon_learning_rate`, which recipes
    set, 0.322 over AdamW for all. What `recipes/addresses` sets (`muon_momentum` 0.8, `learning_rate` 0.006, scaled
    embeddings) gains 0.106 more, but only where text is read once or twice (`recipes/LOG.md`).
    """

    also_decisive: ClassVar[dict] = {}  # keys of model and data, where a recipe is run

    def __post_init__(self):
        device = "cpu" if self.use_cpu else device_type()
        if self.on_divergence not in ("stop", "skip", "rollback"):
            raise InputError(f"on_divergence: must be stop, skip or rollback, got {self.on_divergence!r}.")
        if self.max_steps == 0:
            raise InputError("max_steps: must be at least 1, or -1 to train num_train_epochs; got 0.")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise InputError(f"spike_factor: must be more than 1, got {self.spike_factor}.")
        if not 0 <= self.muon_momentum < 1:
            raise InputError(f"muon_momentum: must be at least 0 and less than 1, got {self.muon_momentum}.")
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name}: must be at least {least}, got {value}.")
        if not 0 <= self.lr_decay_ratio <= 1:
            raise InputError(f"lr_decay_ratio: must be 0 to 1, a share of the steps, got {self.lr_decay_ratio}.")
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"max_steps: must be at least 1, or -1 to train num_train_epochs, got {self.max_steps}.")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise InputError(f"num_train_epochs: must be more than 0, got {self.num_train_epochs}.")
        self.use_cpu = device == "cpu"  # upstream takes bfloat16 on a CPU only when told that it is one
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false"):  # as YAML has it
            self.fsdp = self.fsdp.lower() == "true"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bfloat16(device)
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise InputError(f"early_stopping_patience: must be at least 1, got {self.early_stopping_patience}.")
            self.load_best_model_at_end = True
        keeps_best, self.load_best_model_at_end = self.load_best_model_at_end, bool(self.load_best_model_at_end)
        given = self.greater_is_better
        own = self.optim if self.optim in OPTIMIZERS else None
        self.optim = "adamw_torch" if own else self.optim  # transformers refuses names that it does not know
        super().__post_init__()
        self.optim = own or self.optim
        if self.metric_for_best_model is not None:
            self.greater_is_better = decide_direction(self.metric_for_best_model, given)
        self.load_best_model_at_end = keeps_best  # None until `keep_best_by_default` knows how often the text is read


def keep_best_by_default(arguments: HfLmTrainingArguments, rows: int | None) -> None:
    """
    Decide `load_best_model_at_end` where a recipe does not: keep the best checkpoint of a run that reads its text twice
    or more, if every checkpoint is made at a step that is evaluated.

    Args:
        rows: of the training data; None for a stream.
    """
    if arguments.load_best_model_at_end is not None:
        return
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    epochs = arguments.max_steps * batch / rows if rows and arguments.max_steps > 0 else arguments.num_train_epochs
    evaluated = arguments.eval_strategy == arguments.save_strategy != "no"
    if arguments.save_strategy == "steps":
        evaluated = evaluated and (arguments.save_steps >= 1) == (arguments.eval_steps >= 1)
        evaluated = evaluated and round(arguments.save_steps * 1e6) % round(arguments.eval_steps * 1e6) == 0
    is_sharded = bool(arguments.fsdp or arguments.deepspeed)
    arguments.load_best_model_at_end = bool(rows and epochs >= 2 and evaluated and not is_sharded)
    if arguments.load_best_model_at_end and arguments.metric_for_best_model is None:
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False


def add_own_keys(arguments: TrainingArguments) -> None:
    """Give `TrainingArguments`, or a user's subclass of it, the defaults of the keys of `HfLmTrainingArguments`."""
    for key in fields(TrainingKeys):
        if not hasattr(arguments, key.name):
            setattr(arguments, key.name, key.default)
    # transformers takes every metric whose name does not end in "loss" for one that is better when greater.
    known = greater_is_better(arguments.metric_for_best_model or "")
    if known is not None and known != arguments.greater_is_better:
        logger.warning(f"greater_is_better: set to {known}, because that is so of {arguments.metric_for_best_model}.")
        arguments.greater_is_better = known


# Arguments that may change between a run and its continuation: they decide neither data nor weights, only what is seen,
# kept or sent, what the machine is, and what becomes of a divergence. All others must stay.
MAY_CHANGE = (
    "output_dir", "overwrite", "resume", "resume_from_checkpoint", "allow_changes", "restart_missing_state", "do_", "logging_",
    "log_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "sample_", "forecast", "eval_", "per_device_eval_",
    "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "save_",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "push_to_hub", "hub_", "use_cpu",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "local_rank", "debug", "skip_memory_metrics", "on_divergence", "max_divergences", "spike_factor", "ignore_data_skip",
)  # fmt: skip


def decisive(arguments: TrainingArguments) -> dict:
    """The arguments that must not change over a resume, as a checkpoint's manifest keeps them."""
    names = [key.name for key in fields(arguments) if not key.name.startswith(("_", *MAY_CHANGE))]
    values = {name: getattr(arguments, name) for name in names} | {"world_size": arguments.world_size}
    values |= getattr(arguments, "also_decisive", {})
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", None) or str(value)))


# Keys whose `~` and `$NAME` are read as a shell reads them.
PATHS = {
    "output_dir", "model_name_or_path", "tokenizer_name", "chat_template", "dataset_name",
    "train_file", "validation_file", "test_file", "control_file",
}  # fmt: skip
GROUPS = (ModelArguments, DataArguments, HfLmTrainingArguments)


@cache
def recipe_keys() -> dict[str, Key]:
    """Every key that a recipe may have, by name."""
    keys = {}
    for group in GROUPS:
        hints = get_type_hints(group)
        keys |= {field.name: Key(field, hints[field.name]) for field in fields(group) if field.init}
    keys["optim"].choices += list(OPTIMIZERS)
    return keys


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """
    Raises:
        InputError: the block's, with the place where the value stands in front.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def parse_recipe(path: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, HfLmTrainingArguments]:
    """
    Read a recipe.

    Args:
        path: YAML file with a flat mapping of keys to values.
        overrides: command-line words, `--key value ...`; they win over the file. Fields of a mapping
            (`--config_overrides hidden_size=64`) are put into the file's mapping; `null` unsets a key; `max_steps` unsets
            the file's `num_train_epochs`, and the other way round.

    Raises:
        InputError: the file cannot be read, a key is unknown (the closest known one is named) or a value has the
            wrong type.
    """
    keys = recipe_keys()

    def known(name: str) -> Key:
        if name not in keys:
            raise InputError(f"unknown key {name!r}{hint(name, keys, HfLmConfig.__dataclass_fields__)}")
        return keys[name]

    values, commanded = {}, set()
    with said_of(path):
        for name, value in read_recipe(path).items():
            key = known(str(name))
            values[key.name] = value if value is None else key.convert(value)
    with said_of("command line"):
        for name, words in read_words(overrides, keys):
            if name.startswith("no_") and name[3:] in keys and not words:
                name, words = name[3:], ["false"]
            value = known(name).from_words(words)
            value = value if value is None else keys[name].convert(value)
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = values[name] | value if both else value
            commanded.add(name)
    for name, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if name in commanded and values[name] is not None and other not in commanded:
            values.pop(other, None)
    if isinstance(arguments := values.get("optim_args"), dict):  # text to transformers
        values["optim_args"] = ",".join(f"{name}={value}" for name, value in arguments.items())
    values = {name: value for name, value in values.items() if value is not None or keys[name].may_be_none}
    for name in values.keys() & PATHS:
        paths = values[name]
        if paths is not None:
            is_list = isinstance(paths, list)
            values[name] = [expand_path(name, path) for path in paths] if is_list else expand_path(name, paths)
    values = defaults_of_run(values.get("model_name_or_path") is None, values) | values
    values = {name: value for name, value in values.items() if value is not None}
    refuse_arguments(
        {name: value for name, value in values.items() if value != getattr(TrainingArguments, name, None)}
    )
    try:
        return tuple(
            group(**{field.name: values[field.name] for field in fields(group) if field.name in values})
            for group in GROUPS
        )
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        named = [name for name, value in values.items() if str(error).startswith((f"{value} ", f"{value!r} "))]
        raise InputError(": ".join([*named[:1], one_line(error)])) from error
