"""Reading and writing files: JSON, atomic writes, SHA-256, the record of a run."""

import hashlib
import os

import pytest

from hf_lm.errors import InputError
from hf_lm.files import read_json, replacing, sha256_of, write_json, write_text
from hf_lm.records import VERSION, read_metrics, write_metrics


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "[" * 3000, '{"a": NaN}', '{"a": -Infinity}'])
def test_damaged_json_is_empty_or_named(tmp_path, text: str):
    path = tmp_path / "file.json"
    path.write_text(text)
    assert "a" in read_json(path) if "{" in text and "a" in text else read_json(path) == {}
    with pytest.raises(InputError, match="file.json: "):
        read_json(path, strict=True)


def test_missing_json_is_empty(tmp_path):
    assert read_json(tmp_path / "none.json") == read_json(tmp_path / "none.json", strict=True) == {}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.md"
    write_text(path, "old\r\n")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"old\r\n" and os.listdir(tmp_path) == ["page.md"]


def test_sha256_is_over_the_bytes_of_all_files(tmp_path):
    for name, content in (("a", b"1" * 300_000), ("b", b"2")):
        (tmp_path / name).write_bytes(content)
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"1" * 300_000 + b"2").hexdigest()


def test_metrics_have_a_version_and_old_ones_are_read(tmp_path):
    write_metrics(tmp_path, {"steps": 3, "chrf/en-de": 40.5, "data": {"sha256": None}})
    assert read_metrics(tmp_path) == {"version": VERSION, "steps": 3, "chrf/en-de": 40.5, "data": {"sha256": None}}
    write_json(tmp_path / "metrics.json", {"steps": 3, "train_seconds": 12})
    assert read_metrics(tmp_path)["train_seconds"] == 12


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": VERSION + 1}, "Update hf_lm"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": True}, "steps must be int"),
        ({"license": 3}, "license must be str or null"),
        ({"data": []}, "data must be dict"),
        ({"data": {"train_bytes": "9"}}, r"data\.train_bytes must be int or null"),
    ],
)
def test_wrong_entries_of_metrics_are_named(tmp_path, entry: dict, message: str):
    write_json(tmp_path / "metrics.json", entry)
    with pytest.raises(InputError, match=message):
        read_metrics(tmp_path)
