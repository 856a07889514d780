"""The recipe: YAML first, the command line over it, every mistake named."""

import pytest

from hf_lm.errors import InputError
from hf_lm.training.arguments import parse_recipe


def test_command_line_wins_over_yaml(recipe):
    model, data, training = parse_recipe(recipe(learning_rate=0.5), ["--learning_rate", "0.25", "--block_size=32"])
    assert training.learning_rate == 0.25
    assert data.block_size == 32
    assert model.vocab_size == 400


def test_yaml_numbers_that_yaml_reads_as_text_are_numbers(recipe):
    path = recipe()
    with open(path, "a") as file:
        file.write("weight_decay: 1e-2\n")  # YAML 1.1 takes this for a string
    assert parse_recipe(path, [])[2].weight_decay == 0.01


def test_config_overrides_as_mapping_and_as_upstreams_string(recipe):
    expected = {"hidden_size": 48, "qk_norm": None, "norm_eps": 0.1}
    overrides = {"hidden_size": 48, "qk_norm": None, "norm_eps": 0.1}
    assert parse_recipe(recipe(config_overrides=overrides), [])[0].config_fields() == expected
    string = "hidden_size=48,qk_norm=null,norm_eps=0.1"
    assert parse_recipe(recipe(), ["--config_overrides", string])[0].config_fields() == expected


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"learning_rte": 1}, [], "learning_rte.*did you mean 'learning_rate'"),
        ({}, ["--trainfile", "x"], "trainfile.*did you mean 'train_file'"),
        ({"max_steps": "many"}, [], "max_steps.*many"),
        ({"max_steps": [1, 2]}, [], "max_steps.*list"),
        ({}, ["--seed", "x"], "seed.*x"),
        ({"lr_scheduler_type": "zigzag"}, [], "zigzag"),
        ({}, ["--config_overrides", "hidden_size"], "hidden_size.*name=value"),
    ],
)
def test_mistakes_are_named_in_one_line(recipe, changes, overrides, message):
    with pytest.raises(InputError, match=message) as error:
        parse_recipe(recipe(**changes), overrides)[0].config_fields()
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        parse_recipe(str(tmp_path / "nowhere.yaml"), [])
    for text in ("- a\n- list\n", "key: [unclosed", "just text"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=r"bad\.yaml"):
            parse_recipe(str(tmp_path / "bad.yaml"), [])
