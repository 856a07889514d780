"""Whatever a model folder, a checkpoint or a recipe brings along, no command runs any of it, unless told to trust it."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml

USES = (
    ("score", "model", "the whale"), ("generate", "model", "--max-new-tokens", "2"), ("doctor", "model"),
    ("evaluate", "model", "--data", "text.txt"), ("import", "model", "../written/imported"), ("chat", "model"),
    ("export", "model", "../written/native"), ("card", "model", "--output", "../written/README.md"),
    ("push", "model", "owner/name", "--dry-run"), ("train", "recipe.yaml"),
)  # fmt: skip
CODE = "open('EXECUTED', 'w').close()\n"  # what the watched process reports as a change of its folder


class Payload:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


PICKLE = pickle.dumps({"model.norm.weight": Payload()})


def edit(path: Path, **values) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def pickled_weights_beside_good_ones(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "flax_model.msgpack"):
        (folder / name).write_bytes(PICKLE)


def index_of_pickles(folder: Path) -> None:
    pickled_weights(folder)
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        edit(folder / name, weight_map={"model.norm.weight": "pytorch_model.bin"})


def pickle_by_a_safe_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(PICKLE)


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(PICKLE)
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="model", target_modules=["q_proj"])


def other_code_of_our_architecture(folder: Path) -> None:
    for path in folder.glob("*.py"):
        path.write_text(CODE + path.read_text())


def code_of_an_unknown_architecture(folder: Path) -> None:
    (folder / "evil.py").write_text(CODE)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    edit(folder / "config.json", model_type="evil", auto_map=dict.fromkeys(classes, "evil.Evil"))


def code_of_a_tokenizer(folder: Path) -> None:
    (folder / "evil.py").write_text(CODE)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )


def code_of_generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE + "def generate(*args, **kwargs): return args[1]\n")


def kernel_of_the_hub(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="owner/kernel", _attn_implementation="owner/kernel")


def module_beside_the_data(folder: Path) -> None:
    """The folder that commands run in is not where Python looks for modules."""
    for name in ("torch.py", "yaml.py", "sitecustomize.py", "model.py", "tokenizers.py"):
        (folder.parent / name).write_text(CODE)


def template_that_looks_around(folder: Path) -> None:
    template = (
        "{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    )
    (folder / "chat_template.jinja").write_text(template)


HOSTILE = (
    pickled_weights, pickled_weights_beside_good_ones, index_of_pickles, pickle_by_a_safe_name, pickled_adapter,
    other_code_of_our_architecture, code_of_an_unknown_architecture, code_of_a_tokenizer, code_of_generation,
    kernel_of_the_hub, module_beside_the_data, template_that_looks_around,
)  # fmt: skip
RECIPE = {
    "train_file": "text.txt", "model_name_or_path": "model", "max_steps": 2, "save_steps": 1, "block_size": 16,
    "output_dir": "../written/run", "report_to": "none", "config_overrides": "num_hidden_layers=2",
}  # fmt: skip


def lay_out(machine, good_model: Path) -> Path:
    work = machine.new_work()
    (work / "text.txt").write_bytes(b"the whale and the sea\n" * 20)
    (work / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return Path(shutil.copytree(good_model, work / "model"))


@pytest.mark.parametrize(
    "use", [pytest.param(use, id=use[0], marks=() if use[0] == "generate" else pytest.mark.slow) for use in USES]
)
@pytest.mark.parametrize("plant", HOSTILE, ids=lambda plant: plant.__name__)
def test_nothing_in_a_model_folder_is_executed(machine, good_model, plant, use):
    plant(lay_out(machine, good_model))
    machine(*use, stdin="hello\n").check()


@pytest.mark.parametrize("template", [
    pytest.param("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", marks=pytest.mark.slow),
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ 'x' * 10 ** 11 }}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{{ raise_exception('a\\nb') }}",
    "{% if %}",
    "{% include '/etc/passwd' %}",
])  # fmt: skip
def test_a_chat_template_cannot_hold_or_harm_the_chat(machine, good_model, template):
    folder = lay_out(machine, good_model)
    (folder / "chat_template.jinja").write_text(template)
    outcome = machine("chat", "model", stdin="hello\n")
    outcome.check()
    assert "chat template: " in outcome.stderr and len(outcome.stderr.splitlines()) == 1, outcome.stderr


@pytest.mark.parametrize("tag", [
    "!!python/object/apply:os.system ['touch EXECUTED']",
    "!!python/object/new:os.system ['touch EXECUTED']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [a]",
])  # fmt: skip
@pytest.mark.parametrize("key", ["seed", "config_overrides"])
def test_python_in_a_recipe_is_refused(machine, good_model, tag, key):
    lay_out(machine, good_model)
    value = tag if key == "seed" else f'"hidden_size={tag}"'
    others = {name: value for name, value in RECIPE.items() if name != key}
    (machine.folder / "work" / "recipe.yaml").write_text(yaml.safe_dump(others) + f"{key}: {value}\n")
    outcome = machine("train", "recipe.yaml")
    outcome.check()
    assert outcome.code == 2 and "python/" in outcome.stderr, outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint_are_not_executed(machine, good_model, tmp_path, name):
    """Not even where whoever planted them has written a manifest that fits."""
    lay_out(machine, good_model)
    assert machine("train", "recipe.yaml").code == 0
    run = Path(shutil.copytree(machine.folder / "written" / "run", tmp_path / "run"))
    shutil.rmtree(run / "checkpoint-2")
    planted = run / "checkpoint-1" / name
    planted.write_bytes(PICKLE)
    manifest = json.loads((planted.parent / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(PICKLE), "sha256": hashlib.sha256(PICKLE).hexdigest()}
    (planted.parent / "manifest.json").write_text(json.dumps(manifest))
    outcome = machine("train", "recipe.yaml", "--resume", written=run)
    assert not outcome.hung and not outcome.events and "Traceback" not in outcome.stderr
    assert outcome.code == (0 if name == "training_args.bin" else 2)
    assert name in outcome.stderr.splitlines()[-1] or outcome.code == 0
