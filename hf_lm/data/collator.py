"""Blocks to batches."""

import numpy as np
import torch

from .packing import IGNORED


class PackedCollator:
    """
    Stacks blocks into int64 tensors `input_ids`, `labels`, `position_ids` of shape `(batch, longest)`.

    Padding stands on the right; its labels are -100 and its positions start again at 0, which makes it a document of
    its own. There is no attention mask. Where every row is one unbroken segment of the same length the positions say
    nothing and are left out: attention then needs no mask at all.

    Args:
        pad_token_id: what fills up shorter blocks; any token will do, nothing sees it.
    """

    def __init__(self, pad_token_id: int | None):
        self.pad_token_id = pad_token_id or 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": np.full((len(rows), longest), self.pad_token_id, dtype=np.int64),
            "labels": np.full((len(rows), longest), IGNORED, dtype=np.int64),
            "position_ids": np.zeros((len(rows), longest), dtype=np.int64),
        }
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            for name in batch:
                batch[name][number, :length] = row[name]
            batch["position_ids"][number, length:] = np.arange(longest - length)
        if (batch["position_ids"] == np.arange(longest)).all():
            del batch["position_ids"]
        return {name: torch.from_numpy(values) for name, values in batch.items()}
