"""Rows of files, every value as it is written: nothing is guessed to be a number, a date or missing."""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Json, Value
from datasets.utils.extract import Extractor
from pyarrow.parquet import ParquetFile
from transformers.utils import logging

from ..errors import InputError, explained, one_line
from .cache import cached

logger = logging.get_logger(__name__)

VERSION = 1  # raise it when rows change: it is part of the cache's key
FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OPENERS = {
    None: open,
    "gzip": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    "zstd": lambda path, mode: pa.input_stream(path, compression="zstd"),
}
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
BLOCK = 1 << 22  # bytes read at once
ROWS, CHARACTERS = 1000, 1 << 24  # of a table that is written at once
SHOWN = 5  # files named in one message


def format_of(path: str) -> str | None:
    """The format that a file's name says, compressed or not; None if it is none of `FORMATS`."""
    name = re.sub(r"\.(gz|bz2|xz|zst)$", "", Path(path).name.lower())
    return FORMATS.get(Path(name).suffix)


def name_files(paths: list[str]) -> str:
    """The first few of some paths, for a message."""
    more = len(paths) - SHOWN
    return ", ".join(paths[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Source:
    """A file that was read through once: how it is compressed and encoded, and the SHA-256 of its content."""

    path: str
    kind: str
    compression: str | None
    encoding: str
    sha256: str = ""
    is_blank: bool = False

    def open(self):
        """The content as bytes, decompressed."""
        return OPENERS[self.compression](self.path, "rb")

    def open_text(self, newline: str):
        """The content as text; no newline is translated."""
        return io.TextIOWrapper(self.open(), encoding=self.encoding, newline=newline)

    def rows(self) -> Iterator[dict]:
        """
        The rows of a text, JSON or CSV file.

        Raises:
            InputError: one cannot be read; says which.
        """
        return {"text": _text_rows, "json": _json_rows, "csv": _csv_rows}[self.kind](self)


def looks_like(data: bytes) -> str | None:
    """The encoding that bytes that are not UTF-8 are probably in, of the common ones; None for UTF-8."""
    halves = data[: len(data) // 2 * 2]
    if len(halves) >= 16:
        for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
            if halves[start::2].count(0) * 2 > len(halves) // 2 > halves[1 - start :: 2].count(0) * 4:
                return name
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
        return None
    except UnicodeDecodeError:
        pass
    # GB 2312 has its common characters, ordered by sound, in B0A1-D7F9, and its punctuation in A1-A3.
    pairs = re.findall(rb"[\x81-\xfe][\x40-\xfe]", data)
    common = sum(0xB0 <= pair[0] <= 0xD7 or 0xA1 <= pair[0] <= 0xA3 for pair in pairs if pair[1] >= 0xA1)
    single = len(re.sub(rb"[\x81-\xfe][\x40-\xfe]", b"", data).translate(None, bytes(range(128))))
    return "gb18030" if common > 0.8 * len(pairs) and single <= len(pairs) // 50 else "latin-1"


def _misread(path: str, encoding: str, error: UnicodeDecodeError, offset: int, line: int) -> str:
    name = "UTF-8" if encoding == "utf-8-sig" else encoding
    return f"{path}: not {name}: byte {error.object[error.start]:#04x} at offset {offset}, in line {line}"


def examine(path: str, encoding: str | None) -> tuple[Source, str | None]:
    """
    Read a file through: hash it, and find out whether it is text.

    Returns:
        The source, and what is wrong with its encoding (byte, offset, line), if anything is.

    Raises:
        InputError: it cannot be read or decompressed.
    """
    with explained(f"{path} is packed, and cut short"):
        compression = Extractor.infer_extractor_format(path)
    if compression not in OPENERS:
        raise InputError(f"{path} is packed ({compression}); unpack it first.")
    kind = format_of(path)
    digest, decoder, used, before, line, is_blank, problem = hashlib.sha256(), None, "", 0, 1, True, None
    with (
        explained(f"{path} is packed, and cut short" if compression else f"{path} cannot be read"),
        OPENERS[compression](path, "rb") as file,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            if kind == "parquet" or problem:
                is_blank = False
                continue
            if decoder is None:
                mark = next((name for mark, name in MARKS.items() if block.startswith(mark)), "utf-8-sig")
                used = {"utf-8": "utf-8-sig"}.get(encoding, encoding or mark)
                decoder = codecs.getincrementaldecoder(used)()
                if encoding is None and mark == "utf-8-sig" and (guess := looks_like(block[:4096])) and "16" in guess:
                    problem = f"{path}: not UTF-8: half of its bytes are 0, as in {guess}"
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
                is_blank = is_blank and not text.strip()
            except UnicodeDecodeError as error:
                place = error.start - pending
                row = line + block.count(b"\n", 0, max(place, 0))
                problem = _misread(path, used, error, before + place, row)
                if encoding is None:
                    problem += f" (it looks like {looks_like(block)})"
            before += len(block)
            line += block.count(b"\n")
    if decoder and not problem:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            problem = _misread(path, used, error, before - len(error.object) + error.start, line)
    return Source(path, kind, compression, used, digest.hexdigest(), is_blank), problem


def examine_all(key: str, paths: list[str], encoding: str | None) -> list[Source]:
    """
    The files that hold something; empty ones are named in a warning and left out.

    Raises:
        InputError: names all files that are in another encoding; or all are empty.
    """
    found, problems = [], []
    for path in paths:
        source, problem = examine(path, encoding)
        found.append(source)
        problems += [problem] if problem else []
    if problems:
        guesses = set(re.findall(r"(?:looks like|as in) ([\w-]+)", " ".join(problems)))
        guess = guesses.pop() if len(guesses) == 1 else None
        cure = f"set encoding: {guess}, or convert" if guess and len(problems) == len(paths) else "convert"
        more = f"; and {len(problems) - SHOWN} more files" if len(problems) > SHOWN else ""
        raise InputError(
            f"{key}: {'; '.join(problems[:SHOWN])}{more}. To read this, {cure} to UTF-8: "
            f"iconv -f {guess or 'ENCODING'} -t utf-8 OLD > NEW."
        )
    full = [source for source in found if not source.is_blank]
    if not full:
        reason = "is empty" if not any(map(os.path.getsize, paths)) else "holds nothing but white space"
        raise InputError(f"{key}: {name_files(paths)} {reason}.")
    if len(full) < len(found):
        blank = [source.path for source in found if source.is_blank]
        logger.warning(f"{key}: {len(blank)} of {len(found)} files are empty and left out: {name_files(blank)}.")
    return full


def _text_rows(source: Source) -> Iterator[dict]:
    with source.open_text(newline="") as file:
        yield {"text": file.read()}


def _csv_rows(source: Source) -> Iterator[dict]:
    csv.field_size_limit(sys.maxsize)
    with source.open_text(newline="") as file:
        reader = csv.reader(file, strict=True)
        names, start = None, 1
        try:
            for cells in reader:
                if cells and names is None:
                    names = cells
                    if twice := next((name for name in names if name and names.count(name) > 1), None):
                        raise InputError(f"{source.path}: its first line names two columns {twice}.")
                elif cells:
                    if len(cells) > len(names):
                        raise InputError(
                            f"{source.path}: line {start} has more cells ({len(cells)}) than the first line has names "
                            f"({len(names)})."
                        )
                    yield {name: cell for name, cell in zip(names, cells, strict=False) if name}
                start = reader.line_num + 1
        except csv.Error as error:
            reason = "a quote is opened and never closed" if "end of data" in str(error) else one_line(error)
            raise InputError(f"{source.path} cannot be read: row in line {start}: {reason}.") from error


def _unique(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a key is there twice: {next(name for name in names if names.count(name) > 1)}")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=lambda name: None)  # NaN is no value of JSON


def _parse(text: str, where: str):
    try:
        value = DECODER.decode(text)
        if re.search(r"\\u[dD]", text):
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return value
    except RecursionError as error:
        raise InputError(f"{where}: lists and objects are nested too deep.") from error
    except ValueError as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def _json_rows(source: Source) -> Iterator[dict]:
    where, is_first = f"{source.path} cannot be read", True
    with source.open_text(newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            values = None
            if is_first and line.lstrip()[0] == "[":  # one list over the whole file
                values = _parse(line + file.read(), where)
            elif is_first and line.strip() == "{":  # objects over several lines each
                text = line + file.read()
                values = _parse("[" + re.sub(r"(?m)^\}\s*^\{", "},{", text) + "]", where)
            else:
                yield _object(_parse(line, f"{where}: row {number}"), source.path, number)
            for row, value in enumerate(values or (), 1):
                yield {"text": value} if isinstance(value, str) else _object(value, source.path, row)
            is_first = False


def _object(value, path: str, row: int) -> dict:
    if not isinstance(value, dict):
        shown = "null" if value is None else f"{value!r:.40}"
        raise InputError(f"{path}: row {row} is {shown}; each row must be an object {{...}}.")
    return value


def column_types(sources: list[Source]) -> Features:
    """The columns of all rows, in order, and their types: those all values have, else `Json`, which holds any."""
    if sources[0].kind == "text":
        return Features({"text": Value("string")})
    types: dict[str, set] = {}
    for source in sources:
        for row in source.rows():
            for name, value in row.items():
                small = type(value) is not int or -(1 << 63) <= value < 1 << 63
                types.setdefault(name, set()).add(type(value) if small else object)
    names = {str: "string", bool: "bool", int: "int64", float: "float64"}
    features = {}
    for name, found in types.items():
        found = found - {type(None)}
        if not found:
            features[name] = Value("null")
        else:
            features[name] = Value(names[min(found, key=str)]) if len(found) == 1 and found <= set(names) else Json()
    return Features(features)


def _stored(row: dict, features: Features) -> dict:
    """The row with all columns; values of `Json` columns as JSON."""
    return {
        name: json.dumps(row[name], ensure_ascii=False)
        if isinstance(feature, Json) and row.get(name) is not None
        else row.get(name)
        for name, feature in features.items()
    }


def _tables(sources: list[Source]) -> Iterator[pa.Table]:
    features = column_types(sources)
    schema, rows, size = features.arrow_schema, [], 0

    def table() -> pa.Table:
        columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
        return pa.table(columns, schema=schema)

    for source in sources:
        for row in source.rows():
            rows.append(_stored(row, features))
            size += sum(len(value) for value in row.values() if isinstance(value, str))
            if len(rows) == ROWS or size > CHARACTERS:
                yield table()
                rows, size = [], 0
    if rows and features:
        yield table()


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type with Arrow's other forms of text (large, view, dictionary), at any depth, as plain strings."""
    kinds = pa.types
    if kinds.is_large_string(type_) or kinds.is_string_view(type_):
        return pa.string()
    if kinds.is_dictionary(type_):
        return _plain(type_.value_type)
    if (
        kinds.is_list(type_)
        or kinds.is_large_list(type_)
        or kinds.is_list_view(type_)
        or kinds.is_large_list_view(type_)
    ):
        return pa.list_(type_.value_field.with_type(_plain(type_.value_type)))
    if kinds.is_struct(type_):
        return pa.struct([part.with_type(_plain(part.type)) for part in type_])
    return type_


def _parquet_tables(paths: list[str]) -> Iterator[pa.Table]:
    """
    The tables of parquet files, text as plain strings.

    Raises:
        InputError: one is damaged, holds other columns than the first, or holds text that is not UTF-8; says where.
    """
    schema, damaged = None, "cannot be read: cut short, damaged or not of this format"
    for path in paths:
        with explained(f"{path} {damaged}"):
            found = ParquetFile(path).schema_arrow
            own = pa.schema([part.with_type(_plain(part.type)) for part in found], found.metadata)
        schema = schema or own
        if set(own.names) != set(schema.names):
            raise InputError(f"{path}: its columns are {', '.join(own.names)}; those of {paths[0]} are {', '.join(schema.names)}.")  # fmt: skip
        with explained(f"{path}: its columns are not of the types of those of {paths[0]}"):
            schema = pa.unify_schemas([schema, own], promote_options="permissive")  # a column may be empty in one file
    for path in paths:
        before, reading = 0, f"{path} {damaged}"
        with explained(reading):
            file = ParquetFile(path)
        batches = file.iter_batches(batch_size=ROWS)
        while True:
            with explained(reading):
                batch = next(batches, None)
            if batch is None:
                break
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column.validate(full=True)
                except pa.ArrowInvalid as error:
                    found = re.search(r"string index (\d+)", str(error))
                    row = f"row {before + int(found[1]) + 1}" if found else f"row {before + 1} or later"
                    raise InputError(f"{path} cannot be read: {row}: column {name}: {one_line(error)}") from error
            before += batch.num_rows
            with explained(f"{path}: its columns are not of the types of those of {paths[0]}"):
                table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            yield table


def _checked_tables(sources: list[Source]) -> Iterator[pa.Table]:
    paths, rows = [source.path for source in sources], 0
    for table in _parquet_tables(paths) if sources[0].kind == "parquet" else _tables(sources):
        rows += table.num_rows
        yield table
    if not rows:
        raise InputError(f"{name_files(paths)}: holds no rows.")
    for source in sources:  # a cache never holds another content than the one it is named by
        if examine(source.path, source.encoding or None)[0].sha256 != source.sha256:
            raise InputError(f"{source.path} was changed while it was read; start again.")


def _stream(sources: list[Source], features: Features) -> Iterator[dict]:
    if sources[0].kind == "parquet":
        for table in _parquet_tables([source.path for source in sources]):
            yield from table.to_pylist()
        return
    for source in sources:
        yield from (_stored(row, features) for row in source.rows())


def read_files(key: str, paths: list[str], encoding: str | None, streaming: bool) -> Dataset | IterableDataset:
    """
    The rows of files of one format, in order: one row a text file. What was read once is read from the cache of
    `datasets` the next time, by the files' content.

    Raises:
        InputError: the formats differ; or a file cannot be read; says which row.
    """
    formats = {format_of(path) for path in paths}
    if len(formats) > 1:
        raise InputError(f"{key}: files of one kind at a time, got {', '.join(sorted(formats))}.")
    sources = examine_all(key, paths, encoding)
    kind = sources[0].kind
    if streaming:  # a mistake is found now, not in the middle of a run
        if kind == "parquet":
            schemas = {table.schema for table in _parquet_tables(paths)}
            features = Features.from_arrow_schema(schemas.pop()) if schemas else None
        else:
            features = column_types(sources)
        if not features:
            raise InputError(f"{key}: {name_files(paths)}: holds no rows.")
        return IterableDataset.from_generator(
            _stream, features=features, gen_kwargs={"sources": sources, "features": features}
        )
    content = [VERSION, kind, [[source.encoding, source.sha256] for source in sources]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    with explained(f"{key}: {name_files(paths)} cannot be read"):
        return cached("hf_lm_rows", digest, partial(_checked_tables, sources))
