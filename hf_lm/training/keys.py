"""
The keys that this package adds to a recipe: those of the model, and those beside transformers' `TrainingArguments`.

Nothing here imports torch, so that `hf-lm train --help` answers at once.
"""

import os
from dataclasses import dataclass, field

from .recipe_file import read_mapping

# What a recipe gets that does not name these keys. The rates are those of the shipped recipes; recipes/guides/train.md
# says what they gain together. Steps below 1 are shares of the run.
EVERY_RUN = {
    "warmup_steps": 0.02,
    "logging_steps": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_steps": 0.25,
}
NEW_MODEL = {"learning_rate": 0.003, "muon_learning_rate": 0.02, "adam_beta2": 0.95}
# Recipe keys that have been renamed: {old key: (new key, the release of hf-lm that stops reading the old one)}.
RENAMED: dict[str, tuple[str, str]] = {}


def defaults_of_run(is_new: bool, named: dict) -> dict:
    """
    Values of keys that a recipe does not name, where they are not those of the dataclasses.

    Args:
        is_new: a new model is trained, not a checkpoint.
        named: the recipe. Named evaluations decide when it saves, and the other way round, so that the best checkpoint
            can be kept; another optimizer than ours, or DeepSpeed, trains all weights without Muon.
    """
    values = EVERY_RUN | (NEW_MODEL if is_new else {})
    if named.get("save_strategy") == "epoch":
        values["eval_strategy"] = "epoch"
    if "save_steps" in named:
        values["eval_steps"] = named["save_steps"]
    if "eval_steps" in named:
        del values["save_steps"]
    if named.get("load_best_model_at_end") or named.get("early_stopping_patience"):  # each save needs its score
        values |= {"save_steps": named["eval_steps"]} if "eval_steps" in named else {}
        values |= {"save_strategy": "epoch"} if named.get("eval_strategy") == "epoch" else {}
    if named.get("optim") or named.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        values.pop("muon_learning_rate", None)
    return {name: value for name, value in values.items() if name not in named}


@dataclass
class ModelArguments:
    """What is trained: a new model (with a new tokenizer, unless one is named) or an existing checkpoint."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the checkpoint to start from; none: a new model", "is_path": True},
    )
    architecture: str | None = field(
        default=None, metadata={"help": "shape of a new model: llama, qwen3, gpt2, ...; default: that of HfLmConfig"}
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={
            "help": "fields of HfLmConfig (or of the architecture's configuration), as "
            "hidden_size=128,num_hidden_layers=6 or as a mapping in YAML"
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of a tokenizer; default: the model's, or a new one", "is_path": True},
    )
    vocab_size: int = field(default=2048, metadata={"help": "size of a new tokenizer's vocabulary, in tokens"})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, varlen, flash_attention_2, ...; default: the fastest for the device"},
    )
    tokenizer_kind: str = field(default="bpe", metadata={"help": "a new tokenizer's kind: bpe, byte or char"})
    extend_vocab_size: int | None = field(
        default=None, metadata={"help": "number of tokens to add to the checkpoint's tokenizer for the training text"}
    )
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter instead of all weights"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "its update is scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapter"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the layers that get one; default: all linear layers but the head"}
    )
    license: str | None = field(default=None, metadata={"help": "licence of the resulting model, for its card"})
    language: str | None = field(default=None, metadata={"help": "language of the text, as en or zh, for the card"})

    def config_fields(self) -> dict:
        """
        `config_overrides` as a dict.

        Raises:
            InputError: not `name=value` pairs.
        """
        fields = self.config_overrides or {}
        return read_mapping("config_overrides", fields) if isinstance(fields, str) else dict(fields)


@dataclass
class TrainingKeys:
    """How it is trained, beside `transformers.TrainingArguments`: our own keys, and theirs with other defaults."""

    output_dir: str | None = field(
        default="runs/hf_lm", metadata={"help": "folder that receives everything", "is_path": True}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast; default: where the hardware is fast at it"}
    )
    report_to: str | list[str] = field(
        default="tensorboard", metadata={"help": "tensorboard, trackio, wandb, ..., several of them, or none"}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "hide NaN losses from the log (default of transformers; here they stop the run)"},
    )
    lr_scheduler_type: str = field(default="warmup_stable_decay", metadata={"help": "shape of the learning rate"})
    lr_decay_ratio: float = field(
        default=0.4, metadata={"help": "share of the steps over which warmup_stable_decay falls to zero, linearly"}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "train the decoder layers' matrices with Muon at this rate; the rest by optim as usual"},
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Nesterov momentum of Muon"})
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "texts to continue at each evaluation; an empty one starts a document"}
    )
    sample_tokens: int = field(default=64, metadata={"help": "length of these samples, in tokens"})
    forecast: bool = field(
        default=True,
        metadata={"help": "time some steps before the first one and print the run's predicted time and memory"},
    )
    log_histograms: bool = field(default=False, metadata={"help": "weights to TensorBoard, at each evaluation"})
    log_graph: bool = field(default=False, metadata={"help": "the model's graph to TensorBoard"})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "keep the best checkpoint instead of the last one; default: where the text is read twice or more and "
            "each checkpoint is evaluated"
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "stop after this number of evaluations without a new best metric_for_best_model"},
    )
    overwrite: bool = field(default=False, metadata={"help": "delete the run that output_dir holds and start anew"})
    resume: bool = field(default=False, metadata={"help": "resume from the newest checkpoint in output_dir"})

    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "transformers' key; every parameter of ours is used in every step"}
    )
    allow_changes: bool = field(
        default=False, metadata={"help": "resume although arguments differ from the saved run"}
    )
    restart_missing_state: bool = field(
        default=False, metadata={"help": "resume although state is missing (optimizer, ...): it starts anew"}
    )
    on_divergence: str = field(
        default="stop",
        metadata={
            "help": "when loss or gradients are NaN or infinite: stop, skip the batch, or rollback to the last "
            "checkpoint's weights and continue with the next batch"
        },
    )
    max_divergences: int = field(default=10, metadata={"help": "stop after more divergences than this"})
    spike_factor: float | None = field(
        default=None, metadata={"help": "treat a loss above spike_factor times the recent mean as diverged"}
    )
