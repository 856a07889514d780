"""Documents: one row a text, in one column, split into what is trained on and what is held out."""

import codecs
import glob
import gzip
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.extract import Extractor
from pyarrow import ArrowInvalid
from pyarrow.parquet import ParquetFile
from transformers.utils import logging

from ..errors import InputError, explained, one_line
from .arguments import DataArguments

logger = logging.get_logger(__name__)

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
DEPTH = 100  # levels of lists and objects inside each other
SPLITS = ("train", "validation", "test")
FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def expand(key: str, patterns: list[str]) -> list[str]:
    """
    The files that some paths and globs name, in order.

    Raises:
        InputError: one names nothing, a folder, an empty file, or a format that is not known.
    """
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise InputError(f"{key}: no file matches {pattern}.")
        paths += found
    for path in paths:
        if os.path.isdir(path):
            raise InputError(f"{key}: {path} is a folder; name its files, for example {path}/*.txt.")
        if not os.path.isfile(path):
            raise InputError(f"{key}: {path} does not exist.")
        if os.path.getsize(path) == 0:
            raise InputError(f"{key}: {path} is empty.")
        if Path(path).suffix.lower() not in FORMATS:
            raise InputError(f"{key}: {path} must end in one of {', '.join(FORMATS)}.")
        with explained(f"{key}: {path} is packed, and cut short"):
            archive = Extractor.infer_extractor_format(path)
        if archive:
            raise InputError(f"{key}: {path} is packed ({archive}); unpack it first.")
    return paths


def read_text(path: str) -> str:
    """
    A text file as it is (no newline is translated).

    Raises:
        InputError: it is not UTF-8; says where.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}, in line {line}."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise InputError(f"{path}: holds nothing but white space.")
    return text


def check_json(path: str) -> None:
    """
    Look for what crashes the library's reader instead of raising an error: rows that are null, and very deep ones; and
    for what is not UTF-8, which a stream would find out in the middle of a run.

    Raises:
        InputError: there is one; says where.
    """
    depth = 0
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        is_list = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        text = file.seek(0) or file.read() if is_list else b""
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                place = f"at offset {file.tell() - len(line) + error.start}, in line {number}"
                raise InputError(f"{path}: not UTF-8: byte {line[error.start]:#04x} {place}.") from error
            if depth == 0 and line.strip() == b"null":
                raise InputError(f"{path}: row {number} is null; each row must be an object {{...}}.")
            brackets = sum(map(line.count, (b"{", b"}", b"[", b"]")))
            if brackets == 2 and line[:1] == b"{" and line.rstrip()[-1:] == b"}":
                continue  # one flat object
            for bracket in re.findall(rb"[][{}]", STRING.sub(b"", line)):
                depth += 1 if bracket in b"[{" else -1
                if depth > DEPTH:
                    raise InputError(f"{path}: line {number}: more than {DEPTH} lists and objects inside each other.")
    if is_list:
        with explained(f"{path}: not a valid JSON file"):
            rows = json.loads(text)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict | str):
                raise InputError(f"{path}: row {number} is {row!r:.40}; each row must be an object {{...}}.")


def broken_row(path: str) -> str | None:
    """Which line of a file of JSON rows cannot be read, and why; None if each can."""

    def table(pairs: list[tuple]) -> dict:
        if len(pairs) > len(dict(pairs)):
            raise ValueError(f"a key is there twice: {', '.join(key for key, _ in pairs)}")
        return dict(pairs)

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 63:
            raise ValueError(f"the number {digits[:20]} does not fit 64 bits")
        return int(digits)

    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig").strip() or "{}", object_pairs_hook=table, parse_int=integer)
                json.dumps(row, ensure_ascii=False).encode()
            except ValueError as error:
                return f"row {number}: {one_line(error)}"
            if not isinstance(row, dict):
                return f"row {number} is {row!r:.40}, not an object {{...}}"
    return None


def broken_text(path: str) -> str | None:
    """Which row of a parquet file is not UTF-8, which the library's reader does not look at; None if each is."""
    before = 0
    for batch in ParquetFile(path).iter_batches():
        for column in batch.columns:
            try:
                column.validate(full=True)
            except ArrowInvalid as error:
                found = re.search(r"string index (\d+)", str(error))
                return f"row {before + int(found[1]) + 1 if found else f'{before + 1} or later'}: {error}"
        before += batch.num_rows
    return None


def _texts(paths: list[str], stamps: list) -> Iterator[dict]:
    for path in paths:
        yield {"text": read_text(path)}


def with_text(rows, name: str | None, where: str, beside: Sequence[str] = ()):
    """
    The rows with their text column, called `text`, and the columns `beside` it; without empty texts.

    Raises:
        InputError: there is no such column, it does not hold text, or every row is empty.
    """
    columns = rows.column_names or list(next(iter(rows), {}))
    if not columns:
        raise InputError(f"{where}: holds no rows.")
    strings = [column for column in columns if rows.features is None or _is_string(rows.features[column])]
    name = name or ("text" if "text" in columns else strings[0] if len(strings) == 1 else None)
    if name is None:
        raise InputError(f"text_column_name: {where} has no column text; name one of {', '.join(columns)}.")
    if name not in columns:
        raise InputError(f"text_column_name: {where} has no column {name}; it has {', '.join(columns)}.")
    if rows.features is not None and not _is_string(rows.features[name]):
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


def _is_string(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _load_files(key: str, arguments: DataArguments, keep):
    paths = expand(key, getattr(arguments, key))
    formats = {FORMATS[Path(path).suffix.lower()] for path in paths}
    if len(formats) > 1:
        raise InputError(f"{key}: files of one kind at a time, got {', '.join(sorted(formats))}.")
    if formats == {"text"}:
        for path in paths:
            read_text(path)  # now, where an error is one line, not inside the library's writer
        stamps = [(os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
        reader = IterableDataset if arguments.streaming else Dataset
        return reader.from_generator(_texts, gen_kwargs={"paths": paths, "stamps": stamps})
    kind = formats.pop()
    for path in paths if kind == "json" else ():
        check_json(path)
    options = {}
    if kind == "csv":  # NA, null and 123 are text too
        options = {"keep_default_na": False, "converters": {arguments.text_column_name or "text": str}}
    where = ", ".join(paths)
    try:
        for path in paths if kind == "parquet" and arguments.streaming else ():
            if row := broken_text(path):
                raise InputError(f"{key}: {path} cannot be read: {row}")
        with _library_is_silent():
            splits = load_dataset(kind, data_files=paths, streaming=arguments.streaming, **options)
            if "train" not in splits:
                raise InputError(f"{key}: {where} holds no rows.")
            columns = splits["train"].column_names or next(iter(splits["train"]), {})
            if kind == "csv" and "__index_level_0__" in columns:  # cells taken for names
                raise InputError(f"{key}: {where} has rows of more cells than its first line has names.")
            return keep(splits["train"], where)
    except InputError:
        raise
    except Exception as error:  # whatever the readers of three libraries raise
        for path in paths if kind != "parquet" else ():
            read_text(path)  # not UTF-8: says which file, and where
            if kind == "json" and (row := broken_row(path)):
                raise InputError(f"{key}: {path} cannot be read: {row}") from error
        reason = one_line(error.__cause__ or error)
        if "corresponds to no data" in str(error):
            reason = "it holds no rows"
        elif isinstance(error.__cause__ or error, OverflowError):
            lines = enumerate((line for path in paths for line in read_text(path).split("\n")), 1)
            found = next((number for number, line in lines if re.search(r"\d{19}", line)), 1)
            reason = f"line {found}: a number does not fit 64 bits"
        elif kind == "parquet":
            with suppress(Exception):  # of a file that is damaged as a whole
                reason = next(filter(None, map(broken_text, paths)), None) or reason
            reason = reason if reason.startswith("row ") else f"cut short, damaged or not of this format ({reason})"
        raise InputError(f"{key}: {where} cannot be read: {reason}") from error


@contextmanager
def _library_is_silent() -> Iterator[None]:
    """The library logs what it then raises: one line about a mistake is enough."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _load_dataset(arguments: DataArguments, keep) -> dict:
    name = arguments.dataset_name
    for path in sorted(Path(name).rglob("*.json*")) if os.path.isdir(name) else ():
        if re.search(r"\.jsonl?(\.gz)?$", path.name):
            check_json(str(path))
    try:
        splits = load_dataset(name, arguments.dataset_config_name, streaming=arguments.streaming)
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        raise InputError(f"dataset_name: {name} cannot be loaded: {one_line(error.__cause__ or error)}") from error
    if "train" not in splits:
        raise InputError(f"dataset_name: {name} has no split train; it has {', '.join(splits)}.")
    return {split: keep(splits[split], f"{name} ({split})") for split in SPLITS if split in splits}


def hold_out(documents: Dataset, percentage: float) -> dict[str, Dataset]:
    """
    Split off the end: of several rows the last ones; of a single document the last `percentage` per cent of its
    characters, exactly `text[int(len(text) * (100 - percentage) / 100):]`. Nothing crosses the boundary.

    Raises:
        InputError: one of the two parts would be empty.
    """
    if len(documents) > 1 or documents.column_names != ["text"]:
        count = math.ceil(len(documents) * percentage / 100)
        boundary = len(documents) - count
        if boundary == 0:
            raise InputError(
                f"validation_split_percentage: {percentage} per cent of {len(documents)} documents leaves none to train on."
            )
        return {
            "train": documents.select(range(boundary)),
            "validation": documents.select(range(boundary, len(documents))),
        }
    text = documents[0]["text"]
    boundary = int(len(text) * (100 - percentage) / 100)
    if not 0 < boundary < len(text):
        raise InputError(
            f"validation_split_percentage: {percentage} per cent of {len(text)} characters leaves a part empty."
        )
    return {
        "train": Dataset.from_dict({"text": [text[:boundary]]}),
        "validation": Dataset.from_dict({"text": [text[boundary:]]}),
    }


def _by_split(rows: Dataset, column: str) -> dict[str, Dataset]:
    """
    The rows of one table by what its column says they are for.

    Raises:
        InputError: there is no such column, or no row is for training.
    """
    if column not in rows.column_names:
        raise InputError(f"split_column_name: there is no column {column}; there are {', '.join(rows.column_names)}.")
    values = np.array(rows[column])
    found = {split: rows.select(np.flatnonzero(values == split)) for split in SPLITS if (values == split).any()}
    if "train" not in found:
        names = ", ".join(map(str, sorted(set(values.tolist()))[:5]))
        raise InputError(f"split_column_name: no row of column {column} says train; they say {names}.")
    return found


def load_rows(arguments: DataArguments, keep=None) -> dict[str, Dataset | IterableDataset]:
    """
    The rows a recipe names, in order, with all their columns.

    Args:
        keep: `keep(rows, where)` chooses columns and rows of each source, or raises `InputError`.

    Returns:
        `"train"`, `"validation"` if any is held out, and `"test"` if it is named.

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
    for split in SPLITS[1:]:
        if getattr(arguments, f"{split}_file"):
            splits[split] = _load_files(f"{split}_file", arguments, keep)
    if "validation" not in splits and arguments.validation_split_percentage > 0:
        if arguments.streaming:
            raise InputError("streaming: name a validation_file, or set validation_split_percentage to 0.")
        splits |= hold_out(splits["train"], arguments.validation_split_percentage)
    limits = {"train": arguments.max_train_samples}
    return {
        split: rows if (limit := limits.get(split, arguments.max_eval_samples)) is None else rows.take(limit)
        for split, rows in splits.items()
    }


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
    if not keys:
        return None
    digest = hashlib.sha256()
    for key in keys:
        for path in expand(key, getattr(arguments, key)):
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
