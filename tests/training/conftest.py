"""A recipe that trains in a second on a chapter of a real book."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def recipe(tmp_path: Path, moby_dick: str):
    """`recipe(key=value, ...)` writes a small recipe with these keys changed and returns its path."""
    (tmp_path / "book.txt").write_text(moby_dick[:60_000], encoding="utf-8")

    def write(**changes) -> str:
        keys = {
            "output_dir": str(tmp_path / "run"),
            "train_file": str(tmp_path / "book.txt"),
            "validation_split_percentage": 10,
            "block_size": 64,
            "vocab_size": 400,
            "config_overrides": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "muon_learning_rate": 0.02,
            "learning_rate": 0.003,
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "logging_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "save_steps": 4,
            "sample_prompts": ["Call me"],
            "sample_tokens": 8,
            "bf16": False,
            "forecast": False,
            "report_to": "tensorboard",
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**keys, **changes}))
        return str(path)

    return write
