"""Continued pre-training: a checkpoint learns a new language; what it knew is watched."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lm.app.run import train
from hf_lm.errors import InputError
from hf_lm.tasks.recipe import parse_recipe

POEMS = "春风得意马蹄疾，一日看尽长安花。\n春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。\n" * 40


@pytest.fixture
def base(recipe, tmp_path):
    train(*parse_recipe(recipe(output_dir=str(tmp_path / "base"), max_steps=4), []))
    (tmp_path / "poems.txt").write_text(POEMS, encoding="utf-8")
    return tmp_path / "base"


def continued(recipe, tmp_path, base, **changes):
    keys = {
        "model_name_or_path": str(base),
        "train_file": str(tmp_path / "poems.txt"),
        "control_file": [str(tmp_path / "book.txt")],
        "control_split_percentage": 10,
        "extend_vocab_size": 50,
        "sample_prompts": None,
        **changes,
    }
    path = recipe(**keys)
    return parse_recipe(path, [])


@pytest.mark.slow
def test_a_new_language_is_learned_and_the_old_one_measured(recipe, tmp_path, base):
    recipe_keys = continued(recipe, tmp_path, base)
    recipe_keys[0].config_overrides = None
    metrics = train(*recipe_keys)
    old = AutoModelForCausalLM.from_pretrained(base)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    rows = old.config.vocab_size
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == new.config.vocab_size == rows + 50
    assert metrics["bits_per_byte"] < metrics["bits_per_byte_before"]
    assert metrics["control_bits_per_byte"] != metrics["control_bits_per_byte_before"]
    assert "held out" in metrics["summary"] and "control_file" in metrics["summary"]
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    for name, key in (("", ""), (" of control_file", "control_")):
        assert f"| bits per byte{name} | {metrics[f'{key}bits_per_byte']:.4g} |" in card
        before = metrics[f"{key}bits_per_byte_before"]
        assert f"| bits per byte{name} before this training | {before:.4g} |" in card


def test_new_embeddings_start_as_the_mean_of_what_they_replace(recipe, tmp_path, base):
    from hf_lm.tasks import task_class

    model_arguments, data, training = continued(recipe, tmp_path, base)
    model_arguments.config_overrides = None
    task = task_class("causal-lm")(model_arguments, data, training)
    data = task.prepare()
    trainer = task.build_trainer(data)
    old, new = (
        model.get_input_embeddings().weight for model in (AutoModelForCausalLM.from_pretrained(base), trainer.model)
    )
    assert torch.equal(new[: len(old)], old)
    for number, parts in enumerate(data.stands_for):
        assert torch.allclose(new[len(old) + number], new[parts].mean(dim=0), atol=1e-6)


def test_mistakes_are_named(recipe, tmp_path, base):
    for changes, message in (
        ({"model_name_or_path": None, "extend_vocab_size": None}, "control_file: needs a model_name_or_path"),
        ({"model_name_or_path": None, "control_file": None}, "extend_vocab_size: needs"),
        ({"control_file": ["none.txt"]}, "none.txt does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            train(*continued(recipe, tmp_path, base, **changes))


@pytest.mark.slow
def test_replayed_text_is_mixed_in(recipe, tmp_path, base):
    from hf_lm.tasks import task_class

    def blocks(**changes):
        keys = continued(recipe, tmp_path, base, **changes)
        keys[0].config_overrides = None
        task = task_class("causal-lm")(*keys)
        trainer = task.build_trainer(task.prepare())
        return [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]

    plain, mixed = blocks(), blocks(replay_percentage=40)
    assert set(plain) <= set(mixed) and not any("Ishmael" in text for text in plain)
    replayed = [text for text in mixed if text not in plain]
    assert any("Ishmael" in text for text in replayed)
    assert 0.2 < len(replayed) / len(mixed) < 0.6
    for changes, message in (
        ({"control_file": None}, "needs a control_file"),
        ({"control_split_percentage": 0}, "needs a control_split"),
    ):
        with pytest.raises(InputError, match=message):
            blocks(replay_percentage=40, **changes)
