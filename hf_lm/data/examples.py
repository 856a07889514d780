"""
Examples of which only a part is learned (a prompt and its answer), whole, several in one block.

Unlike a document, an example is never cut in two: it starts and ends in the same block. Positions start at 0 in each,
which is how the model keeps them apart.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import InputError
from .packing import FEATURES, IGNORED
from .pipeline import token_rows, tokenizer_key

logger = logging.get_logger(__name__)

OPEN_BLOCKS = 64  # how many blocks wait for an example that fits
CLASSES = Features({"input_ids": FEATURES["input_ids"], "labels": Value("int64"), "num_bytes": FEATURES["num_bytes"]})


@dataclass
class Example:
    """
    One example.

    Args:
        input_ids: `(tokens,)`, special tokens included.
        learned: `(tokens,)` of bool: which of them the model learns to predict.
        num_bytes: UTF-8 bytes of the text behind the learned tokens.
        label: the number of its class, for a head that learns nothing else.
    """

    input_ids: list[int]
    learned: list[bool]
    num_bytes: int
    label: int | None = None

    def row(self) -> dict:
        """As a row of packed blocks, in which nothing predicts the first token; or, of a class, with its number."""
        if self.label is not None:  # for tokenizer.pad, which takes no arrays
            return {"input_ids": self.input_ids, "labels": self.label, "num_bytes": self.num_bytes}
        ids = np.array(self.input_ids, dtype=np.int32)
        labels = np.where(self.learned, ids, IGNORED).astype(np.int32)
        labels[0] = IGNORED
        positions = np.arange(len(ids), dtype=np.int32)
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "num_bytes": self.num_bytes}


Say = Callable[[str], None]
Encode = Callable[[Iterator[dict], PreTrainedTokenizerBase, Say], Iterator[Example]]


def fit_examples(
    examples: Iterable[Example], block_size: int, policy: str, where: str, say: Say = logger.warning
) -> Iterator[dict]:
    """
    Bring examples to at most `block_size` tokens, and say how many were too long.

    Args:
        policy: what becomes of longer ones: `"cut"` (at their end; dropped where nothing learned is left), `"drop"`
            or `"error"`.
        where: what they are called in messages.
        say: gets the message.

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
        say(f"{where}: of {total} examples {cut} were cut to block_size {block_size} and {dropped} left out.")
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


def _warn(line: str) -> None:
    """Warn of what each pass over a stream would say again."""
    logger.warning_once(line)


def _rows(
    rows: Iterator[dict],
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    block_size: int,
    packing: bool,
    policy: str,
    where: str,
) -> Iterator[dict]:
    fitted = fit_examples(encode(rows, tokenizer, say), block_size, policy, where, say)
    yield from pack_rows(fitted, block_size) if packing else fitted


def build_examples(
    rows: Dataset | IterableDataset,
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    packing: bool = True,
    policy: str = "cut",
    where: str = "the data",
    is_classes: bool = False,
    readers: int = 1,
) -> Dataset | IterableDataset:
    """
    Rows to blocks (or, without `packing`, to one block an example).

    What was made once of a table is read from the cache of `datasets` the next time, warnings included; of a stream
    blocks are made as it is read.

    Args:
        encode: `encode(rows, tokenizer, say)` yields the examples of rows, in order; `say(line)` warns. A function of a
            module or a `partial` of one: its arguments are part of the cache's key, the tokenizer as what it does.
        policy, where: see `fit_examples`.
        is_classes: the examples have labels of classes (and are not packed).
        readers: see `token_rows`.

    Returns:
        Rows of `input_ids`, `labels`, `position_ids`, `num_bytes`, as `pack_documents` makes them of documents; of
        classes, `labels` is a number, and there are no positions.

    Raises:
        InputError: see `fit_examples`; or the rows are a stream, and `policy` is `"error"`.
    """
    is_stream, notes = isinstance(rows, IterableDataset), []
    if is_stream and policy == "error":
        raise InputError("long_examples: error looks at all examples before the training; of a stream, cut or drop.")
    options = {"block_size": block_size, "packing": packing, "policy": policy, "where": where}
    make = partial(_rows, encode=encode, tokenizer=tokenizer, say=_warn if is_stream else notes.append, **options)
    key = ["examples", Hasher.hash(encode), tokenizer_key(tokenizer), options]
    built = token_rows(rows, make, key, CLASSES if is_classes else FEATURES, readers, notes)
    if is_stream:
        return built
    for line in built.info.description.splitlines():
        logger.warning(line)
    return built if is_classes else built.with_format("numpy")


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
