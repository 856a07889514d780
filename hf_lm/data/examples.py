"""
Examples of which only a part is learned (a prompt and its answer), whole, several in one block.

Unlike a document, an example is never cut in two: it starts and ends in the same block. Positions start at 0 in each,
which is how the model keeps them apart.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..errors import InputError
from .packing import FEATURES, IGNORED

logger = logging.get_logger(__name__)

OPEN_BLOCKS = 64  # how many blocks wait for an example that fits


@dataclass
class Example:
    """
    One example.

    Args:
        input_ids: `(tokens,)`, special tokens included.
        learned: `(tokens,)` of bool: which of them the model learns to predict.
        num_bytes: UTF-8 bytes of the text behind the learned tokens.
    """

    input_ids: list[int]
    learned: list[bool]
    num_bytes: int

    def row(self) -> dict:
        """As a row of packed blocks. Nothing predicts the first token."""
        ids = np.array(self.input_ids, dtype=np.int32)
        labels = np.where(self.learned, ids, IGNORED).astype(np.int32)
        labels[0] = IGNORED
        positions = np.arange(len(ids), dtype=np.int32)
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "num_bytes": self.num_bytes}


def fit_examples(examples: Iterable[Example], block_size: int, policy: str, where: str) -> Iterator[dict]:
    """
    Bring examples to at most `block_size` tokens, and say how many were too long.

    Args:
        policy: what becomes of longer ones: `"cut"` (at their end; dropped where nothing learned is left), `"drop"`
            or `"error"`.
        where: what they are called in messages.

    Raises:
        InputError: with `"error"` one is too long; or no example is left.
    """
    total = cut = dropped = 0
    for number, example in enumerate(examples):
        total += 1
        row = example.row()
        if len(row["input_ids"]) > block_size:
            if policy == "error":
                raise InputError(f"long_examples: example {number} of {where} has {len(row['input_ids'])} tokens, block_size is {block_size}.")  # fmt: skip
            row = {name: value if name == "num_bytes" else value[:block_size] for name, value in row.items()}
            if policy == "drop" or (row["labels"] == IGNORED).all():
                dropped += 1
                continue
            cut += 1
            row["num_bytes"] = round(
                row["num_bytes"] * (row["labels"] != IGNORED).sum() / max(sum(example.learned), 1)
            )
        yield row
    if cut or dropped:
        logger.warning(
            f"{where}: of {total} examples {cut} were cut to block_size {block_size} and {dropped} left out."
        )
    if total == dropped:
        reason = f"all {total} examples are longer than block_size {block_size}" if total else "there are no examples"
        raise InputError(f"{where}: {reason}; nothing is left to learn.")


def pack_rows(rows: Iterable[dict], block_size: int) -> Iterator[dict]:
    """
    Put rows into blocks of at most `block_size` tokens: each into the fullest open block that has room for it.

    Every row comes out exactly once; blocks come out roughly in the order of their first row.
    """
    open_blocks: list[list[dict]] = []
    sizes: list[int] = []

    def close(index: int) -> dict:
        parts = open_blocks.pop(index)
        sizes.pop(index)
        names = ("input_ids", "labels", "position_ids")
        block = {name: np.concatenate([part[name] for part in parts]) for name in names}
        return {**block, "num_bytes": sum(part["num_bytes"] for part in parts)}

    for row in rows:
        length = len(row["input_ids"])
        fits = [index for index, size in enumerate(sizes) if size + length <= block_size]
        if fits:
            best = max(fits, key=sizes.__getitem__)
            open_blocks[best].append(row)
            sizes[best] += length
            continue
        if len(open_blocks) == OPEN_BLOCKS:
            yield close(max(range(len(sizes)), key=sizes.__getitem__))
        open_blocks.append([row])
        sizes.append(length)
    while open_blocks:
        yield close(0)


def build_examples(
    rows: Iterable[dict],
    encode: Callable[[dict], Iterable[Example]],
    block_size: int,
    packing: bool = True,
    policy: str = "cut",
    where: str = "the data",
) -> Dataset:
    """
    Rows to blocks (or, without `packing`, to one block an example).

    Args:
        encode: the examples that one row makes.
        policy, where: see `fit_examples`.

    Returns:
        Rows of `input_ids`, `labels`, `position_ids`, `num_bytes`, as `pack_documents` makes them of documents.
    """
    examples = (example for row in rows for example in encode(row))
    fitted = fit_examples(examples, block_size, policy, where)
    blocks = pack_rows(fitted, block_size) if packing else fitted
    return Dataset.from_list(list(blocks), features=FEATURES).with_format("numpy")


def show_example(row: dict, tokenizer, color: bool) -> str:
    """
    A block as text, documents on lines of their own.

    Args:
        row: a row of `build_examples` or `pack_documents`.
        color: dim what is not learned (ANSI escapes); else it stands in ⟦double brackets⟧.
    """
    before, after = ("\x1b[2m", "\x1b[22m") if color else ("⟦", "⟧")
    text, start = [], 0
    masked, positions = np.asarray(row["labels"]) == IGNORED, np.asarray(row["position_ids"])
    changes = (np.diff(masked.astype(int)) != 0) | (np.diff(positions) != 1)
    for end in [*(np.flatnonzero(changes) + 1).tolist(), len(masked)]:
        if start and positions[start] == 0:
            text.append("\n")
        part = tokenizer.decode(row["input_ids"][start:end])
        text.append(f"{before}{part}{after}" if masked[start] else part)
        start = end
    return "".join(text)
