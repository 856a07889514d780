"""Data with all that text files hold in practice: it is read as it is, or refused with the file and the row."""

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile

import pyarrow.parquet
import pytest
from datasets import Dataset

from hf_lm.data.arguments import DataArguments
from hf_lm.data.documents import load_documents
from hf_lm.errors import InputError


def rows(*values) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def parquet(column: list, change=lambda content: content) -> bytes:
    stream = io.BytesIO()
    Dataset.from_dict({"text": column}).to_parquet(stream)
    return change(stream.getvalue())


def parquet_of_bytes(*values: bytes) -> bytes:
    """A column of text that says nothing about its bytes being text."""
    column = pyarrow.array(values, pyarrow.binary())
    return parquet_of(pyarrow.Array.from_buffers(pyarrow.string(), len(values), column.buffers()))


def parquet_of(column: pyarrow.Array) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), stream)
    return stream.getvalue()


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jsonl", content)
    return stream.getvalue()


# what it is: (file, content, the texts that are read)
READ = {
    "NUL in text": ("a.txt", b"a\0b", ["a\0b"]),
    "NUL as an escape": ("a.jsonl", rb'{"text": "a\u0000b"}', ["a\0b"]),
    "control characters": ("a.txt", bytes(range(1, 32)), [bytes(range(1, 32)).decode()]),
    "surrogate pair as escapes": ("a.jsonl", rb'{"text": "\ud83d\ude00"}', ["😀"]),
    "BOM in text": ("a.txt", b"\xef\xbb\xbfabc", ["abc"]),
    "BOM in JSON": ("a.jsonl", b'\xef\xbb\xbf{"text": "abc"}\n', ["abc"]),
    "BOM in CSV": ("a.csv", b"\xef\xbb\xbftext\nabc\n", ["abc"]),
    "CRLF in text": ("a.txt", b"a\r\nb\r\n", ["a\r\nb\r\n"]),
    "CRLF in JSON": ("a.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
    "CRLF in CSV": ("a.csv", b'text,n\r\na,1\r\n"b\r\nc",2\r\n', ["a", "b\r\nc"]),
    "empty rows in JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": ""}\n{"text": null}\n{}\n{"text": "b"}\n', ["a", "b"]),
    "empty rows in CSV": ("a.csv", b'text\na\n\n""\nb\n', ["a", "b"]),
    "numbers as text in CSV": ("a.csv", b"text\n123\n1.50\n" + b"9" * 400 + b"\n", ["123", "1.50", "9" * 400]),
    "huge integers beside the text": ("a.jsonl", rows({"text": "a", "n": 1}, {"text": "b", "n": 10**30}), ["a", "b"]),
    "nested columns beside the text": ("a.jsonl", rows({"text": "a", "n": {"k": [1]}}, {"text": "b", "n": None}), ["a", "b"]),
    "list of objects": ("a.json", b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
    "dates as text in JSON": ("a.jsonl", rows({"text": "2024-11-28T10:00:00"}, {"text": "2024-11-29"}), ["2024-11-28T10:00:00", "2024-11-29"]),
    "text after 3000 rows without": ("a.jsonl", rows(*[{"n": 1, "text": None}] * 1500, *[{"n": 1}] * 1500, {"text": "a", "late": "b"}), ["a"]),
    "objects over many lines": ("a.json", b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n', ["a", "b"]),
    "NUL in CSV": ("a.csv", b"text\na\0b\n", ["a\0b"]),
    "huge integer in CSV": ("a.csv", b"text,n\nb,1\na," + b"9" * 30 + b"\n", ["b", "a"]),
    "numbers that are not in JSON": ("a.jsonl", b'{"text": NaN}\n{"text": "a", "n": -Infinity}', ["a"]),
    "UTF-16 with its mark": ("a.txt", "äbc".encode("utf-16"), ["äbc"]),
    "UTF-16 with its mark in CSV": ("a.csv", "text\näbc\n鲸\n".encode("utf-16"), ["äbc", "鲸"]),
    "gzip": ("a.jsonl.gz", gzip.compress(rows({"text": "a"})), ["a"]),
    "gzip without its name": ("a.jsonl", gzip.compress(rows({"text": "a"})), ["a"]),
    "bzip2": ("a.csv.bz2", bz2.compress(b"text\na\n"), ["a"]),
    "xz": ("a.txt.xz", lzma.compress(b"a\r\n"), ["a\r\n"]),
    "Zstandard": ("a.json.zst", pyarrow.compress(rows([{"text": "a"}]), "zstd", asbytes=True), ["a"]),
    **{
        f"parquet of {name}": ("a.parquet", parquet_of(pyarrow.array(["a", None, "b"]).cast(kind)), ["a", "b"])
        for name, kind in {
            "string_view": pyarrow.string_view(), "large_string": pyarrow.large_string(),
            "a dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        }.items()
    },
    "columns of a chat log": ("a.jsonl", rows({"type": "user", "message": {"role": "user"}, "text": "a"}), ["a"]),
}  # fmt: skip
# what it is: (file, content, what is said)
REFUSED = {
    "NUL byte in JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "a\0b"}', r"a\.jsonl .*row 2: Invalid control character"),
    "lone surrogate": ("a.jsonl", rows({"text": "a"}, {"text": "\ud800"}), r"a\.jsonl .*row 2: .*surrogates not allowed"),
    "UTF-16 without its mark": ("a.txt", "a whale and the sea".encode("utf-16-le"), r"a\.txt: not UTF-8: .*set encoding: utf-16-le"),
    "GBK": ("a.txt", "老人与海，白鲸。".encode("gbk"), r"a\.txt: not UTF-8: byte 0xc0 at offset 0, in line 1 .*set encoding: gb18030"),
    "mixed encodings in text": ("a.txt", b"a\ncaf\xc3\xa9\ncaf\xe9\n", r"a\.txt: not UTF-8: byte 0xe9 .*in line 3"),
    "mixed encodings in JSON": ("a.jsonl", b'{"text": "\xc3\xa9"}\n{"text": "\xe9"}', r"a\.jsonl: not UTF-8: .*in line 2"),
    "mixed encodings in CSV": ("a.csv", b"text\ncaf\xc3\xa9\ncaf\xe9\n", r"a\.csv: not UTF-8: .*in line 3"),
    "null row": ("a.jsonl", b'{"text": "a"}\nnull\n', r"a\.jsonl: row 2 is null; each row must be an object"),
    "null row first, which crashes the reader": ("a.jsonl", b'null\n{"text": "a"}\n', r"a\.jsonl: row 1 is null"),
    "null in a list": ("a.json", b'[null, {"text": "a"}]', r"a\.json: row 1 is null"),
    "row that is a word": ("a.jsonl", b'{"text": "a"}\n"b"\n', r"a\.jsonl: row 2 is 'b'; each row must be an object"),
    "deep row, which crashes the reader": ("a.jsonl", b'{"text": "a", "n": ' + b"[" * 30000 + b"]" * 30000 + b"}", r"row 1: lists and objects are nested too deep"),
    "deep row over many lines": ("a.jsonl", b'{"text": "a", "n": ' + b"[\n" * 30000 + b"]" * 30000 + b"}", r"a\.jsonl cannot be read: row 1: Expecting value"),
    "nested text": ("a.jsonl", rows({"text": {"a": "x"}}), r"column text of a\.jsonl does not hold text; row 1 is \{'a': 'x'\}"),
    "wrong type in one row": ("a.jsonl", rows({"text": "a"}, {"text": 5}), r"does not hold text; row 2 is 5"),
    "list in one row": ("a.jsonl", rows(*[{"text": "a"}] * 5, {"text": ["b"]}), r"does not hold text; row 6 is \['b'\]"),
    "key twice": ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', r"a\.jsonl .*row 2: a key is there twice"),
    "JSON cut short": ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a\.jsonl .*row 2: Unterminated string"),
    "CSV with a quote left open": ("a.csv", b'text\n"a\nb\n', r"a\.csv cannot be read: row in line 2: a quote is opened and never closed"),
    "CSV with a column twice": ("a.csv", b"text,text\na,b\n", r"a\.csv: its first line names two columns text"),
    "CSV rows that are too long": ("a.csv", b"text,n\na,b,c,d\n", r"a\.csv: line 2 has more cells \(4\) than the first line has names \(2\)"),
    "parquet cut short": ("a.parquet", parquet(["a"] * 99, lambda content: content[:-20]), r"a\.parquet .*cut short"),
    "parquet without its start": ("a.parquet", parquet(["a"] * 99, lambda content: content[4:]), r"a\.parquet .*cut short"),
    "mixed encodings in parquet": ("a.parquet", parquet_of_bytes(b"caf\xc3\xa9", b"caf\xe9"), r"a\.parquet .*row 2: .*UTF8"),
    "surrogate in parquet": ("a.parquet", parquet_of_bytes(b"a", b"b", b"\xed\xa0\x80"), r"a\.parquet .*row 3: .*UTF8"),
    "parquet of numbers": ("a.parquet", parquet([1, 2]), r"column text of a\.parquet does not hold text; row 1 is 1"),
    "parquet of nothing": ("a.parquet", parquet([None, ""]), r"a\.parquet: "),
    "ZIP": ("a.jsonl", zipped(rows({"text": "a"})), r"a\.jsonl is packed \(zip\); unpack it first"),
    "packed null row": ("a.jsonl", gzip.compress(b'null\n{"text": "a"}\n'), r"a\.jsonl: row 1 is null"),
    "packed and cut short": ("a.jsonl", gzip.compress(rows({"text": "a"}))[:-10], r"a\.jsonl is packed, and cut short"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "texts"), READ.values(), ids=READ)
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_odd_text_is_read_as_it_is(tmp_path, name, content, texts, streaming):
    (tmp_path / name).write_bytes(content)
    documents = load_documents(
        DataArguments(train_file=str(tmp_path / name), validation_split_percentage=0, streaming=streaming)
    )
    assert [row["text"] for row in documents["train"]] == texts


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_with_its_row(machine, name, content, message):
    (machine.new_work() / name).write_bytes(content)
    outcome = machine("tokenizer", name, "--kind", "byte", "--output", "../written/tokenizer")
    outcome.check()
    assert outcome.code == 2
    assert re.search(message, outcome.stderr), outcome.stderr


@pytest.mark.parametrize("what", [
    "lone surrogate", "mixed encodings in JSON", "mixed encodings in CSV", "mixed encodings in parquet", "CSV rows that are too long",
    "parquet without its start", "null row",
])  # fmt: skip
def test_a_stream_is_refused_before_it_is_trained_on(tmp_path, what):
    name, content, message = REFUSED[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_documents(DataArguments(train_file=str(tmp_path / name), validation_split_percentage=0, streaming=True))


@pytest.mark.slow
def test_rows_of_a_dataset_folder_that_crash_the_reader_are_refused(machine):
    folder = machine.new_work() / "rows"
    folder.mkdir()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(b'null\n{"text": "a"}\n'))
    (folder.parent / "recipe.yaml").write_text("dataset_name: rows\noutput_dir: ../written/run\nreport_to: none\n")
    outcome = machine("train", "recipe.yaml")
    outcome.check()
    assert outcome.code == 2 and "train.jsonl.gz: row 1 is null" in outcome.stderr


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_read_in_bounded_memory(machine):
    path = machine.new_work() / "long.jsonl"
    with open(path, "w") as file:
        file.write('{"text": "')
        for _ in range(1000):
            file.write("the whale and the sea " * 4546)
        file.write('"}\n{"text": "short"}\n')
    assert path.stat().st_size > 100e6
    outcome = machine("tokenizer", path.name, "--vocab-size", "300", "--output", "../written/tokenizer", seconds=300)
    outcome.check()
    path.unlink()
    assert outcome.code == 0 and outcome.peak_bytes < 2 << 30
