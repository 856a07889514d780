"""One pipeline for conversations, translations and labels: cached, streamed, in memory that the rows do not fill."""

import ast
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import IterableDataset
from helpers.memory import PeakMemory
from helpers.rows import KEYS, write_rows
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_lm.errors import InputError
from hf_lm.tasks import arguments_class, task_class
from hf_lm.training.keys import ModelArguments

TASKS = list(KEYS)


def prepared(task: str, file: str | list[str], tokenizer=None, workers: int = 0, kind: str = "byte", **data):
    """The training examples of a file, and the tokenizer."""
    keys = {"train_file": file, "validation_split_percentage": 0, "block_size": 64, **KEYS[task], **data}
    training = SimpleNamespace(
        seed=1, world_size=1, dataloader_num_workers=workers, eval_strategy="no", train_sampling_strategy="random"
    )
    model = ModelArguments(tokenizer_kind=kind, vocab_size=300)
    made = task_class(task)(model, arguments_class(task)(task=task, **keys), training)
    found = made.read(tokenizer=tokenizer)
    return made.encode(found.rows["train"], found.tokenizer, "train"), found.tokenizer


def contents(blocks) -> list[tuple]:
    return [tuple(np.asarray(block[name]).tolist() for name in ("input_ids", "labels")) for block in blocks]


@pytest.mark.parametrize("task", TASKS)
def test_the_memory_does_not_grow_with_the_rows(tmp_path, task, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    small, large = (write_rows(tmp_path / f"{count}.jsonl", task, count, 40) for count in (500, 4000))
    tokenizer = prepared(task, write_rows(tmp_path / "first.jsonl", task, 1500, 40), block_size=512)[1]
    peaks = []
    for file in (small, large):
        with PeakMemory() as peak:
            blocks, _ = prepared(task, file, tokenizer, block_size=512)
        peaks.append(peak.bytes)
    assert len(blocks) > 100
    assert peaks[1] < peaks[0] + 8e6, peaks


@pytest.mark.parametrize("task", TASKS)
def test_a_second_preparation_calls_no_tokenizer_and_says_what_the_first_one_said(tmp_path, task, monkeypatch, caplog):
    file = [write_rows(tmp_path / f"{length}.jsonl", task, 20, length, first=length) for length in (6, 26)]
    keys = {"block_size": 120}
    first, tokenizer = prepared(task, file, **keys)
    said = [record.getMessage() for record in caplog.records]
    assert any("block_size 120" in line for line in said)
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # as a resumed run has it
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    caplog.clear()

    def fail(*arguments, **options):
        raise InputError("tokenised again")

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", fail)
    for again in (tokenizer, loaded):
        assert contents(prepared(task, file, again, **keys)[0]) == contents(first)
        assert [record.getMessage() for record in caplog.records] == said
        caplog.clear()
    for changes in ({"block_size": 121}, {"long_examples": "drop"}):
        with pytest.raises(InputError, match="tokenised again"):
            prepared(task, file, tokenizer, **{**keys, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_other_tokenizers_and_other_rows_are_other_examples(tmp_path, task):
    file = write_rows(tmp_path / "rows.jsonl", task, 10)
    first, tokenizer = prepared(task, file)
    more, _ = prepared(task, write_rows(tmp_path / "more.jsonl", task, 11), tokenizer)
    assert sum(more["num_bytes"]) > sum(first["num_bytes"])
    assert contents(prepared(task, file, kind="bpe")[0]) != contents(first)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_same_examples_once(tmp_path, task, workers):
    file = write_rows(tmp_path / "rows.jsonl", task, 220)  # a hundred for each worker
    keys = {"packing": False, "block_size": 256}
    table, tokenizer = prepared(task, file, **keys)
    stream, _ = prepared(task, file, tokenizer, workers, streaming=True, **keys)
    assert isinstance(stream, IterableDataset) and stream.num_shards == max(workers, 1)
    loader = DataLoader(stream, batch_size=20, num_workers=workers, collate_fn=list)
    assert Counter(map(repr, contents(block for batch in loader for block in batch))) == Counter(
        map(repr, contents(table))
    )


def test_a_stream_of_conversations_is_packed_as_a_table_is(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", "chat", 300)
    table, tokenizer = prepared("chat", file, block_size=256)
    stream, _ = prepared("chat", file, tokenizer, block_size=256, streaming=True)
    assert contents(stream) == contents(table) and len(table) < 150


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        *((task, {"long_examples": "error"}, "long_examples: error looks at all examples") for task in TASKS),
        *((task, {"validation_split_percentage": 5}, "streaming: name a validation_file") for task in TASKS),
        *((task, {"split_column_name": "split"}, "split_column_name: does not go with streaming") for task in TASKS),
        *(
            (task, changes, message)
            for task in TASKS[2:]
            for changes, message in (
                ({"class_balance": "oversample"}, "class_balance: oversample needs the labels of all rows"),
                ({"baseline": True}, "baseline: needs the texts of all rows"),
                ({"class_names": None}, "class_names: name them"),
                ({"class_names": ["calm", "mild"]}, "class_names: train has the label 'wild'"),
            )
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_words(tmp_path, task, changes, message):
    file = write_rows(tmp_path / "rows.jsonl", task, 10)
    with pytest.raises(InputError, match=message):
        list(prepared(task, file, streaming=True, **changes)[0])


@pytest.mark.parametrize(
    ("labels", "names"), [((0, 1), ["calm", "wild"]), ((False, True), ["False", "True"]), (("1", "0"), ["1", "0"])]
)
def test_labels_of_a_stream_are_read_as_those_of_a_table(tmp_path, labels, names):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} sea", "label": labels[n % 2]}) for n in range(9)))
    keys = {"class_names": names, "packing": False}
    table, tokenizer = prepared("sequence-classification", str(path), **keys)
    stream, _ = prepared("sequence-classification", str(path), tokenizer, streaming=True, **keys)
    assert Counter(map(repr, contents(stream))) == Counter(map(repr, contents(table)))


def test_a_damaged_conversation_in_a_stream_is_named_before_the_training(tmp_path):
    path = Path(write_rows(tmp_path / "rows.jsonl", "chat", 10))
    path.write_text(path.read_text() + '\n{"messages": [{"role": "user", "content": "Why?"}]}')
    with pytest.raises(InputError, match="row 11 has no message of the assistant"):
        prepared("chat", str(path), streaming=True)


def test_each_step_from_rows_to_tokens_stands_once(repository):
    """Tables of tokens are written, and streams of them made, by `token_rows` alone; no task keeps rows in lists."""
    found = {}
    for path in sorted((repository / "hf_lm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                if name in ("from_generator", "from_list", "cached", "token_rows"):
                    found.setdefault(name, []).append(path.relative_to(repository / "hf_lm").as_posix())
    assert found == {
        "cached": ["data/pipeline.py", "data/readers.py"],
        "from_generator": ["data/pipeline.py", "data/readers.py"],
        "from_list": ["data/documents.py"],  # the held-out rows of a stream from the Hub
        "token_rows": ["data/examples.py", "data/packing.py"],
    }
