"""From rows of data to rows of tokens: made once and cached by `datasets`, or made of a stream while it is read."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .cache import cached

VERSION = 3  # raise it when a function makes other rows of tokens: it is part of the cache's key
READ, WRITTEN = 16, 1000  # rows read, rows of tokens written at once
SHARE = 100  # rows for each reader of a stream make the readers' shares about equal


def rows_of(rows: Dataset | IterableDataset) -> Iterator[dict]:
    """All rows in order, a few in memory at a time, also of a shuffled table, whose `__iter__` looks up each row."""
    # `iter`, unlike `__iter__`, does not divide a stream among loader workers: the shares of `token_rows` already do
    for batch in rows.iter(READ):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> list:
    """All that a tokenizer's output depends on, wherever it was loaded from and whatever was called before."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [json.dumps(kept), special, tokenizer.chat_template, tokenizer.split_special_tokens]


def _tables(rows: Dataset, make: Callable, features: Features) -> Iterator[pa.Table]:
    """The rows that `make` makes, many at a time."""
    made = make(rows_of(rows))
    while batch := list(islice(made, WRITTEN)):
        columns = {}
        for name, feature in features.items():
            values = [row[name] for row in batch]
            if isinstance(feature, List):
                ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
                flat = pa.array(np.concatenate(values), feature.feature.pa_type)
                columns[name] = pa.ListArray.from_arrays(ends, flat)
            else:
                columns[name] = pa.array(values, feature.pa_type)
        yield pa.table(columns)


def _rows_of_shares(rows: IterableDataset, make: Callable, shares: list[int], readers: int) -> Iterator[dict]:
    """What `make` makes of every `readers`-th row from `share` on, for each share."""
    for share in shares:
        yield from make(islice(rows_of(rows), share, None, readers))


def token_rows(
    rows: Dataset | IterableDataset,
    make: Callable[[Iterable[dict]], Iterator[dict]],
    key: list,
    features: Features,
    readers: int = 1,
    notes: list[str] | None = None,
) -> Dataset | IterableDataset:
    """
    Make rows of tokens from rows of data, in memory that does not grow with their number.

    What was made once of a table is read from the cache of `datasets` the next time. Of a stream they are made as it
    is read.

    Args:
        make: yields rows of tokens from an iterator over rows of data, in order; arrays where `features` has lists.
        key: all that `make` depends on, apart from the rows.
        readers: processes times loader workers that a stream is shared among. Each makes the rows of a share of the
            data (one shard of the result); if there are less than a hundred for each, there is one shard for all.
        notes: lines that `make` adds to while it runs. They are cached too: read `info.description` of the result.
    """
    if isinstance(rows, IterableDataset):
        enough = readers * SHARE
        readers = readers if readers > 1 and sum(1 for _ in islice(rows, enough)) == enough else 1
        arguments = {"rows": rows, "make": make, "shares": list(range(readers)), "readers": readers}
        return IterableDataset.from_generator(_rows_of_shares, features=features, gen_kwargs=arguments)
    digest = Hasher.hash([VERSION, rows._fingerprint, key])
    return cached("hf_lm_blocks", digest, partial(_tables, rows, make, features), features, notes)
