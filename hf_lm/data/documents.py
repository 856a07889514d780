"""Documents: one row a text, in one column, split into training and held-out documents."""

import glob
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfFileSystem, hf_hub_download, snapshot_download
from transformers.utils import logging

from ..errors import InputError, one_line
from ..files import sha256_of
from .arguments import DataArguments
from .readers import FORMATS, examine, format_of, name_files, read_files

logger = logging.get_logger(__name__)

# what a split may be called: in a column, a dataset or a folder
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}


def expand(key: str, patterns: list[str]) -> list[str]:
    """
    The files that some paths and globs name, in order. A file of exactly this name is meant before any glob.

    Raises:
        InputError: one names nothing, a folder, or a format that is not known.
    """
    paths = []
    for pattern in patterns:
        if not os.path.lexists(pattern):
            pattern = os.path.expanduser(pattern)
        is_glob = glob.has_magic(pattern) and not os.path.lexists(pattern)
        found = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        if not found:
            raise InputError(f"{key}: no file matches {pattern}.")
        paths += found
    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{key}: {path} is a folder; name its files, for example {path}/*.txt.")
        if not os.path.isfile(path):
            raise InputError(f"{key}: {path} does not exist.")
        if format_of(path) is None:
            raise InputError(f"{key}: {path} must end in one of {', '.join(FORMATS)}, compressed (.gz) or not.")
    return paths


def task_hint(columns: Iterable[str]) -> str:
    """The task that rows with these columns are probably meant for, as the end of a message; "" if none is known."""
    names = set(columns)
    if "messages" in names or {"prompt", "completion"} <= names:
        return " Conversations are learned by task: chat."
    if "conversations" in names or {"instruction", "output"} <= names:
        return " Conversations are learned by task: chat, from a column messages, or prompt and completion."
    languages = sorted(name for name in names if len(name) in (2, 3) and name.isalpha() and name.islower())
    if "translation" in names or len(languages) > 1:
        pair = "-".join(languages[:2]) if len(languages) > 1 else "en-de"
        return f" Parallel texts are learned by task: translation, with language_pairs: [{pair}]."
    if {"text", "label"} <= names:
        return " Texts with labels are learned by task: sequence-classification."
    return " Texts alone are learned by task: causal-lm." if "text" in names else ""


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """The columns of rows; of a stream without types those of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def column_values(rows: Dataset | IterableDataset, name: str) -> Iterator:
    """The values of a column, a batch in memory at a time; in a shuffled table, faster than `rows[name]`."""
    return (value for batch in rows.select_columns(name).iter(1000) for value in batch[name])


def numbered(values: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """The different values, sorted, and for each value its number among them."""
    numbers: dict[str, int] = {}
    found = np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64)
    names = sorted(numbers)
    ranks = np.empty(len(names), np.int64)
    ranks[[numbers[name] for name in names]] = np.arange(len(names))
    return names, ranks[found]


def with_text(rows, name: str | None, where: str, beside: Sequence[str] = ()):
    """
    The rows with their text column, called `text`, and the columns `beside` it; without empty texts.

    Raises:
        InputError: there is no such column, it does not hold text, or every row is empty.
    """
    columns = column_names(rows)
    if not columns:
        raise InputError(f"{where}: holds no rows.")
    strings = [column for column in columns if rows.features is None or _is_string(rows.features[column])]
    hint = task_hint(columns)
    if name is None:
        name = "text" if "text" in columns else strings[0] if len(strings) == 1 and not hint else None
    if name is None:
        raise InputError(f"text_column_name: {where} has no column text; name one of {', '.join(columns)}.{hint}")
    if name not in columns:
        raise InputError(f"text_column_name: {where} has no column {name}; it has {', '.join(columns)}.{hint}")
    if rows.features is not None and not _is_string(rows.features[name], or_null=True):
        values = enumerate((row[name] for row in rows.select_columns(name)), 1)
        found = next((f"; row {number} is {value!r:.60}" for number, value in values if not isinstance(value, str | None)), "")  # fmt: skip
        raise InputError(f"text_column_name: column {name} of {where} does not hold text{found}.")
    rows = rows.select_columns([name, *beside])
    rows = rows if name == "text" else rows.rename_column(name, "text")
    if isinstance(rows, IterableDataset):
        return rows.filter(bool, input_columns="text")
    empty = sum(not text for batch in rows.select_columns("text").iter(1000) for text in batch["text"])
    if empty == len(rows):
        raise InputError(f"{where}: every row of column {name} is empty.")
    if empty:
        logger.warning(f"{where}: {empty} of {len(rows)} rows of column {name} are empty and left out.")
    return rows.filter(bool, input_columns="text") if empty else rows


def _is_string(feature, or_null: bool = False) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", *["null"] * or_null)


def cells_as_text(rows, columns: Sequence[str], where: str):
    """
    The rows with columns that are read as text: whole numbers of a typed column as their digits.

    Raises:
        InputError: a cell is neither text nor empty; names the row.
    """
    for name in columns if rows.features is not None else ():
        feature = rows.features[name]
        if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
            rows = rows.cast_column(name, Value("string"))
        elif not _is_string(feature, or_null=True):
            for number, row in enumerate(rows.select_columns(name), 1):
                if not isinstance(row[name], str | None):
                    raise InputError(
                        f"{where}: row {number}: column {name} is {row[name]!r:.60}, not text; write it as text."
                    )
    return rows


def _load_files(key: str, arguments: DataArguments, keep):
    paths = expand(key, getattr(arguments, key))
    streaming = arguments.streaming and key == "train_file"  # the held-out set is read again and again
    return keep(read_files(key, paths, arguments.encoding, streaming), name_files(paths))


def _own_files(builder) -> dict[str, list[str]]:
    """The files of each split that `read_files` reads as the builder of `datasets` would; `{}` if there are none."""
    kind, config = type(builder).__module__.rpartition(".")[2], builder.config
    described = {"name", "version", "data_dir", "data_files", "description"}
    options = [part.name for part in fields(config) if part.name not in described]
    plain = type(config)()
    if kind not in ("json", "csv", "parquet") or any(
        getattr(config, name) != getattr(plain, name) for name in options
    ):
        return {}
    files = {split: list(paths) for split, paths in config.data_files.items()}
    return files if {format_of(path) for paths in files.values() for path in paths} == {kind} else {}


def _downloaded(path: str) -> str:
    """The file itself, also of an address on the Hub."""
    if not path.startswith("hf://"):
        return path
    place = HfFileSystem().resolve_path(path)
    return hf_hub_download(place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision)


def _builder_of(name: str, configuration: str | None, **options):
    """The builder of a dataset; offline, that of the files which an earlier run has downloaded."""
    try:
        return load_dataset_builder(name, configuration, **options)
    except (OSError, ValueError):  # offline, or without network
        try:
            folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
        except (OSError, ValueError):
            folder = None
        if folder is None:
            raise
        return load_dataset_builder(folder, configuration)


def _folder_cache(folder: str) -> str:
    """Where `datasets` caches a local folder: a place of its own for each content, because it looks only at times."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_of(path)}\0".encode())
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "hf_lm_folders", digest.hexdigest()[:32])


def _load_dataset(arguments: DataArguments, keep) -> dict:
    name, streaming, options = arguments.dataset_name, arguments.streaming, {}
    try:
        if os.path.isdir(name):
            options = {"cache_dir": _folder_cache(name)}
        builder = _builder_of(name, arguments.dataset_config_name, **options)
        # A stream from the Hub is left to `datasets`, which need not download whole files first.
        if (options or not streaming) and (files := _own_files(builder)):
            splits = {
                split: read_files(
                    "dataset_name",
                    list(map(_downloaded, paths)),
                    arguments.encoding,
                    streaming and str(split).lower() in SPLITS["train"],
                )
                for split, paths in files.items()
            }
        else:
            for paths in (builder.config.data_files or {}).values() if options else ():
                for path in paths:  # a null row crashes the reader of datasets
                    if format_of(path) == "json":
                        list(examine(path, arguments.encoding)[0].rows())
            splits = load_dataset(name, arguments.dataset_config_name, streaming=streaming, **options)
    except InputError:
        raise
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        raise InputError(f"dataset_name: {name} cannot be loaded: {one_line(error.__cause__ or error)}") from error
    found = {}
    for split, usual in SPLITS.items():
        names = sorted(
            (part for part in splits if str(part).lower() in usual), key=lambda part: usual.index(str(part).lower())
        )
        if names:
            found[split] = names[0]
    if "train" not in found:
        raise InputError(f"dataset_name: {name} has no split train; it has {', '.join(splits)}.")
    if unused := [str(part) for part in splits if part not in found.values()]:
        logger.warning(f"dataset_name: of {name} the splits {', '.join(unused)} are not used.")
    return {split: keep(splits[part], f"{name} ({part})") for split, part in found.items()}


def text_lengths(documents: Dataset) -> np.ndarray:
    """Characters of each text."""
    batches = documents.select_columns("text").with_format("arrow").iter(1000)
    return np.concatenate([pa.compute.utf8_length(batch["text"]).to_numpy() for batch in batches])


def hold_out(documents: Dataset, percentage: float) -> dict[str, Dataset]:
    """
    Split off the end: the last `percentage` per cent of the rows. Texts differ in length: where these rows are more
    than twice or less than half of the characters asked for, as many of the last texts as make up the share; and where
    no number of whole texts does (there is one, or they are few), the end of each text, exactly
    `text[int(len(text) * (100 - percentage) / 100):]`. Nothing crosses the boundary.

    Raises:
        InputError: one of the two parts would be empty.
    """
    rows, share = len(documents), percentage / 100
    count = math.ceil(rows * share)
    if documents.column_names != ["text"]:
        if count == rows:
            raise InputError(
                f"validation_split_percentage: {percentage} per cent of {rows} rows leaves none to train on."
            )
        return _last(documents, count)
    tail = np.cumsum(text_lengths(documents)[::-1])
    total = int(tail[-1])
    for number in (count, int(np.searchsorted(tail, total * share)) + 1):
        if number < rows and share / 2 <= tail[number - 1] / total <= share * 2:
            return _last(documents, number)
    parts = {"train": [], "validation": []}
    for row in documents:
        boundary = int(len(row["text"]) * (100 - percentage) / 100)
        parts["train"].append(row["text"][:boundary])
        parts["validation"].append(row["text"][boundary:])
    parts = {split: [text for text in texts if text] for split, texts in parts.items()}
    if not all(parts.values()):
        raise InputError(
            f"validation_split_percentage: {percentage} per cent of {total} characters leaves a part empty."
        )
    key = f"{documents._fingerprint}-{percentage}"
    return {
        split: Dataset(pa.table({"text": pa.array(texts, pa.string())}), fingerprint=f"{key}-{split}")
        for split, texts in parts.items()
    }


def describe_split(rows: dict[str, Dataset | IterableDataset]) -> str | None:
    """Say how much is held out: characters of texts, or rows; None if nothing is, or if a stream does not tell."""
    parts = [rows.get(split) for split in ("validation", "train")]
    if not all(isinstance(part, Dataset) for part in parts):
        return None
    is_text = all(part.column_names == ["text"] for part in parts)
    held_out, trained = (int(text_lengths(part).sum()) if is_text else len(part) for part in parts)
    total, unit = held_out + trained, "characters" if is_text else "rows"
    return f"Held out: {held_out:,} of {total:,} {unit} ({held_out / total:.1%})"


def _last(rows: Dataset, count: int) -> dict[str, Dataset]:
    boundary = len(rows) - count
    return {"train": rows.select(range(boundary)), "validation": rows.select(range(boundary, len(rows)))}


def _by_split(rows: Dataset, column: str) -> dict[str, Dataset]:
    """
    The rows of one table by what its column says they are for.

    Raises:
        InputError: there is no such column, it names a split that is not known, or no row is for training.
    """
    if column not in rows.column_names:
        raise InputError(f"split_column_name: there is no column {column}; there are {', '.join(rows.column_names)}.")
    names_of, written = rows.features[column], column_values(rows, column)
    if isinstance(names_of, datasets.ClassLabel):
        written = (None if value is None else names_of.int2str(value) for value in written)
    names, values = numbered("" if value is None else str(value).strip().lower() for value in written)
    known = [name for usual in SPLITS.values() for name in usual]
    counts = np.bincount(values, minlength=len(names))
    held = ", ".join(f"{name or 'nothing'} ({count:,} rows)" for name, count in zip(names, counts, strict=True))
    if unknown := [name for name in names if name and name not in known]:
        raise InputError(
            f"split_column_name: column {column} holds {held:.300}; {unknown[0]} is none of {', '.join(known)}."
        )
    found = {
        split: np.flatnonzero(np.isin(values, [number for number, name in enumerate(names) if name in usual]))
        for split, usual in SPLITS.items()
    }
    if not len(found["train"]):
        raise InputError(f"split_column_name: no row of column {column} says train; it holds {held}.")
    if names[0] == "" and (empty := int(counts[0])):
        logger.warning(f"split_column_name: {empty:,} of {len(rows):,} rows name no split and are left out.")
    return {split: rows.select(numbers) for split, numbers in found.items() if len(numbers)}


def load_rows(
    arguments: DataArguments, keep=None, split_off: Callable = hold_out
) -> dict[str, Dataset | IterableDataset]:
    """
    The rows a recipe names, in order, with all their columns.

    Args:
        keep: `keep(rows, where)` chooses columns and rows of each source, or raises `InputError`.
        split_off: `split_off(rows, percentage)` gives `"train"` and `"validation"` where no held-out data is named.

    Returns:
        `"train"`, a stream with `streaming`; `"validation"` if any is held out, and `"test"` if it is named: tables,
        because they are read again and again.

    Raises:
        InputError: nothing is named, or what is named cannot be read; see the helpers above.
    """
    keep = keep or (lambda rows, where: rows)
    by_split = arguments.split_column_name
    read = (lambda rows, where: rows) if by_split else keep
    if arguments.dataset_name:
        splits = _load_dataset(arguments, read)
    elif arguments.train_file:
        splits = {"train": _load_files("train_file", arguments, read)}
    else:
        raise InputError("train_file: name a file to train on, or a dataset_name.")
    if by_split:
        if arguments.streaming:
            raise InputError("split_column_name: does not go with streaming; name a validation_file.")
        splits = {split: keep(rows, split) for split, rows in _by_split(splits["train"], by_split).items()}
    for split in ("validation", "test"):
        if getattr(arguments, f"{split}_file"):
            splits[split] = _load_files(f"{split}_file", arguments, keep)
    if "validation" not in splits and arguments.validation_split_percentage > 0:
        if arguments.streaming:
            raise InputError("streaming: name a validation_file, or set validation_split_percentage to 0.")
        splits |= split_off(splits["train"], arguments.validation_split_percentage)
    limits = {"train": arguments.max_train_samples}
    splits = {
        split: rows if (limit := limits.get(split, arguments.max_eval_samples)) is None else rows.take(limit)
        for split, rows in splits.items()
    }
    for split, rows in splits.items():
        if split != "train" and isinstance(rows, IterableDataset):  # from the Hub
            found = list(rows)
            if not found:
                raise InputError(f"dataset_name: {arguments.dataset_name} ({split}): holds no rows.")
            splits[split] = Dataset.from_list(found, features=rows.features)
    return splits


def load_documents(arguments: DataArguments) -> dict[str, Dataset | IterableDataset]:
    """
    The documents a recipe names, in order: `load_rows` with the one column `text`, none of them empty.

    Raises:
        InputError: see `load_rows`; or there is no text in them.
    """
    return load_rows(arguments, lambda rows, where: with_text(rows, arguments.text_column_name, where))


def data_sha256(arguments: DataArguments) -> str | None:
    """SHA-256 over the bytes of all named files in order; None for a dataset of the Hub."""
    keys = [f"{split}_file" for split in SPLITS if getattr(arguments, f"{split}_file")]
    paths = [path for key in keys for path in expand(key, getattr(arguments, key))]
    return sha256_of(*paths) if paths else None
