"""Files give what is written in them, under the name that was named, and never what a cache held of others."""

import csv
import gzip
import json
import os
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.memory import PeakMemory

from hf_lm.data.arguments import DataArguments
from hf_lm.data.documents import data_sha256, describe_split, hold_out, load_documents, load_rows
from hf_lm.data.packing import pack_documents
from hf_lm.errors import InputError
from hf_lm.tasks import arguments_class, task_class
from hf_lm.tasks.classification import hold_out_by_label, names_of
from hf_lm.tokenization import train_tokenizer
from hf_lm.training.keys import ModelArguments


def write(path, rows: list[dict]) -> str:
    """The rows in the format of the file's name."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def load(task: str, *, seed: int = 1, **data) -> dict:
    """A task's rows, without a model."""
    data = arguments_class(task)(task=task, **{"validation_split_percentage": 0, **data})
    return task_class(task)(ModelArguments(), data, SimpleNamespace(seed=seed)).load()


def texts(*files, **data) -> list[str]:
    arguments = DataArguments(train_file=list(map(str, files)), **{"validation_split_percentage": 0, **data})
    return [row["text"] for row in load_documents(arguments)["train"]]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("01234", "4321"), ["01234", "4321"]),
        (("no", "yes"), ["no", "yes"]),
        (("2024-11-28", "2024-11-29T10:00"), ["2024-11-28", "2024-11-29T10:00"]),
        ((9, 10), ["9", "10"]),
        ((False, True), ["false", "true"]),
    ],
    ids=str,
)
def test_labels_are_as_they_are_written(tmp_path, name, labels, names):
    if name == "a.csv" and isinstance(labels[0], bool):
        names = ["False", "True"]  # as Python's csv writes them
    path = write(tmp_path / name, [{"text": f"letter {n}", "label": labels[n % 2]} for n in range(6)])
    rows = load("sequence-classification", train_file=path)
    assert names_of(rows["train"]) == names
    assert {row["text"]: row["label"] for row in rows["train"]} == {f"letter {n}": n % 2 for n in range(6)}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("labels", "declared", "numbers"),
    [((0, 1), ["bad", "good"], [0, 1]), ((1, 2), ["2", "1"], [1, 0]), ((True, False), ["True", "False"], [0, 1])],
    ids=str,
)
def test_declared_names_are_matched_by_name_or_else_by_number(tmp_path, name, labels, declared, numbers):
    path = write(tmp_path / name, [{"text": f"{n}", "label": labels[n % 2]} for n in range(6)])
    rows = load("sequence-classification", train_file=path, class_names=declared)
    assert names_of(rows["train"]) == declared
    assert {int(row["text"]): row["label"] for row in rows["train"]} == {n: numbers[n % 2] for n in range(6)}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_prompts_answers_and_languages_are_as_they_are_written(tmp_path, name):
    answers = ["007", "1e5", "2024-11-28T10:00:00", "NA", "no", "1.50"]
    rows = [{"prompt": "12:30", "completion": answer} for answer in answers]
    chat = load("chat", train_file=write(tmp_path / name, rows))["train"]
    assert [row["messages"][1]["content"] for row in chat] == answers
    assert chat[0]["messages"][0]["content"] == "12:30"
    rows = [{"en": "number", "num": answer} for answer in answers]
    languages = load("translation", train_file=write(tmp_path / name, rows), language_pairs=["en-num"])["train"]
    assert languages["num"] == answers


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_answers_that_are_whole_numbers_are_their_digits(tmp_path, name):
    path = write(tmp_path / name, [{"prompt": f"{n}+1", "completion": n + 1} for n in range(3)])
    rows = load("chat", train_file=path)["train"]
    assert [row["messages"][1]["content"] for row in rows] == ["1", "2", "3"]
    rows = load("translation", train_file=path, language_pairs=["prompt-completion"])["train"]
    assert rows["completion"] == ["1", "2", "3"]


def test_messages_hold_what_is_written_and_arrow_has_many_forms_of_text(tmp_path):
    turns = [{"role": "user", "content": "Why?", "name": "x"}, {"role": "assistant", "content": "So."}]
    rows = load("chat", train_file=write(tmp_path / "a.jsonl", [{"messages": turns}]))["train"]
    assert rows[0]["messages"] == turns  # no field is added
    view = pyarrow.string_view()
    for text, rows in ((view, pyarrow.list_), (pyarrow.large_string(), pyarrow.large_list)):
        kind = rows(pyarrow.struct([("role", view), ("content", text)]))
        array = pyarrow.array([[{"role": turn["role"], "content": turn["content"]} for turn in turns]], kind)
        table = pyarrow.table({"messages": array})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        read = load("chat", train_file=str(tmp_path / "a.parquet"))["train"]
        assert [turn["content"] for turn in read[0]["messages"]] == ["Why?", "So."]
    labels = pyarrow.array(["b", "a", "b"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y", "z"], "label": labels}), tmp_path / "b.parquet")
    rows = load("label-likelihood", train_file=str(tmp_path / "b.parquet"))
    assert names_of(rows["train"]) == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["q[1].jsonl", "q*.jsonl", "q?.jsonl", "~q.jsonl", "{q,r}.jsonl", "q r é 鲸.jsonl", "q::r%20#.jsonl"]
)
def test_a_file_of_this_name_is_meant_before_any_pattern(tmp_path, monkeypatch, name, streaming):
    monkeypatch.chdir(tmp_path)
    for other in ("q1.jsonl", "qq.jsonl", "q.jsonl", "r.jsonl"):
        write(tmp_path / other, [{"text": other}])
    write(tmp_path / name, [{"text": "this"}])
    assert texts(name, streaming=streaming) == ["this"]
    assert texts(tmp_path / name, streaming=streaming) == ["this"]
    assert len(texts("q*.jsonl")) == (1 if name == "q*.jsonl" else len(list(tmp_path.glob("q*.jsonl"))))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_cache_never_serves_another_content(tmp_path, monkeypatch, name):
    """Same relative path, size and time; as a file, and as a local dataset."""

    def content(word: str) -> bytes:
        rows = [{"text": f"{word} {n}"} for n in range(200)]
        if name.endswith(".txt"):
            return f"{word} 100 ".encode() * 20
        if name.endswith(".gz"):
            return gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0)
        path = tmp_path / name
        write(path, rows)
        return path.read_bytes()

    read, packed = [], []
    for folder, word in (("one", "AAAA"), ("two", "BBBB"), ("two", "CCCC")):
        (tmp_path / folder / "set").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        data = content(word)
        for file in (tmp_path / folder / name, tmp_path / folder / "set" / name):
            file.write_bytes(data)
            os.utime(file, (1e9, 1e9))
        rows = load_documents(DataArguments(train_file=name, validation_split_percentage=0))["train"]
        dataset = load_documents(DataArguments(dataset_name="set", validation_split_percentage=0))["train"]
        read.append(
            {word for part in (rows, dataset) for text in part["text"] for word in text.split() if word.isalpha()}
        )
        for tokenizer in (train_tokenizer([], kind="byte"), train_tokenizer(["AAAA BBBB CCCC"], 300)):
            blocks = pack_documents(rows, tokenizer, 32)
            packed.append(tokenizer.decode(blocks[0]["input_ids"], skip_special_tokens=True)[:4])
    assert read == [{"AAAA"}, {"BBBB"}, {"CCCC"}]
    assert packed == ["AAAA"] * 2 + ["BBBB"] * 2 + ["CCCC"] * 2


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, monkeypatch):
    from hf_lm.data import readers

    path, text = tmp_path / "a.txt", f"not in any cache: {tmp_path} {os.times().elapsed}"
    path.write_text(text)
    rows = readers._text_rows

    def change(source):
        yield from rows(source)
        path.write_text(text.upper())

    monkeypatch.setattr(readers, "_text_rows", change)
    with pytest.raises(InputError, match="a.txt was changed while it was read"):
        texts(path)
    monkeypatch.undo()
    path.write_text(text)
    assert texts(path) == [text]


SPLIT_NAMES = ["dev", "val", "valid", "Validation", "eval", "development "]


@pytest.mark.parametrize("name", SPLIT_NAMES)
def test_a_split_may_have_any_usual_name(tmp_path, caplog, name):
    path = write(
        tmp_path / "a.csv", [{"text": f"{s} {n}", "part": s} for s in ("Train", name, "testing", "") for n in range(3)]
    )
    found = load_rows(DataArguments(train_file=path, split_column_name="part"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "validation": 3, "test": 3}
    assert found["validation"][0]["text"] == f"{name} 0"
    assert "3 of 12 rows name no split and are left out" in caplog.text


def test_an_unknown_split_is_an_error_that_lists_what_is_there(tmp_path):
    rows = [{"text": f"{n}", "part": part} for part in ("train", "holdout") for n in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"holds holdout \(3 rows\), train \(3 rows\); holdout is none of train"):
        load_rows(DataArguments(train_file=path, split_column_name="part"))


def test_a_local_dataset_has_splits_by_usual_names_and_text_as_it_is_written(tmp_path, caplog):
    for part in ("train", "dev", "extra"):
        write(tmp_path / f"{part}.csv", [{"text": "007", "label": "NA"}, {"text": part, "label": "1.50"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {part}\n    path: {part}.csv\n" for part in ("train", "dev", "extra"))
        + "---\n"
    )
    found = load_rows(DataArguments(dataset_name=str(tmp_path)))
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "train": ["007", "train"],
        "validation": ["007", "dev"],
    }
    assert found["train"]["label"][:] == ["NA", "1.50"]
    assert "the splits extra are not used" in caplog.text


def test_the_share_of_the_text_is_held_out_where_texts_are_few_or_uneven():
    def held_out(sizes: list[int], percentage: float) -> tuple:
        letters = [chr(97 + number % 26) * size for number, size in enumerate(sizes)]
        parts = hold_out(datasets.Dataset.from_dict({"text": letters}), percentage)
        assert Counter("".join(parts["train"]["text"]) + "".join(parts["validation"]["text"])) == Counter(
            "".join(letters)
        )
        sizes = [[len(text) for text in parts[split]["text"]] for split in ("train", "validation")]
        share = sum(sizes[1]) / len("".join(letters))
        assert f"{sum(sizes[1]):,} of" in describe_split(parts) and f"({share:.1%})" in describe_split(parts)
        return sizes

    assert held_out([300, 1200], 10) == [[270, 1080], [30, 120]]
    assert held_out([100] * 3, 10) == [[90] * 3, [10] * 3]
    assert held_out([100] * 20, 10) == [[100] * 18, [100] * 2]
    assert held_out([100] * 100 + [1] * 100, 50) == [[100] * 50, [100] * 50 + [1] * 100]  # not 100 rows of 1
    assert held_out([2] * 9 + [1000], 10) == [[1] * 9 + [900], [1] * 9 + [100]]


def test_labels_are_held_out_in_equal_shares():
    rows = datasets.Dataset.from_dict({"text": list("abcdefghij") * 10, "label": ["a"] * 80 + ["b"] * 18 + ["c", "d"]})
    parts = hold_out_by_label(rows, 10, "label")
    assert describe_split(parts) == "Held out: 10 of 100 rows (10.0%)"
    assert Counter(parts["validation"]["label"]) == {"a": 8, "b": 2}
    assert set(parts["train"]["label"]) == set("abcd") and len(parts["train"]) == 90
    assert Counter(hold_out_by_label(rows, 60, "label")["train"]["label"])["c"] == 1


def test_all_files_in_another_encoding_are_named_at_once_with_the_cure(tmp_path):
    french, chinese = "Une forêt, un été à la mer.", "老人与海，白鲸与船长。" * 3
    paths = []
    for name, text, encoding in (("1", "fine", "utf-8"), ("2", french, "latin-1"), ("3", french * 2, "latin-1")):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_bytes(text.encode(encoding))
    with pytest.raises(
        InputError, match=r"2\.txt: not UTF-8: byte 0xea at offset 7.*3\.txt: .*iconv -f latin-1 -t utf-8"
    ):
        texts(*paths)
    with pytest.raises(InputError, match="set encoding: latin-1"):
        texts(*paths[1:])
    assert texts(*paths[1:], encoding="latin-1") == [french, french * 2]
    write(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": chinese}, ensure_ascii=False).encode("gbk"))
    with pytest.raises(InputError, match="set encoding: gb18030"):
        texts(tmp_path / "a.jsonl")
    assert texts(tmp_path / "a.jsonl", encoding="gb18030") == [chinese]
    with pytest.raises(InputError, match="not ascii: byte 0xc0"):
        texts(tmp_path / "a.jsonl", encoding="ascii")
    with pytest.raises(InputError, match="encoding: 'klingon' is none"):
        DataArguments(encoding="klingon")


def test_empty_files_are_left_out_and_said(tmp_path, caplog):
    for name, text in (("a", "x"), ("b", ""), ("c", " \n"), ("d", "y")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert texts(tmp_path / "*.txt") == ["x", "y"]
    assert "2 of 4 files are empty and left out" in caplog.text and "b.txt" in caplog.text
    assert data_sha256(DataArguments(train_file=str(tmp_path / "*.txt")))
    with pytest.raises(InputError, match=r"b\.txt, .*c\.txt holds nothing but white space"):
        texts(tmp_path / "b.txt", tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("task", "row", "hint"),
    [
        ("causal-lm", {"messages": [], "id": "x"}, "task: chat"),
        ("causal-lm", {"prompt": "a", "completion": "b"}, "task: chat"),
        ("causal-lm", {"en": "a", "de": "b"}, r"task: translation, with language_pairs: \[de-en\]"),
        ("chat", {"text": "a", "label": "b"}, "task: sequence-classification"),
        ("chat", {"text": "a"}, "task: causal-lm"),
        ("sequence-classification", {"messages": [], "text": "x"}, "task: chat"),
        ("translation", {"text": "a", "label": "b"}, "task: sequence-classification"),
    ],
)
def test_rows_for_another_task_name_it(tmp_path, task, row, hint):
    path = write(tmp_path / "a.jsonl", [row] * 3)
    pairs = {"language_pairs": ["en-fr"]} if task == "translation" else {}
    with pytest.raises(InputError, match=hint):
        load(task, train_file=path, **pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_the_memory_for_one_huge_line_is_a_small_multiple_of_it(tmp_path, name):
    size, tokenizer = 20_000_000, train_tokenizer(["the whale and the sea 0123456789"], 300)
    text = "".join(f"the whale and the sea {number} " for number in range(size // 29))
    with PeakMemory():  # what is loaded at the first use
        texts(write(tmp_path / "small.csv", [{"text": text[:100]}]))
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    else:
        write(tmp_path / name, [{"text": text}])
    size = len(text)
    del text
    data = DataArguments(train_file=str(tmp_path / name), validation_split_percentage=10)
    with PeakMemory() as reading:
        documents = load_documents(data)["train"]
    assert reading.bytes < (10 if name == "a.csv" else 6) * size  # measured: 6.7 for CSV, 3.7 for JSON, 3.1 for text
    if name == "a.txt":
        with PeakMemory() as packing:
            pack_documents(documents, tokenizer, 256)
        assert packing.bytes < 6 * size  # measured: 2.6
