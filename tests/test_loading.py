"""`import hf_lm` registers the classes whoever starts Python; `load_model` and `load_tokenizer` check what they load."""

import subprocess
import sys
import tomllib

import pytest
import torch
from helpers.models import book_tokenizer, save_small_model

import hf_lm
from hf_lm.errors import InputError

REGISTERED = "import transformers; print('hf_lm' in transformers.CONFIG_MAPPING)"


def answer(*command: str, folder=None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.strip()


@pytest.mark.parametrize("command", [["-m", "pkg.train"], ["-m", "pkg.train", "-m", "hf_lm"], ["pkg/train.py"]])
def test_a_package_or_script_that_imports_hf_lm_registers_it(command, tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("import hf_lm\n")
    (tmp_path / "pkg" / "train.py").write_text(f"import hf_lm\n{REGISTERED}\n")
    assert answer(sys.executable, *command, folder=tmp_path) == "True"


PLUGIN = """
import sys
from importlib.metadata import EntryPoint
EntryPoint(*sys.argv[1:]).load()()
import transformers
print(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("hf_lm")).__class__.__name__)
"""
VLLM = """
class ModelRegistry:
    @staticmethod
    def register_model(architecture, model_class):
        print(architecture, model_class)
"""


def test_vllm_finds_the_architecture_by_its_entry_point(repository, tmp_path):
    """As vLLM calls the plugin: loaded by name, without `import hf_lm`. Without vLLM it does no harm."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    command = sys.executable, "-c", PLUGIN, name, value, "vllm.general_plugins"
    assert answer(*command, folder=tmp_path) == "HfLmForCausalLM"
    (tmp_path / "vllm.py").write_text(VLLM, encoding="utf-8")
    first, second = answer(*command, folder=tmp_path).splitlines()
    assert first == "HfLmForCausalLM vllm.model_executor.models.transformers:TransformersForCausalLM"
    assert second == "HfLmForCausalLM"


def test_help_of_the_module_imports_neither_torch_nor_transformers():
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hf_lm", "--help"], capture_output=True, text=True, check=True
    )
    names = {line.rpartition("|")[2].strip() for line in imported.stderr.splitlines()}
    assert "hf_lm.cli" in names and not names & {"torch", "transformers"}


def test_model_and_tokenizer_are_loaded_in_one_call_each(tmp_path):
    tokenizer = book_tokenizer()
    save_small_model(tmp_path, tokenizer)
    model = hf_lm.load_model(str(tmp_path), dtype="bfloat16")
    assert type(model) is hf_lm.HfLmForCausalLM and model.dtype == torch.bfloat16 and not model.training
    assert hf_lm.load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InputError, match="missing: score.weight"):
        hf_lm.load_model(str(tmp_path), "AutoModelForSequenceClassification")


def test_what_cannot_be_loaded_is_named(tiny_model, tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        hf_lm.load_model(str(tmp_path / "nothing"))
    tiny_model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no weights"):
        hf_lm.load_model(str(tmp_path))
    with pytest.raises(InputError, match="there is no tokenizer"):
        hf_lm.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", ['"x"', '["x", 1]', "1.5"])
def test_special_tokens_that_are_no_numbers_are_named(tiny_model, tmp_path, value):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(InputError, match="generation_config.json: eos_token_id must be a token's number, got"):
        hf_lm.load_model(str(tmp_path))
