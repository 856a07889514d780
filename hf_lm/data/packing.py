"""
Documents to blocks of tokens.

A *segment* is what the model sees of one document inside one block: the tokens that the tokenizer itself puts before a
text (`<|bos|>` with ours), then tokens of the document, which ends with `eos`. Segments fill blocks one after the other;
their positions start at 0, which is how the model keeps them apart. Every token is predicted exactly once, eos included.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..tokenization import cut, may_be_cut
from .pipeline import token_rows, tokenizer_key

BATCH = 1 << 20  # characters tokenised at once: bounds the memory, whatever the length of the documents
IGNORED = -100
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "position_ids": List(Value("int32")),
        "num_bytes": Value("int64"),
    }
)


def segment_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: `[bos]` for ours and Llama's, `[]` for GPT-2's."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:start])


def _bytes_of_each_token(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """UTF-8 bytes of each token of a byte-level vocabulary (`(vocabulary,)`); None for other kinds."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if '"ByteLevel"' not in json.dumps(backend["decoder"]):
        return None
    sizes = np.zeros(len(tokenizer), dtype=np.int64)
    for token, index in backend["model"]["vocab"].items():
        sizes[index] = len(token)  # one letter of the byte alphabet for each byte
    for added in backend["added_tokens"]:
        sizes[added["id"]] = len(added["content"].encode())
    return sizes


def _bytes_from_offsets(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes that each token covers, from its place in the text; all of the text is covered, none twice."""
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + sum((codes >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    return np.diff(np.concatenate(([0], np.cumsum(widths)))[ends], prepend=0)


def _pieces(texts: Iterable[str], cuttable: bool) -> Iterator[tuple[str, bool]]:
    """Each text in pieces, and of each piece whether it is the text's last."""
    for text in texts:
        pieces = cut(text) if cuttable else iter([text])
        piece = next(pieces)
        for following in pieces:
            yield piece, False
            piece = following
        yield piece, True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in lists of about `BATCH` characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _encode_pieces(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """The arrays of `encode_documents`, a piece of a text at a time, and whether it is the text's last."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens  # the last call may have left another choice
    table = _bytes_of_each_token(tokenizer)
    cuttable = table is not None and may_be_cut(tokenizer)
    encode = backend.encode_batch if table is None else backend.encode_batch_fast  # fast: without places
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(_pieces(texts, cuttable)):
        encodings = encode([piece for piece, _ in batch], add_special_tokens=False)
        for (piece, is_last), encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            sizes = None if table is None else table[ids]
            if sizes is None or sizes.sum() != len(piece.encode()):  # a normaliser or prefix changed the text
                if table is not None:
                    encoding = backend.encode(piece, add_special_tokens=False)
                sizes = _bytes_from_offsets(piece, encoding.offsets)
            if is_last:
                ids = np.append(ids, np.array(eos, dtype=np.int32))
                sizes = np.append(sizes, np.zeros(len(eos), dtype=np.int64))
            yield ids, sizes, is_last


def encode_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    The tokens of each document, eos at the end, and the UTF-8 bytes of the text that each token covers.

    Yields:
        Two arrays of shape `(tokens,)`: int32 ids and int64 bytes (0 for eos).
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, sizes, is_last in _encode_pieces(texts, tokenizer):
        parts.append((ids, sizes))
        if is_last:
            yield np.concatenate([ids for ids, _ in parts]), np.concatenate([sizes for _, sizes in parts])
            parts = []


def segments(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, prefix: list[int]
) -> Iterator[dict]:
    """
    Cut texts into the segments that fill blocks of `block_size` tokens one after the other.

    Yields:
        `input_ids`, `labels`, `position_ids`, each `(segment,)`; `sizes`, the UTF-8 bytes that each predicted token
        covers; the number of the `block` it lies in and of the `document` it comes from.
    """
    prefix = np.array(prefix, dtype=np.int32)
    # Without a prefix nothing predicts a segment's first token; with one, nothing predicts the prefix.
    unpredicted = max(len(prefix), 1)
    block, room, document = 0, block_size, 0
    ids, sizes = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
    for more_ids, more_sizes, is_last in _encode_pieces(texts, tokenizer):
        ids, sizes, start = np.concatenate((ids, more_ids)), np.concatenate((sizes, more_sizes)), 0
        while start < len(ids):
            if room <= unpredicted:  # no room for a token that is predicted
                block, room = block + 1, block_size
            if not is_last and len(ids) < start + room - len(prefix):
                break  # the next piece fills the segment
            end = min(len(ids), start + room - len(prefix))
            segment = np.concatenate((prefix, ids[start:end]))
            labels = segment.copy()
            labels[:unpredicted] = IGNORED
            yield {
                "input_ids": segment,
                "labels": labels,
                "position_ids": np.arange(len(segment), dtype=np.int32),
                "sizes": sizes[start + unpredicted - len(prefix) : end],
                "block": block,
                "document": document,
            }
            room -= len(segment)
            start = end
        ids, sizes, document = ids[start:], sizes[start:], document + is_last


def _blocks(documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[dict]:
    texts = (row["text"] for row in documents)
    parts = segments(texts, tokenizer, block_size, segment_prefix(tokenizer))
    for _, group in groupby(parts, key=itemgetter("block")):
        group = list(group)
        block = {key: np.concatenate([part[key] for part in group]) for key in ("input_ids", "labels", "position_ids")}
        yield {**block, "num_bytes": int(sum(part["sizes"].sum() for part in group))}


def pack_documents(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, readers: int = 1
) -> Dataset | IterableDataset:
    """
    Tokenise documents and pack them into blocks; nothing is dropped, so the last block is shorter.

    What was packed once is read from the cache of `datasets` the next time (a `Dataset`; a stream is packed as it
    comes).

    Args:
        documents: rows with a `text`.
        block_size: tokens of a block.
        readers: see `token_rows`.

    Returns:
        Rows of `input_ids`, `labels`, `position_ids` (each `(block,)`) and `num_bytes`, the UTF-8 bytes that the
        predicted tokens of the block cover.

    Raises:
        InputError: `block_size` is too small for one predicted token, or the documents do not fill one block.
    """
    if block_size <= max(len(segment_prefix(tokenizer)), 1):
        raise InputError(f"block_size: {block_size} leaves no room for a token to predict.")
    make = partial(_blocks, tokenizer=tokenizer, block_size=block_size)
    blocks = token_rows(documents, make, ["documents", tokenizer_key(tokenizer), block_size], FEATURES, readers)
    if isinstance(blocks, IterableDataset):
        return blocks
    blocks = blocks.with_format("numpy")
    if len(blocks) < 2 and (len(blocks) == 0 or len(blocks[0]["input_ids"]) < block_size):
        tokens = len(blocks[0]["input_ids"]) if len(blocks) else 0
        raise InputError(f"block_size: the text has {tokens} tokens, less than one block of {block_size}.")
    return blocks


def evaluation_windows(
    ids: np.ndarray, block_size: int, stride: int | None = None, prefix: list[int] | None = None
) -> Iterator[dict]:
    """
    Windows over one document in which every token is scored exactly once.

    Args:
        ids: `(tokens,)`.
        block_size: tokens of a window, the prefix included.
        stride: tokens that each window after the first scores; what is before them in the window is context.
            Default: all of it, the same windows as `pack_documents` makes of a document of its own.
        prefix: what precedes each window (`segment_prefix`); without one the first token of a window is not scored.

    Yields:
        `input_ids` and `labels`, of shape `(window,)`; labels are -100 where nothing is scored.
    """
    prefix = np.array(prefix or [], dtype=ids.dtype)
    capacity = block_size - len(prefix)
    stride = capacity if stride is None else stride
    if not 0 < stride <= capacity:
        raise InputError(f"stride: must be between 1 and {capacity}, got {stride}.")
    scored = 0
    while scored < len(ids):
        end = min(len(ids), scored + (capacity if scored == 0 else stride))
        start = max(0, scored - (capacity - stride))
        window = np.concatenate((prefix, ids[start:end]))
        labels = window.copy()
        labels[: max(len(prefix) + scored - start, 1)] = IGNORED
        yield {"input_ids": window, "labels": labels}
        scored = end
