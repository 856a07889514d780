"""The small recipe that most tests of training start from."""

from pathlib import Path

import yaml

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_recipe(folder: Path, **changes) -> str:
    """Write a recipe that trains on `book.txt` of the folder, with these keys changed, and return its path."""
    keys = {
        "output_dir": str(folder / "run"),
        "train_file": str(folder / "book.txt"),
        "validation_split_percentage": 10,
        "block_size": 64,
        "vocab_size": 400,
        "config_overrides": SIZES,
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
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**keys, **changes}))
    return str(folder / "recipe.yaml")
