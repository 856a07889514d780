"""Blocks to batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .packing import IGNORED

SIZE = "num_bytes"  # column: UTF-8 bytes of the text that a row's learned tokens cover


@dataclass
class PackedCollator:
    """
    Stacks blocks into int64 tensors `input_ids`, `labels`, `position_ids` of shape `(batch, longest)`.

    Padding stands on the right, where no token sees it; its labels are -100. There is no attention mask. Where every
    row is one unbroken segment the positions say nothing and are left out: attention then needs no mask at all.

    Args:
        pad_token_id: what fills up shorter blocks; any token will do, nothing sees it.
        lengths: where documents are packed, also say where they end in the flattened batch, as kernels for documents of
            different lengths (FlashAttention) need it: `cu_seq_lens_q`, `cu_seq_lens_k` (int32, filled up to a power of
            two with the end, so that their number seldom changes), `max_length_q`, `max_length_k` (that of a row).
        pad_to_multiple_of: the longest block is padded too, to a multiple of this number of tokens.
        fill_to_rows: a batch of fewer blocks gets rows of padding: one shape, so that a compiled model has one graph.
    """

    pad_token_id: int | None
    lengths: bool = False
    pad_to_multiple_of: int = 1
    fill_to_rows: int = 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        longest = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (max(len(rows), self.fill_to_rows), longest)
        batch = {
            "input_ids": np.full(shape, self.pad_token_id or 0, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
            "position_ids": np.tile(np.arange(longest), (shape[0], 1)),
        }
        for number, row in enumerate(rows):
            for name in batch:
                batch[name][number, : len(row[name])] = row[name]
        if (batch["position_ids"] == np.arange(longest)).all():
            del batch["position_ids"]
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return tensors | self._lengths(batch["position_ids"]) if self.lengths and "position_ids" in batch else tensors

    @staticmethod
    def _lengths(position_ids: np.ndarray) -> dict[str, torch.Tensor | int]:
        begins = np.flatnonzero(np.diff(position_ids, axis=1, prepend=-2) != 1)  # the first of a row always
        filled = np.full(1 << len(begins).bit_length(), position_ids.size, dtype=np.int32)
        filled[: len(begins)] = begins
        borders, longest = torch.from_numpy(filled), position_ids.shape[1]
        return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


@dataclass
class SizedCollator:
    """
    Another collator, whose batches also hold `num_bytes`, `(rows,)`, where the rows have it.

    Args:
        columns: those that the other collator gets; default: all.
    """

    collator: Callable[[list[dict]], dict]
    columns: set[str] | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        names = [name for name in rows[0] if name != SIZE and (self.columns is None or name in self.columns)]
        batch = self.collator([{name: row[name] for name in names} for row in rows])
        if all(SIZE in row for row in rows):
            batch[SIZE] = torch.tensor([int(row[SIZE]) for row in rows])
        return batch
