"""The keys of a training recipe: a YAML file first, the command line over it, every key and type checked."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..data.arguments import DataArguments
from ..errors import InputError, one_line
from .hardware import device_type, has_fast_bfloat16
from .keys import ModelArguments, TrainingKeys


@dataclass
class HfLmTrainingArguments(TrainingKeys, TrainingArguments):
    """
    `TrainingArguments` with the defaults of from-scratch training and a few keys of our own.

    On Moby-Dick, in bits per byte after 400 steps (three seeds, p < 0.005, `recipes/benchmarks/defaults.py`), the
    schedule gains 0.067 over cosine, `lr_decay_ratio` 0.4 gains 0.015 over 0.6, and `muon_learning_rate`, which recipes
    set, 0.322 over AdamW for all. What `recipes/addresses` sets (`muon_momentum` 0.8, `learning_rate` 0.006, scaled
    embeddings) gains 0.106 more, but only where text is read once or twice (`recipes/LOG.md`).
    """

    # What must not change between a run and its continuation: everything that decides the weights.
    DECISIVE: ClassVar[tuple[str, ...]] = (
        "learning_rate", "muon_learning_rate", "muon_momentum", "lr_scheduler_type", "lr_decay_ratio", "warmup_steps",
        "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "data_seed", "bf16", "fp16",
        "world_size", "train_sampling_strategy", "early_stopping_patience", "lr_scheduler_kwargs", "optim_args",
        "label_smoothing_factor", "neftune_noise_alpha", "dataloader_drop_last",
    )  # fmt: skip

    also_decisive: ClassVar[dict] = {}  # keys of model and data, where a recipe is run

    def decisive(self) -> dict:
        """The arguments that decide the weights, as a checkpoint's manifest keeps them."""
        values = {name: getattr(self, name) for name in self.DECISIVE}
        return {name: getattr(value, "value", value) for name, value in values.items()} | self.also_decisive

    def __post_init__(self):
        device = "cpu" if self.use_cpu else device_type()
        if self.on_divergence not in ("stop", "skip", "rollback"):
            raise InputError(f"on_divergence: must be stop, skip or rollback, got {self.on_divergence!r}.")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise InputError(f"spike_factor: must be more than 1, got {self.spike_factor}.")
        if not 0 <= self.muon_momentum < 1:
            raise InputError(f"muon_momentum: must be at least 0 and less than 1, got {self.muon_momentum}.")
        self.use_cpu = device == "cpu"  # upstream takes bfloat16 on a CPU only when told that it is one
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false"):  # as YAML has it
            self.fsdp = self.fsdp.lower() == "true"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bfloat16(device)
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise InputError(f"early_stopping_patience: must be at least 1, got {self.early_stopping_patience}.")
            self.load_best_model_at_end = True
        super().__post_init__()


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def _tokens(name: str, value, action) -> list[str]:
    """One YAML entry as command-line words, so that both are checked by the same code."""
    if value is None:
        return []
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            raise InputError(f"{name}: expected one value, got the list {value}.")
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def parse_recipe(path: str, overrides: list[str]) -> tuple[ModelArguments, DataArguments, HfLmTrainingArguments]:
    """
    Read a recipe.

    Args:
        path: YAML file with a flat mapping of keys to values.
        overrides: command-line words, `--key value ...`; they win over the file.

    Raises:
        InputError: the file cannot be read, a key is unknown (the closest known one is named) or a value has the
            wrong type.
    """
    parser = _Parser((ModelArguments, DataArguments, HfLmTrainingArguments), allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}

    def unknown(key: str, where: str) -> InputError:
        close = difflib.get_close_matches(key, actions, n=1)
        return InputError(f"{where}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "."))

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: must hold keys and values, got {type(recipe).__name__}.")

    words = []
    for key, value in recipe.items():
        if key not in actions:
            raise unknown(str(key), path)
        words += _tokens(key, value, actions[key])
    try:
        parser.parse_args(words)  # by itself first, so that an error names the file
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        *parsed, left_over = parser.parse_args_into_dataclasses([*words, *overrides], return_remaining_strings=True)
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        keys = [key for key, value in recipe.items() if str(error).startswith(f"{value} ")]
        raise InputError(": ".join([*keys[:1], one_line(error)])) from error
    if left_over:
        raise unknown(left_over[0].lstrip("-").split("=")[0].replace("-", "_"), "command line")
    return tuple(parsed)
