"""Predict every token of a text: pre-training, from scratch or continued."""

from collections.abc import Iterator

from datasets import Dataset, IterableDataset, interleave_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.arguments import DataArguments
from ..data.documents import load_documents
from ..data.packing import pack_documents
from ..errors import InputError
from ..evaluation.text import score_documents
from ..training.trainer import HfLmTrainer
from .base import PreparedData, Task


class LanguageModeling(Task):
    """
    Documents in one column, packed into blocks; every token is learned.

    With `control_file`, a continued model is scored before and after on what it learns and on what it should not forget.
    """

    result_names = {
        "bits_per_byte": "bits per byte",
        "bits_per_byte_before": "bits per byte before this training",
        "control_bits_per_byte": "bits per byte of control_file",
        "control_bits_per_byte_before": "bits per byte of control_file before this training",
    } | Task.result_names

    def check(self) -> None:
        super().check()
        data = self.data_arguments
        if data.control_file and self.model_arguments.model_name_or_path is None:
            raise InputError("control_file: needs a model_name_or_path, whose scores it compares with.")
        if data.replay_percentage and not data.control_file:
            raise InputError("replay_percentage: needs a control_file, whose text is replayed.")
        if data.replay_percentage and (not data.control_split_percentage or data.streaming):
            raise InputError(
                "replay_percentage: needs a control_split_percentage (scored, not replayed), no streaming."
            )

    def load(self) -> dict[str, Dataset | IterableDataset]:
        """The documents of each split; `"control"` is scored before and after, `"replayed"` read among the new."""
        data = self.data_arguments
        rows = load_documents(data)
        if data.control_file:
            percent = data.control_split_percentage
            known = load_documents(DataArguments(train_file=data.control_file, validation_split_percentage=percent))
            rows |= {"control": known.get("validation", known["train"]), "replayed": known["train"]}
        return rows

    def texts(self, rows) -> Iterator[str]:
        return (row["text"] for row in rows)

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        return pack_documents(rows, tokenizer, self.data_arguments.block_size, self.readers(split))

    def encode_splits(self, data: PreparedData) -> dict[str, Dataset | IterableDataset]:
        encoded, share = super().encode_splits(data), self.data_arguments.replay_percentage / 100
        if share:
            # What the model knew is read again among the new: the rest of control_file, as often as it takes.
            replayed = self.encode(data.rows["replayed"], data.tokenizer, "replayed")
            seed, parts = self.training_arguments.seed, [encoded["train"], replayed]
            mixed = interleave_datasets(parts, [1 - share, share], seed, stopping_strategy="all_exhausted")
            encoded["train"] = mixed.with_format("numpy")
        return encoded

    def _bits_per_byte(self, model, tokenizer, rows) -> float:
        score = score_documents(model.eval(), tokenizer, self.texts(rows), self.data_arguments.block_size)
        return score.bits_per_byte

    def scores_before(self, trainer: HfLmTrainer, data: PreparedData) -> dict:
        if not self.data_arguments.control_file:
            return {}
        base = self.model_arguments.model_name_or_path
        model = AutoModelForCausalLM.from_pretrained(base).to(trainer.args.device)
        tokenizer = AutoTokenizer.from_pretrained(base)
        sources = {"bits_per_byte": "validation", "control_bits_per_byte": "control"}
        return {
            f"{name}_before": self._bits_per_byte(model, tokenizer, data.rows[split])
            for name, split in sources.items()
            if split in data.rows
        }

    def scores(self, trainer: HfLmTrainer, data: PreparedData, before: dict) -> dict:
        scores = super().scores(trainer, data, before)
        if self.data_arguments.control_file:
            after = self._bits_per_byte(trainer.model, trainer.processing_class, data.rows["control"])
            scores |= {"control_bits_per_byte": after, **before}
        return scores

    def summary(self, metrics: dict) -> str:
        if "control_bits_per_byte" not in metrics:
            return super().summary(metrics)
        changes = [
            f"{metrics[f'{key}_before']:.3f} -> {metrics[key]:.3f} bits per byte {where}"
            for key, where in (("bits_per_byte", "held out"), ("control_bits_per_byte", "of control_file"))
            if key in metrics
        ]
        return ", ".join(changes)
