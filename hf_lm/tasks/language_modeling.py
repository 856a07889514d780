"""Predict every token of a text: pre-training, from scratch or continued."""

from collections.abc import Iterator

from datasets import Dataset, IterableDataset, interleave_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.arguments import DataArguments
from ..data.documents import load_documents
from ..data.packing import pack_documents
from ..errors import InputError
from ..evaluation.text import score_documents
from .base import Task


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

    def load(self) -> dict[str, Dataset | IterableDataset]:
        return load_documents(self.data_arguments)

    def texts(self, rows) -> Iterator[str]:
        return (row["text"] for row in rows)

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        arguments = self.training_arguments
        readers = arguments.world_size * max(arguments.dataloader_num_workers, 1) if split == "train" else 1
        block_size, share = self.data_arguments.block_size, self.data_arguments.replay_percentage / 100
        blocks = pack_documents(rows, tokenizer, block_size, readers)
        if split != "train" or not share:
            return blocks
        # What the model knew is read again among the new: the rest of control_file, as often as it takes.
        replayed = pack_documents(self.control["train"], tokenizer, block_size)
        seed = self.training_arguments.seed
        mixed = interleave_datasets([blocks, replayed], [1 - share, share], seed, stopping_strategy="all_exhausted")
        return mixed.with_format("numpy")

    def build_trainer(self, checkpoint: str | None):
        data, base = self.data_arguments, self.model_arguments.model_name_or_path
        if data.control_file:
            if base is None:
                raise InputError("control_file: needs a model_name_or_path, whose scores it compares with.")
            percent = data.control_split_percentage
            if data.replay_percentage and (not percent or data.streaming):
                raise InputError(
                    "replay_percentage: needs a control_split_percentage (scored, not replayed), no streaming."
                )
            self.control = load_documents(
                DataArguments(train_file=data.control_file, validation_split_percentage=percent)
            )
        elif data.replay_percentage:
            raise InputError("replay_percentage: needs a control_file, whose text is replayed.")
        trainer = super().build_trainer(checkpoint)
        if data.control_file:
            model = AutoModelForCausalLM.from_pretrained(base).to(trainer.args.device)
            self.before = self._bits_per_byte(model, AutoTokenizer.from_pretrained(base))
        return trainer

    def _bits_per_byte(self, model, tokenizer) -> dict[str, float]:
        """On the held-out text, and on `control_file`."""
        control = self.control.get("validation", self.control["train"])
        sources = {"bits_per_byte": self.rows.get("validation"), "control_bits_per_byte": control}
        block_size = self.data_arguments.block_size
        return {
            name: score_documents(model.eval(), tokenizer, self.texts(rows), block_size).bits_per_byte
            for name, rows in sources.items()
            if rows is not None
        }

    def scores(self, trainer) -> dict:
        scores = super().scores(trainer)
        if self.data_arguments.control_file:
            scores["control_bits_per_byte"] = self._bits_per_byte(trainer.model, trainer.processing_class)[
                "control_bits_per_byte"
            ]
            scores |= {f"{name}_before": value for name, value in self.before.items()}
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
