"""Predict every token of a text: pre-training, from scratch or continued."""

from collections.abc import Iterator

from datasets import Dataset, IterableDataset

from ...data.documents import load_documents
from ...data.packing import pack_documents
from .base import Task


class LanguageModeling(Task):
    """Documents in one column, packed into blocks; every token is learned."""

    def load(self) -> dict[str, Dataset | IterableDataset]:
        return load_documents(self.data_arguments)

    def texts(self, rows) -> Iterator[str]:
        return (row["text"] for row in rows)

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        return pack_documents(rows, tokenizer, self.data_arguments.block_size)
