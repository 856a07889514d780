"""Streams of rows whose place can be found again."""

import copy
import itertools
from collections.abc import Iterator

import datasets
import torch


class EndlessStream(torch.utils.data.IterableDataset):
    """
    A stream over and over, shuffled anew each time where it shuffles. What it yields depends on nothing but the stream,
    so that a place in it is a number of rows, whatever the epoch: transformers' trainer loses it after the first one.

    Args:
        rows: a stream with a fixed order (for a given epoch, where it has `set_epoch`).
    """

    def __init__(self, rows: torch.utils.data.IterableDataset):
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        rows = self.rows
        if isinstance(rows, datasets.IterableDataset):
            rows = copy.deepcopy(rows)  # loader workers share its epoch, and need not be in the same one
        for epoch in itertools.count():
            if hasattr(rows, "set_epoch"):
                rows.set_epoch(epoch)
            nothing = True
            for row in rows:
                nothing = False
                yield row
            if nothing:  # a loader worker without a share of the data
                return
