"""Runs on a stream of conversations, translations or labelled texts."""

import shutil

import pytest
import torch
from helpers.rows import KEYS, write_rows
from safetensors.torch import load_file

from hf_lm.app.run import train
from hf_lm.tasks.recipe import parse_recipe


def run(path: str, *overrides: str) -> dict:
    return train(*parse_recipe(path, list(overrides)))


def same_weights(one, other) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def stream_recipe(recipe, tmp_path):
    """`stream_recipe(task, key=value, ...)`: a run that reads 40 rows more than once while it trains."""

    def write(task: str, **changes) -> str:
        sizes = {"train": 40, "validation": 8, "test": 8}
        files = {f"{split}_file": write_rows(tmp_path / f"{split}.jsonl", task, size) for split, size in sizes.items()}
        keys = {"task": task, "streaming": True, "tokenizer_kind": "byte", "vocab_size": None, "sample_prompts": None}
        keys |= {"report_to": "none", "max_steps": 16, "save_steps": 8, "eval_steps": 8, "block_size": 128}
        return recipe(**{**keys, **KEYS[task], **files, **changes})

    return write


@pytest.mark.parametrize("task", ["chat", *(pytest.param(task, marks=pytest.mark.slow) for task in list(KEYS)[1:])])
def test_a_run_on_a_stream_resumes_to_the_same_bits_and_scores(stream_recipe, tmp_path, task):
    path = stream_recipe(task, shuffle_buffer_size=4)
    metrics = run(path)
    straight = tmp_path / "straight"
    shutil.copytree(tmp_path / "run", straight)
    shutil.rmtree(tmp_path / "run" / "checkpoint-16")
    resumed = run(path, "--resume")
    assert same_weights(straight, tmp_path / "run")
    names = [
        name for name in ("accuracy", "bits_per_byte", "eval_loss", "self_ended", "chrf/en-de") if name in metrics
    ]
    assert len(names) > 0 and [metrics[name] for name in names] == [resumed[name] for name in names]


@pytest.mark.slow
def test_a_stream_of_conversations_trains_like_the_same_rows_on_disk(stream_recipe, tmp_path):
    on_disk = run(stream_recipe("chat", streaming=False, train_sampling_strategy="sequential"))
    shutil.move(tmp_path / "run", tmp_path / "disk")
    streamed = run(stream_recipe("chat", train_sampling_strategy="sequential"))
    assert same_weights(tmp_path / "disk", tmp_path / "run")
    for name in ("bits_per_byte", "self_ended"):
        assert streamed[name] == on_disk[name]
