"""Traps of the libraries that no other test names: what upstream does silently, the commands refuse or say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def drop_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight", None))


NORM = "model.layers.1.input_layernorm.weight"
UNFIT = {
    "a tensor is missing": (lambda folder: edit_weights(folder, lambda tensors: tensors.pop(NORM)), NORM),
    "the head is missing": (drop_head, "lm_head.weight"),
    "another shape": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({NORM: tensors[NORM][:8].clone()})),
        rf"{re.escape(NORM)} \(8,\) instead of \(16,\)",
    ),
    "a layer more": (lambda folder: edit_config(folder, num_hidden_layers=3, layer_types=None), r"model\.layers\.2\."),
    "ten million layers": (
        lambda folder: edit_config(folder, num_hidden_layers=10**7, layer_types=None),
        r"config\.json: num_hidden_layers 10000000 do not fit the weights: \d+ tensors",
    ),
    "a vocabulary larger than memory": (
        lambda folder: edit_config(folder, vocab_size=2**31),
        r"config\.json: vocab_size 2147483648 and hidden_size 16 do not fit the weights",
    ),
}


@pytest.mark.parametrize("family", ["hf_lm", "llama"])
@pytest.mark.parametrize(("damage", "message"), UNFIT.values(), ids=UNFIT)
def test_weights_that_do_not_fit_are_an_error_in_any_family(machine, good_model, llama, family, damage, message):
    """Upstream: random weights and a warning; or hours of building what cannot be."""
    folder = Path(shutil.copytree(good_model if family == "hf_lm" else llama, machine.new_work() / "model"))
    damage(folder)
    outcome = machine("score", "model", "the whale")
    outcome.check()
    assert outcome.code == 2 and re.search(message, outcome.stderr), outcome.stderr


@pytest.mark.parametrize("family", ["hf_lm", "llama"])
def test_token_beyond_the_vocabulary_is_named(machine, good_model, llama, family):
    """Upstream: "index out of range in self"."""
    folder = Path(shutil.copytree(good_model if family == "hf_lm" else llama, machine.new_work() / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = dict(tokenizer["added_tokens"][0], id=262, content="the whale")
    tokenizer["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = machine("score", "model", "the whale")
    outcome.check()
    assert outcome.code != 0 and ("262" if family == "hf_lm" else "vocabulary") in outcome.stderr, outcome.stderr


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_is_one_process_as_the_readme_says(repository, tmp_path):
    """Upstream starts one process and says nothing. When that changes, so must the README."""
    (tmp_path / "script.py").write_text("import os\nprint('processes:', os.environ.get('WORLD_SIZE', '1'))\n")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    result = subprocess.run([*launch, str(tmp_path / "script.py")], capture_output=True, text=True, env=os.environ)
    assert result.stdout.count("processes: 1") == 1, result
    assert (
        "`accelerate launch --cpu --num_processes 2` is silently one process" in (repository / "README.md").read_text()
    )
