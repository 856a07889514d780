"""What a run says when it goes wrong, what it keeps then, and what it leaves of its costs when it is resumed."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_lm.app.run import train
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.arguments import HfLmTrainingArguments, keep_best_by_default
from hf_lm.training.callbacks import explosion, overfitting


def log(losses=(), held_out=()) -> list[dict]:
    """A run's log: losses at steps 10, 20, ..., each evaluated after it is logged."""
    entries = []
    for number, loss in enumerate(losses):
        entries.append({"step": 10 * number + 10, "loss": loss})
        if number < len(held_out):
            entries.append({"step": 10 * number + 10, "eval_loss": held_out[number]})
    return entries


def test_an_explosion_is_said_with_its_size():
    text = explosion(log([4.0, 3.0, 102_885.0]))
    assert text.startswith("the loss exploded: 1.029e+05 at step 30, 3 at step 20.") and "learning_rate" in text
    assert "5.5 for a uniform guess" in explosion(log([2_000.0]), uniform=5.5)
    for usual in ([4.0, 3.0, 3.5], [0.01, 0.4], [6.2, 9.0], [7.9]):
        assert explosion(log(usual), uniform=5.5) is None


def test_overfitting_is_held_out_loss_that_rises_while_training_loss_falls():
    text = overfitting(log([4.0, 3.0, 2.0], [4.1, 3.5, 3.7]))
    assert "held-out loss rose from 3.5 at step 20 to 3.7 at step 30, training loss fell from 3 to 2" in text
    for fine in (([4.0, 3.0, 2.0], [4.1, 3.5, 3.4]), ([4.0, 3.0, 3.2], [4.1, 3.5, 3.7]), ([4.0, 3.0], [3.5, 3.51]), ([4.0], [4.1])):  # fmt: skip
        assert overfitting(log(*fine)) is None


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"max_steps": 4}, False),  # not read twice
        ({"max_steps": -1, "num_train_epochs": 3}, True),
        ({"eval_strategy": "no"}, False),
        ({"eval_steps": 3}, False),  # checkpoints that are not evaluated
        ({"eval_steps": 0.25, "save_steps": 0.5}, True),
        ({"load_best_model_at_end": False}, False),
    ],
)
def test_the_best_is_kept_where_text_is_read_twice_and_each_checkpoint_is_evaluated(tmp_path, changes, kept):
    keys = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "report_to": "none"}
    arguments = HfLmTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=5, **{**keys, **changes})
    keep_best_by_default(arguments, rows=100)
    assert arguments.load_best_model_at_end is kept
    assert arguments.metric_for_best_model == ("loss" if kept else None)
    keep_best_by_default(arguments := HfLmTrainingArguments(output_dir=str(tmp_path), **keys), rows=None)
    assert arguments.load_best_model_at_end is False


@pytest.mark.slow
def test_a_run_that_overfits_says_so_and_keeps_its_best_and_its_costs(recipe, tmp_path, capsys):
    keys = {
        "max_steps": 60, "learning_rate": 0.02, "muon_learning_rate": 0.05, "eval_steps": 10, "save_steps": 10,
        "logging_steps": 5, "sample_tokens": 3, "block_size": 32, "per_device_train_batch_size": 16, "report_to": "none",
        "tokenizer_kind": "byte", "forecast": True, "validation_split_percentage": 20,
        "config_overrides": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    }  # fmt: skip
    path, book = recipe(**keys), tmp_path / "book.txt"
    book.write_text(book.read_text(encoding="utf-8")[:3_000], encoding="utf-8")
    first = train(*parse_recipe(path, []))
    said = capsys.readouterr().err
    assert "Warning: the model overfits: held-out loss rose" in said and "The best checkpoint is kept." in said
    assert said.count("Warning: ") == 1 and "Sample at step 10: Call me" in said
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 60 and first["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-6)
    best, kept = (load_file(Path(folder) / "model.safetensors") for folder in (state["best_model_checkpoint"], tmp_path / "run"))  # fmt: skip
    assert all((kept[name] == weight).all() for name, weight in best.items())
    kept = f"step {state['best_global_step']}: best loss ({state['best_metric']:.4g}, less is better)"
    assert first["kept"] == kept and kept in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    again = train(*parse_recipe(path, ["--resume"]))
    for key in ("predicted", "actual", "train_seconds", "total_seconds", "peak_memory_bytes", "eval_loss"):
        assert again[key] == pytest.approx(first[key]) if key == "eval_loss" else again[key] == first[key], key
    assert (
        again["predicted"] and json.loads((tmp_path / "run" / "metrics.json").read_text())["actual"] == first["actual"]
    )
