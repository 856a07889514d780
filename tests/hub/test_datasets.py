"""Datasets of the Hub, read by the real client: text stays as it was written."""

CSV = b"text,label\n007,01\nNA,02\n2024-01-02,03\n"
JSON = b'{"text": "2024-01-02T03:04:05", "label": "no"}\n{"text": "1e5", "label": "yes"}\n'
READ = """
from hf_lm.data.arguments import DataArguments
from hf_lm.data.documents import load_rows
splits = load_rows(DataArguments(dataset_name=name, validation_split_percentage=0))
result = {split: rows[:] for split, rows in splits.items()}
"""
OFFLINE = """
import datasets, huggingface_hub.constants
previous = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = value == "1"
"""


def test_text_of_csv_and_json_files_is_not_guessed_to_be_something_else(hub, client):
    for name, files in (
        ("owner/tables", {"train.csv": CSV, "test.csv": CSV}),
        ("owner/lines", {"data/train-0.jsonl": JSON}),
    ):
        hub.create(name)
        hub.put(name, **files)
    found = client(READ, name="owner/tables")
    assert found["train"] == found["test"] == {"text": ["007", "NA", "2024-01-02"], "label": ["01", "02", "03"]}
    assert client(READ, name="owner/lines")["train"]["text"] == ["2024-01-02T03:04:05", "1e5"]
    client(OFFLINE, value="1")
    hub.clear()
    try:
        assert client(READ, name="owner/tables") == found
    finally:
        client(OFFLINE, value="0")
