"""`TrainingArguments` as recipes have them, and which of them must not change over a resume."""

import json
from dataclasses import dataclass, fields
from typing import ClassVar

from transformers import TrainingArguments
from transformers.utils import logging

from ..errors import InputError
from ..hardware import device_type, has_fast_bfloat16
from .keys import TrainingKeys
from .metrics import decide_direction, greater_is_better
from .optimizers import OPTIMIZERS

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
        self.use_cpu = device == "cpu"  # transformers takes bfloat16 on a CPU only when told that it is one
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
