"""Every impossible config is refused where it is made, in one line that names the fields, the value and what is right."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from hf_lm import HfLmConfig, HfLmForCausalLM

ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What is given, and what the message has to say.
IMPOSSIBLE = [
    ({"vocab_size": 0}, "vocab_size must be greater than 0, got 0"),
    ({"vocab_size": -5}, "vocab_size must be greater than 0, got -5"),
    ({"hidden_size": 0}, "hidden_size must be greater than 0, got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be greater than 0, got 0"),
    ({"num_attention_heads": 0}, "num_attention_heads must be greater than 0, got 0"),
    ({"num_attention_heads": -4}, "num_attention_heads must be greater than 0, got -4"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be greater than 0, got 0"),
    ({"intermediate_size": 0}, "intermediate_size must be greater than 0, got 0"),
    ({"head_dim": -8}, "head_dim must be greater than 0, got -8"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be greater than 0, got 0"),
    ({"sliding_window": 0}, "sliding_window must be greater than 0, got 0"),
    ({"norm_eps": 0.0}, "norm_eps must be greater than 0, got 0.0"),
    ({"norm_eps": -1e-6}, "norm_eps must be greater than 0, got -1e-06"),
    ({"attention_multiplier": 0.0}, "attention_multiplier must be greater than 0, got 0.0"),
    ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be greater than 0, got -1.0"),
    ({"final_logit_softcapping": 0.0}, "final_logit_softcapping must be greater than 0, got 0.0"),
    ({"logit_scale": 0.0}, "logit_scale must be greater than 0, got 0.0"),
    ({"initializer_range": -0.1}, "initializer_range must be between 0 and 1, got -0.1"),
    ({"attention_dropout": 1.0}, "attention_dropout must be at least 0 and less than 1, got 1.0"),
    ({"residual_dropout": -0.1}, "residual_dropout must be at least 0 and less than 1, got -0.1"),
    (
        {"hidden_size": 30, "num_attention_heads": 4},
        r"hidden_size \(30\) must be a multiple of num_attention_heads \(4\), unless head_dim is given",
    ),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)",
    ),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 8},
        r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(8\)",
    ),
    ({"head_dim": 7}, r"must be even and between 2 and head_dim \(7\), got 7"),
    ({"rope_parameters": {**ROPE, "partial_rotary_factor": 2.0}}, r"between 2 and head_dim \(64\), got 128"),
    ({"rope_parameters": {**ROPE, "rope_theta": -1.0}}, "rope_theta must be greater than 0, got -1.0"),
    ({"rope_parameters": {**ROPE, "rope_theta": 0}}, "rope_theta must be greater than 0, got 0"),
    ({"rope_parameters": {**ROPE, "rope_type": "spiral"}}, "rope_type must be one of default, .*, got 'spiral'"),
    (
        {"rope_parameters": {"full_attention": ROPE}, "sliding_window": 4},
        "rope_parameters has no entry for sliding_attention; it has full_attention",
    ),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "head_dim": 2},
        'rope_type "dynamic" needs more than 2 rotated dimensions a head',
    ),
    (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        "layer_types has 2 entries, but num_hidden_layers is 6",
    ),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries, but num_hidden_layers is 6"),
    (
        {"no_rope_layers": [2] * 6},
        r"no_rope_layers may hold 0 \(no rotary\) and 1 \(rotary\), got \[2, 2, 2, 2, 2, 2\]",
    ),
    (
        {"no_rope_layers": [1] * 6, "position_embedding_type": "learned"},
        'no_rope_layers needs position_embedding_type "rope", got "learned"',
    ),
    (
        {"layer_types": ["linear_attention"] * 6},
        "layer_types may hold full_attention and sliding_attention, got linear_attention",
    ),
    ({"layer_types": ["sliding_attention"] * 6}, "layer_types holds sliding_attention, which needs sliding_window"),
    ({"hidden_act": "rectify"}, "hidden_act must be one of .*relu.*, got 'rectify'"),
    (
        {"parallel_residual": "shared", "norm_position": "post"},
        'parallel_residual "shared" needs norm_position "pre", got "post"',
    ),
    ({"norm_type": "layernorm", "norm_offset": True}, 'norm_offset is for norm_type "rmsnorm" only, got "layernorm"'),
    ({"norm_bias": True}, 'norm_bias is for norm_type "layernorm" only, got "rmsnorm"'),
    ({"pad_token_id": 4096}, r"pad_token_id must be between 0 and vocab_size - 1 \(4095\), got 4096"),
]


@pytest.mark.parametrize(("given", "message"), IMPOSSIBLE, ids=[str(given) for given, _ in IMPOSSIBLE])
def test_impossible_config_is_refused_where_it_is_made(given, message):
    with pytest.raises(ValueError, match=message):
        HfLmConfig(**given)


WRONG_TYPE = [{"hidden_size": "big"}, {"norm_type": "batchnorm"}, {"qk_norm": "half"}, {"mlp_bias": "yes"}]


@pytest.mark.parametrize("given", WRONG_TYPE, ids=str)
def test_wrong_type_or_choice_names_the_field(given):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"field '{next(iter(given))}'.*(\n.*)*expected"):
        HfLmConfig(**given)


def test_impossible_config_in_a_file_is_refused_as_well(tmp_path):
    HfLmConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="multiple of num_key_value_heads"):
        AutoConfig.from_pretrained(tmp_path)


def test_what_is_left_out_follows_from_the_rest():
    config = HfLmConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=2)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (6, 16, 384)
    assert config.layer_types == ["full_attention"] * 2
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    gated = [HfLmConfig(hidden_size=size, mlp_type="gated").intermediate_size for size in (64, 96, 128, 768)]
    assert gated == [192, 256, 352, 2048]  # two thirds of four times, up to a multiple of 32
    assert set(HfLmConfig(sliding_window=8).layer_types) == {"sliding_attention"}


def test_config_survives_a_file(tmp_path):
    config = HfLmConfig(
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=16,
        rope_parameters={"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6}},
        id2label={0: "bad", 1: "good"},
        eos_token_id=[1, 2],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HfLmConfig and loaded.to_diff_dict() == config.to_diff_dict()


def test_lists_of_one_value_follow_the_number_of_layers(tmp_path):
    config = HfLmConfig(num_hidden_layers=2, no_rope_layers=[1, 1])
    config.num_hidden_layers = 3
    assert (config.layer_types, config.no_rope_layers) == (["full_attention"] * 3, [1] * 3)
    config.num_hidden_layers = 1  # as an assistant that leaves early; only a file has to agree
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == ["full_attention"]
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "num_hidden_layers": 4}))  # by a merging tool
    assert AutoConfig.from_pretrained(tmp_path).layer_types == ["full_attention"] * 4
    assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=5).no_rope_layers == [1] * 5


def test_legacy_rope_keys_are_understood():
    config = HfLmConfig(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


def test_tensor_parallel_plan_fits_the_modules():
    for changes in ({}, {"qk_norm": "full"}, {"qk_norm": None, "mlp_type": "gated"}):
        config = HfLmConfig(hidden_size=32, num_hidden_layers=1, **changes)
        names = {name for name, _ in HfLmForCausalLM(config).named_modules()}
        for pattern in config.base_model_tp_plan:
            assert f"model.{pattern.replace('*', '0')}" in names
        assert "base_model_tp_plan" not in config.to_dict()
