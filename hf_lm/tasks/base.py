"""What all tasks share: a tokenizer, blocks, a model, a trainer; named, or new."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import EvalPrediction

from ..configuration_hf_lm import HfLmConfig
from ..data.arguments import DataArguments
from ..data.collator import PackedCollator
from ..data.documents import load_rows
from ..data.examples import show_example
from ..errors import InputError, explained, one_line
from ..interop.adapters import add_adapter
from ..interop.convert import readable
from ..interop.folders import is_missing_folder
from ..interop.shapes import check_architecture, new_fields
from ..loading import load_tokenizer
from ..modeling_hf_lm import HfLmForCausalLM
from ..synonyms import FIELDS, closest
from ..tokenization import extend_tokenizer, train_tokenizer
from ..training.arguments import HfLmTrainingArguments, keep_best_by_default
from ..training.device_tuning import fit_to_cpu, fit_to_gpu
from ..training.keys import ModelArguments
from ..training.metrics import BITS_PER_BYTE, LANGUAGE_MODELING, WholeSet, require_reported
from ..training.trainer import HfLmTrainer


@torch.no_grad()
def add_embeddings(model: torch.nn.Module, count: int, stands_for: list[list[int]]) -> None:
    """
    Enlarge the embedding (and the head) to `count` tokens.

    Args:
        stands_for: the old tokens that each of the first new ones replaces; it starts as their mean. The rest starts as
            transformers has it: drawn around the mean of all (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(count)
    head = model.get_output_embeddings()
    for layer in (model.get_input_embeddings(), head):
        for number, parts in enumerate(stands_for if layer is not None else []):
            layer.weight[old + number] = layer.weight[parts].mean(dim=0)


@dataclass(frozen=True)
class PreparedData:
    """
    What a task has made of its data, handed on to the model, the trainer and the scores.

    Attributes:
        rows: of each split, as `Task.load` gives them.
        tokenizer: the named one, the checkpoint's, or a new one.
        stands_for: for each token that the tokenizer was extended by, the old ones it replaces.
        encoded: rows of tokens for the collator, of each split that is trained on or evaluated.
    """

    rows: dict[str, Dataset | IterableDataset]
    tokenizer: PreTrainedTokenizerBase
    stands_for: list[list[int]] = field(default_factory=list)
    encoded: dict[str, Dataset | IterableDataset] = field(default_factory=dict)


class Task(ABC):
    """
    From a recipe to a trainer that is ready to run, and to its scores. A task overrides what differs.

    An instance holds the recipe and nothing else: what one method finds out, others get as an argument.

    Attributes:
        auto_class: loads an existing checkpoint.
        model_class: makes a new model.
        row_likelihoods: the trainer's: what `metrics_of` gets.
        reported: names of the metrics of an evaluation, each of which `training.metrics` has.
        result_names: `{key of metrics.json: label}`, the rows of results of the card and the report, main ones first.
        charts: `{title: {label: key of the log}}`, the report's charts of the task's metrics.
    """

    auto_class = AutoModelForCausalLM
    model_class = HfLmForCausalLM
    peft_task_type = "CAUSAL_LM"
    row_likelihoods = False
    reported = LANGUAGE_MODELING + BITS_PER_BYTE
    result_names = {
        "bits_per_byte": "bits per byte",
        "perplexity": "perplexity per token",
        "eval_loss": "loss (nats per token)",
    }
    charts = {
        "Loss, nats per token": {"training": "loss", "held out": "eval_loss"},
        "Bits per byte, held out": {"": "eval_bits_per_byte"},
    }

    def __init__(self, model: ModelArguments, data: DataArguments, training: HfLmTrainingArguments):
        self.model_arguments, self.data_arguments, self.training_arguments = model, data, training
        for key in ("model_name_or_path", "tokenizer_name"):
            name = getattr(model, key)
            if name is not None and is_missing_folder(name, training.output_dir):
                raise InputError(f"{key}: {name}: no such folder (a model of the Hub is named owner/name).")

    def check(self) -> None:
        """
        Check, before anything is read, that the recipe's keys go together.

        Raises:
            InputError: they do not.
        """
        arguments, architecture = self.training_arguments, self.model_arguments.architecture
        if architecture is not None:
            check_architecture(architecture)
            if self.model_arguments.model_name_or_path is not None:
                raise InputError("architecture: is for a new model; that of model_name_or_path has one already.")
        if self.data_arguments.streaming and arguments.train_sampling_strategy == "group_by_length":
            raise InputError(
                "train_sampling_strategy: group_by_length needs the lengths of all rows; a stream has none."
            )
        if arguments.eval_strategy != "no":
            require_reported(arguments.metric_for_best_model, self.reported)

    def load(self) -> dict[str, Dataset | IterableDataset]:
        """Rows of `"train"`, `"validation"` and `"test"`, checked: an `InputError` names the missing column."""
        return load_rows(self.data_arguments)

    @abstractmethod
    def texts(self, rows) -> Iterator[str]:
        """What a new tokenizer learns from."""

    def build_tokenizer(self, rows) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
        """The named tokenizer, the checkpoint's, or a new one trained on the rows; and `PreparedData.stands_for`."""
        tokenizer, stands_for = self._find_tokenizer(rows)
        self.complete_tokenizer(tokenizer)
        return tokenizer, stands_for

    def complete_tokenizer(self, tokenizer) -> None:  # noqa: B027 (most need nothing)
        """Give the tokenizer what the task needs beside a vocabulary: special tokens, a chat template."""

    def _find_tokenizer(self, rows) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
        arguments = self.model_arguments
        name = arguments.tokenizer_name or arguments.model_name_or_path
        if name is None:
            if arguments.extend_vocab_size is not None:
                raise InputError("extend_vocab_size: needs a model_name_or_path whose tokenizer is extended.")
            kind = arguments.tokenizer_kind
            return train_tokenizer(self.texts(rows), vocab_size=arguments.vocab_size, kind=kind), []
        try:
            tokenizer = load_tokenizer(name)
        except InputError as error:
            key = "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path"
            raise InputError(f"{key}: {error}") from error
        if arguments.extend_vocab_size is not None:
            return extend_tokenizer(tokenizer, self.texts(rows), arguments.extend_vocab_size)
        return tokenizer, []

    @abstractmethod
    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        """Rows of tokens for the collator, from rows of the data."""

    def readers(self, split: str) -> int:
        """Processes times loader workers, among which a stream is shared."""
        arguments = self.training_arguments
        return arguments.world_size * max(arguments.dataloader_num_workers, 1) if split == "train" else 1

    def collator(self, tokenizer):
        """What makes batches of encoded rows."""
        arguments, data = self.training_arguments, self.data_arguments
        whole = arguments.torch_compile and data.packing  # one length, so one graph
        return PackedCollator(
            tokenizer.pad_token_id,
            lengths=arguments.device.type == "cuda",
            pad_to_multiple_of=data.block_size if whole else 1,
        )

    def encode_splits(self, data: PreparedData) -> dict[str, Dataset | IterableDataset]:
        """Rows of tokens of each split that is trained on or evaluated."""
        splits = [split for split in ("train", "validation") if split in data.rows]
        return {split: self.encode(data.rows[split], data.tokenizer, split) for split in splits}

    def read(self, checkpoint: str | None = None, tokenizer=None) -> PreparedData:
        """
        Rows and tokenizer, without the rows of tokens.

        Args:
            checkpoint: whose tokenizer is taken.
            tokenizer: taken instead of the recipe's.

        Raises:
            InputError: see `check`, `load` and `build_tokenizer`.
        """
        self.check()
        rows = self.load()
        if checkpoint:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if tokenizer is not None:
            return PreparedData(rows, tokenizer)
        return PreparedData(rows, *self.build_tokenizer(rows["train"]))

    def prepare(self, checkpoint: str | None = None, tokenizer=None) -> PreparedData:
        """`read`, with the rows of tokens. Of several processes the first works, and the others read its cache."""
        with self.training_arguments.main_process_first(desc="data"):
            data = self.read(checkpoint, tokenizer)
            return replace(data, encoded=self.encode_splits(data))

    def metrics_of(self, data: PreparedData, split: str) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """The trainer's `compute_metrics` for a held-out split; None for loss, perplexity and bits per byte."""
        return None

    def config_fields(self, data: PreparedData) -> dict:
        """Fields of a new model's configuration, and of a loaded one's, that the task decides."""
        return {}

    def generation_defaults(self) -> dict:
        """How a new model generates unless told otherwise."""
        return {
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
            "max_new_tokens": min(256, self.data_arguments.block_size),
        }

    def build_model(self, data: PreparedData) -> torch.nn.Module:
        """A new model that fits the tokenizer, or the named checkpoint with its configuration overridden."""
        arguments, attention = self.model_arguments, self.model_arguments.attn_implementation
        tokenizer, fields = data.tokenizer, self.config_fields(data) | arguments.config_fields()
        if (name := arguments.model_name_or_path) is not None:
            with readable(name):
                config = getattr(self.auto_class, "config_class", AutoConfig).from_pretrained(name)
                for field, value in fields.items():
                    setattr(config, field, value)
                # What an adapter leaves frozen need not be in float32 where matmuls are in bfloat16 anyway.
                keeps = arguments.use_peft and self.training_arguments.bf16 and config.dtype == torch.bfloat16
                dtype = torch.bfloat16 if keeps else torch.float32
                model = self.auto_class.from_pretrained(
                    name, config=config, attn_implementation=attention, dtype=dtype
                )
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                if arguments.use_peft:
                    raise InputError(
                        "use_peft: the tokenizer has new tokens, which an adapter cannot hold; train all weights."
                    )
                add_embeddings(model, len(tokenizer), data.stands_for)
            return model
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": self.data_arguments.block_size}
        if arguments.architecture is not None:
            shape = new_fields(arguments.architecture, arguments.config_fields(), **sizes, **special)
            fields = shape | self.config_fields(data)
        elif unknown := sorted(arguments.config_fields().keys() - HfLmConfig.__dataclass_fields__):
            close = closest(unknown[0], HfLmConfig.__dataclass_fields__, FIELDS)
            meant = f"; did you mean {close!r}?" if close else "."
            raise InputError(f"config_overrides: HfLmConfig has no field {', '.join(unknown)}{meant}")
        with explained("config_overrides"):
            config = HfLmConfig(attn_implementation=attention, **(sizes | special | fields))
        model = self.model_class(config)
        if model.can_generate():
            special = {name: getattr(config, name) for name in special}
            model.generation_config = GenerationConfig(**self.generation_defaults(), **special)
        return model

    def fit_to_cpu(self, model: torch.nn.Module) -> None:
        """`hardware.fit_to_cpu`, as the recipe asks for it."""
        arguments = self.training_arguments
        fit_to_cpu(
            model,
            arguments.per_device_train_batch_size,
            self.data_arguments.block_size,
            arguments.bf16,
            attention=self.model_arguments.attn_implementation is None,
            recompute=not (arguments.gradient_checkpointing or arguments.torch_compile),
        )

    def build_trainer(self, data: PreparedData) -> HfLmTrainer:
        """Data and model in a trainer that is ready to run, or to resume from a checkpoint."""
        arguments, tokenizer, encoded = self.training_arguments, data.tokenizer, dict(data.encoded)
        if isinstance(encoded["train"], IterableDataset) and self.data_arguments.shuffle_buffer_size:
            size = self.data_arguments.shuffle_buffer_size
            encoded["train"] = encoded["train"].shuffle(seed=arguments.data_seed or arguments.seed, buffer_size=size)
        model = self.build_model(data)
        if (limit := getattr(model.config, "max_position_embeddings", None)) is not None:  # where pipelines truncate
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        if arguments.device.type == "cpu":
            self.fit_to_cpu(model)
        else:
            attention = self.model_arguments.attn_implementation is None
            recompute = arguments.torch_compile and not arguments.gradient_checkpointing
            fit_to_gpu(model, arguments.bf16 or arguments.fp16, attention, recompute)
        if self.model_arguments.use_peft:
            model = add_adapter(model, self.model_arguments, self.peft_task_type)
        evaluation = encoded.get("validation")
        if evaluation is None:
            arguments.eval_strategy = "no"
        keep_best_by_default(arguments, len(encoded["train"]) if isinstance(encoded["train"], Dataset) else None)
        if arguments.early_stopping_patience is not None and arguments.eval_strategy == "no":
            raise InputError("early_stopping_patience: needs held-out data and an eval_strategy, steps or epoch.")
        compute = self.metrics_of(data, "validation")
        try:
            return HfLmTrainer(
                model=model,
                args=arguments,
                train_dataset=encoded["train"],
                eval_dataset=evaluation,
                data_collator=self.collator(tokenizer),
                compute_metrics=compute and WholeSet(compute),
                row_likelihoods=self.row_likelihoods,
                processing_class=tokenizer,
            )
        except ValueError as error:  # of transformers about arguments
            raise error if isinstance(error, InputError) else InputError(one_line(error)) from error

    def scores_before(self, trainer: HfLmTrainer, data: PreparedData) -> dict:
        """What a checkpoint scores before the training, for `scores` to compare with; nothing by default."""
        return {}

    def scores(self, trainer: HfLmTrainer, data: PreparedData, before: dict) -> dict:
        """
        The numbers on what was held out, for metrics.json; main ones first.

        Args:
            before: what `scores_before` gave.
        """
        if trainer.eval_dataset is None:
            return {}
        held_out = trainer.held_out_scores()
        names = ("bits_per_byte", "perplexity", "loss", "tokens")
        numbers = {name if name[0] in "bp" else f"eval_{name}": held_out[f"eval_{name}"] for name in names}
        interval = [held_out["eval_bits_per_byte_low"], held_out["eval_bits_per_byte_high"]]
        return {**numbers, "bits_per_byte_interval": interval}

    def show(self, trainer: HfLmTrainer, row: dict, color: bool) -> str:
        """A row of training data as the model sees it; `color` dims what is not learned."""
        return show_example(row, trainer.processing_class, color)

    def text_language(self) -> str | list[str] | None:
        """The language of the text, for the card."""
        return self.model_arguments.language

    @staticmethod
    def usage(metrics: dict) -> str | None:
        """Lines that use `tokenizer` and `model`, for the card; None where those of the model's pipeline do."""
        return None

    def summary(self, metrics: dict) -> str:
        """The main number, for the line that a person reads at the end."""
        bits = metrics.get("bits_per_byte")
        return "" if bits is None else f"{bits:.3f} bits per byte held out"
