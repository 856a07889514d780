"""Every way in gives the same documents; the held-out part is exact; every mistake is one line."""

import csv
import json

import pytest
from datasets import Dataset

from hf_lm.data.arguments import DataArguments
from hf_lm.data.documents import data_sha256, load_documents
from hf_lm.errors import InputError

TEXTS = [f"Document number {number}, with 鲸 and\ttabs.\r\nSecond line." for number in range(10)]


@pytest.fixture
def files(tmp_path):
    """The same ten documents in every format."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "n": number}) for number, text in enumerate(TEXTS)), encoding="utf-8"
    )
    with open(tmp_path / "rows.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "n"], *([text, number] for number, text in enumerate(TEXTS))])
    Dataset.from_dict({"body": TEXTS, "n": list(range(10))}).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["texts/*.txt", "rows.jsonl", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_documents(files, name, streaming):
    arguments = DataArguments(train_file=str(files / name), streaming=streaming, validation_split_percentage=0)
    documents = load_documents(arguments)
    assert list(documents) == ["train"]
    assert [row["text"] for row in documents["train"]] == TEXTS
    assert set(next(iter(documents["train"]))) == {"text"}


def test_dataset_folder_is_read_by_name(files):
    documents = load_documents(DataArguments(dataset_name=str(files / "texts"), validation_split_percentage=0))
    assert len(documents["train"]) > 0  # the library's own text reader: one row a line


def test_last_documents_are_held_out_in_order(files):
    documents = load_documents(DataArguments(train_file=str(files / "rows.jsonl"), validation_split_percentage=25))
    assert [row["text"] for row in documents["train"]] == TEXTS[:7]
    assert [row["text"] for row in documents["validation"]] == TEXTS[7:]


@pytest.mark.parametrize("percentage", [10, 5.5, 50])
def test_boundary_inside_one_document_is_exact_in_characters(tmp_path, moby_dick, percentage):
    (tmp_path / "book.txt").write_bytes(moby_dick.encode())
    documents = load_documents(
        DataArguments(train_file=str(tmp_path / "book.txt"), validation_split_percentage=percentage)
    )
    boundary = int(len(moby_dick) * (100 - percentage) / 100)
    assert documents["train"][0]["text"] == moby_dick[:boundary]
    assert documents["validation"][0]["text"] == moby_dick[boundary:]


def test_validation_file_and_limits(files):
    arguments = DataArguments(
        train_file=str(files / "rows.jsonl"),
        validation_file=[str(files / "texts" / "0.txt"), str(files / "texts" / "1.txt")],
        max_train_samples=3,
        max_eval_samples=1,
    )
    documents = load_documents(arguments)
    assert [row["text"] for row in documents["train"]] == TEXTS[:3]
    assert [row["text"] for row in documents["validation"]] == TEXTS[:1]


def test_hash_depends_on_every_byte(files):
    before = data_sha256(DataArguments(train_file=str(files / "texts" / "*.txt")))
    assert before == data_sha256(DataArguments(train_file=str(files / "texts" / "*.txt")))
    (files / "texts" / "9.txt").write_text("changed")
    assert before != data_sha256(DataArguments(train_file=str(files / "texts" / "*.txt")))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, {"train_file": "nowhere.txt"}, r"nowhere\.txt does not exist"),
        (None, {"train_file": "no*.txt"}, r"no file matches .*no\*\.txt"),
        (None, {"train_file": "texts"}, "is a folder"),
        (None, {}, "name a file"),
        (write("a.txt", b""), {"train_file": "a.txt"}, r"a\.txt is empty"),
        (write("a.txt", b" \n\n "), {"train_file": "a.txt"}, "nothing but white space"),
        (write("a.txt", b"fine so far \xff\xfe"), {"train_file": "a.txt"}, "not UTF-8: byte 0xff at offset 12"),
        (write("a.doc", b"x"), {"train_file": "a.doc"}, r"must end in one of \.txt"),
        (write("a.txt", b"x"), {"train_file": ["a.txt", "rows.csv"]}, "one kind"),
        (None, {"train_file": "rows.jsonl", "text_column_name": "body"}, "no column body; it has text, n"),
        (None, {"train_file": "rows.jsonl", "text_column_name": "n"}, "column n .* does not hold text"),
        (write("a.jsonl", b'{"a": "x", "b": "y"}\n'), {"train_file": "a.jsonl"}, "name one of a, b"),
        (write("a.jsonl", b'{"text": ""}\n{"text": null}\n'), {"train_file": "a.jsonl"}, "a.jsonl"),
        (write("a.jsonl", b'{"text": "x"'), {"train_file": "a.jsonl"}, "a.jsonl cannot be read"),
        (write("a.parquet", b"PAR1 not really"), {"train_file": "a.parquet"}, "a.parquet cannot be read"),
        (write("a.csv", b"text\n\xff\xfe\n"), {"train_file": "a.csv"}, "a.csv: not UTF-8: byte 0xff at offset 5"),
        (write("a.jsonl", b'{"text": "x\xff"}\n'), {"train_file": "a.jsonl"}, "a.jsonl: not UTF-8: .* offset 11"),
        (write("a.jsonl", b'{"text": "\\ud800"}\n'), {"train_file": "a.jsonl"}, "a.jsonl cannot be read: .*surrogate"),
        (write("a.csv", b"text\n"), {"train_file": "a.csv"}, "a.csv: holds no rows"),
        (
            write("a.jsonl", b"\n"),
            {"train_file": "a.jsonl", "streaming": True},
            "a.jsonl holds nothing but white space",
        ),
        (write("a.txt", b"x"), {"train_file": "a.txt", "validation_split_percentage": 10}, "leaves a part empty"),
        (None, {"train_file": "rows.jsonl", "streaming": True}, "validation_file"),
        (None, {"train_file": "rows.jsonl", "validation_split_percentage": 100}, "100"),
        (None, {"train_file": "rows.jsonl", "block_size": 0}, "block_size.*0"),
        (None, {"dataset_name": "nobody/nothing"}, "nobody/nothing cannot be loaded"),
        (None, {"dataset_name": "x", "train_file": "rows.csv"}, "exclude"),
    ],
)
def test_mistakes_are_named(files, monkeypatch, prepare, arguments, message):
    monkeypatch.chdir(files)
    if prepare is not None:
        prepare(files)
    with pytest.raises(InputError, match=message):
        load_documents(DataArguments(**arguments))


def test_empty_rows_are_left_out(files):
    (files / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\n{"text": null}\n{"text": "y"}\n')
    documents = load_documents(DataArguments(train_file=str(files / "a.jsonl"), validation_split_percentage=0))
    assert [row["text"] for row in documents["train"]] == ["x", "y"]


@pytest.mark.parametrize("streaming", [False, True])
def test_words_that_csv_readers_take_for_nothing_are_text(files, streaming):
    (files / "a.csv").write_text("text\nNA\nnull\nnan\n")
    arguments = DataArguments(train_file=str(files / "a.csv"), validation_split_percentage=0, streaming=streaming)
    assert [row["text"] for row in load_documents(arguments)["train"]] == ["NA", "null", "nan"]
