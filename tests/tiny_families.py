"""Tiny random models of every family, for the tests of the decoder's and the checkpoints' equivalence."""

import torch
import transformers

from hf_lm.interop.families import FAMILIES, SQUARED_RELU

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {"num_key_value_heads": 4}
# The options of each family that change what is computed, one row for each test case beyond the family's defaults.
OPTIONS = {
    "llama": [{}, MHA, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12}, {"hidden_act": "gelu"}],
    "mistral": [{"sliding_window": 5}, {"sliding_window": None, "head_dim": 16}],
    "qwen2": [{}, MHA, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}],
    "qwen3": [
        {"head_dim": 16},
        {"attention_bias": True, "head_dim": 16},
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ],
    "smollm3": [
        {"no_rope_layer_interval": 2},
        {"no_rope_layers": [1, 0, 0], "attention_bias": True, "mlp_bias": True},
        {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0, 1]},
    ],
    "olmo2": [{}, MHA, {"attention_bias": True}],
    "gemma2": [
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "attn_logit_softcapping": 5.0},
        {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": None, "attention_bias": True},
    ],
    "gemma3_text": [
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "sliding_window_pattern": 2},
        {"head_dim": 16, "sliding_window": 4, "final_logit_softcapping": 3.0, "attention_bias": True},
    ],
    "granite": [
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 13.0,
        },
        {"attention_bias": True, "mlp_bias": True} | MHA,
    ],
    "cohere": [{"logit_scale": 0.25}, {"attention_bias": True} | MHA],
    "stablelm": [{}, MHA, {"use_qkv_bias": True, "partial_rotary_factor": 0.5}, {"use_parallel_residual": True}],
    "phi": [{}, MHA, {"partial_rotary_factor": 0.25, "hidden_act": "gelu_pytorch_tanh"}],
    "starcoder2": [{}, {"use_bias": False, "sliding_window": 5} | MHA],
    "gpt_neox": [{}, {"attention_bias": False, "rotary_pct": 0.5}, {"use_parallel_residual": False}],
    "apertus": [{}, MHA, {"attention_bias": True, "hidden_act": "gelu"}],
    "arcee": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 12}],
    "gpt2": [{}, {"n_inner": 40}, {"scale_attn_weights": False, "activation_function": "gelu"}],
}
DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "attention_dropout", "summary_first_dropout")
CASES = [
    (family, options | {"tie_word_embeddings": tied})
    for family in FAMILIES
    for options in OPTIONS[family]
    for tied in (True, False)
]


def case_name(value) -> str | None:
    """For `pytest.mark.parametrize(ids=...)`."""
    if isinstance(value, dict):
        return ",".join(f"{key}={value}" for key, value in value.items())
    return None


def tiny_config(family: str, **options) -> transformers.PreTrainedConfig:
    """A configuration of the family with our sizes; nothing is dropped."""
    config_class = transformers.CONFIG_MAPPING[family]
    sizes = {config_class.attribute_map.get(key, key): value for key, value in SIZES.items()}
    for ours, theirs in FAMILIES[family].fields.items():
        if theirs is None:  # a size that the family has no option for
            sizes.pop(ours, None)
    dropouts = {name: 0.0 for name in DROPOUTS if hasattr(config_class, name)}
    return config_class(**(sizes | dropouts | options))


def is_constant(name: str) -> bool:
    """Whether a weight of theirs has one value in all models that the decoder expresses."""
    return f"{SQUARED_RELU.module}." in name


def set_constants(model: transformers.PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if is_constant(name):
            tensor.copy_(torch.tensor(SQUARED_RELU.values[name.rpartition(".")[2]]))


def tiny_model(family: str, seed: int = 0, **options) -> transformers.PreTrainedModel:
    """The library's model in evaluation mode, with every weight drawn at random: norms and biases, too."""
    architecture = getattr(transformers, FAMILIES[family].architecture)
    config = tiny_config(family, **options)
    config.architectures = [architecture.__name__]
    model = architecture(config)
    generator, has_offset = torch.Generator().manual_seed(seed), FAMILIES[family].fixed.get("norm_offset")
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator) * (0.3 if is_norm else 0.2)
        parameter.data = noise + (1.0 if is_norm and not has_offset else 0.0)
    set_constants(model)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=None)
    return model.eval()
