"""New models in the shape of a family: from scratch, and back into the family's own class."""

import json

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.interop.convert import to_native
from hf_lm.interop.families import FAMILIES, choose_family
from hf_lm.interop.shapes import new_fields
from hf_lm.planning.plan import plan
from hf_lm.tasks.recipe import parse_recipe

GIVEN = {"vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def fields(architecture: str, **overrides) -> HfLmConfig:
    return HfLmConfig(**new_fields(architecture, overrides, **GIVEN))


@pytest.mark.parametrize("family", FAMILIES)
def test_new_model_of_each_family_is_exported_to_it_with_the_same_logits(family):
    torch.manual_seed(0)
    ours = HfLmForCausalLM(fields(family, **SMALL, zero_init_residual=False)).eval()
    native = to_native(ours)
    assert type(native).__name__ == FAMILIES[family].architecture
    ids = torch.randint(3, 99, (2, 24))
    with torch.no_grad():
        assert (native(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max() <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_size_is_as_in_the_configuration_of_the_family(family):
    theirs, usual = FAMILIES[family].from_hf_lm(fields(family)), transformers.CONFIG_MAPPING[family]()
    for name in ("rms_norm_eps", "layer_norm_eps", "hidden_act", "tie_word_embeddings", "logit_scale", "use_bias"):
        assert getattr(theirs, name, None) == getattr(usual, name, None), name


def test_training_starts_as_in_any_new_model():
    """GPT-2's configuration drops a tenth of everything; a new model drops what its recipe says."""
    config, usual = fields("gpt2", resid_pdrop=0.2), HfLmConfig()
    assert (config.embedding_dropout, config.residual_dropout, config.attention_dropout) == (0.0, 0.2, 0.0)
    assert config.zero_init_residual == usual.zero_init_residual
    assert fields("llama", residual_dropout=0.3).residual_dropout == 0.3


def test_sizes_that_depend_on_others_follow_them():
    config = fields("gemma2", hidden_size=96, num_attention_heads=2)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (48, 2, 256)
    assert config.attention_multiplier == pytest.approx(48**-0.5)
    assert config.embedding_multiplier == 96**0.5
    assert fields("gemma2", query_pre_attn_scalar=256).attention_multiplier == 1 / 16


def test_fields_go_by_the_names_of_the_family():
    config = fields("qwen3", num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=5e5, head_dim=16)
    assert (config.num_key_value_heads, config.norm_eps, config.head_dim) == (2, 1e-5, 16)
    assert config.rope_parameters["rope_theta"] == 5e5
    config = fields("gpt2", n_embd=48, n_layer=3, n_head=3, n_inner=100)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (48, 3, 16)
    assert config.intermediate_size == 100
    assert fields("gpt2", hidden_size=48, norm_eps=1e-3).norm_eps == 1e-3


def test_family_that_others_can_stand_for_is_kept():
    """A Granite whose multipliers are 1 computes what a Llama does."""
    assert choose_family(fields("granite")).model_type == "granite"
    assert choose_family(fields("granite"), "llama").model_type == "llama"


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("lama", {}, r"architecture: must be one of llama, .*, got 'lama'; did you mean 'llama'\?$"),
        ("llama", {"rms_norm_epsilon": 1e-5}, r"LlamaConfig has no field rms_norm_epsilon; did you mean 'rms_norm_eps'\?$"),
        ("gpt2", {"num_key_value_heads": 2}, "config_overrides: GPT2Config has no field num_key_value_heads"),
        ("gpt2", {"n_embd": 32, "hidden_size": 32}, "hidden_size is another name of n_embd, which is there too"),
        ("phi", {"qk_layernorm": True}, "phi: qk_layernorm is True, which hf_lm cannot express"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp of LlamaConfig changes nothing"),
        ("qwen3", {"sliding_window": 16}, "sliding_window of Qwen3Config changes nothing"),
        ("llama", {"hidden_size": 30}, r"hidden_size \(30\) must be a multiple of num_attention_heads"),
        ("llama", {"rms_norm_eps": "small"}, "config_overrides: .*rms_norm_eps"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(architecture, overrides, message):
    with pytest.raises(InputError, match=message) as raised:
        new_fields(architecture, overrides, **GIVEN)
    assert "\n" not in str(raised.value)


def test_recipe_trains_a_qwen3_that_is_exported_natively(recipe, tmp_path, capsys):
    path = recipe(architecture="qwen3", config_overrides={**SMALL, "num_key_value_heads": 1, "rms_norm_eps": 1e-5})
    assert main(["train", path]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["architecture"] == "qwen3"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "native")]) == 0
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    assert (written["rms_norm_eps"], written["num_key_value_heads"]) == (1e-5, 1)
    ours = HfLmForCausalLM.from_pretrained(tmp_path / "run")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (native(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max() <= 1e-6


def test_plan_knows_the_architecture(recipe):
    shapes = {}
    for architecture in ("llama", "gpt2", None):
        path = recipe(architecture=architecture)
        shapes[architecture] = plan(*parse_recipe(path, []), hardware="H100")["parameters"]["total"]
    assert len(set(shapes.values())) == 3


def test_architecture_is_for_new_models(recipe, capsys):
    assert main(["train", recipe(architecture="llama", model_name_or_path="gpt2")]) == 2
    assert "architecture: is for a new model" in capsys.readouterr().err
    assert main(["train", recipe(architecture="qwen4")]) == 2
    assert "did you mean 'qwen3'" in capsys.readouterr().err
    assert main(["train", recipe(model_family="llama")]) == 2
    assert "did you mean 'architecture'" in capsys.readouterr().err
