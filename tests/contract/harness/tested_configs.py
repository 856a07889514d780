"""Tiny configurations that reach every branch of the model; those of the contract tests."""

from hf_lm import HfLmConfig

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
# Layers whose output starts at zero, as they do by default, would hide every mistake inside them.
LIVELY = {"zero_init_residual": False}
GATED = {"mlp_type": "gated", "hidden_act": "silu"}

TESTED_CONFIGS = {
    "default": {**LIVELY},
    "llama": {**LIVELY, **GATED, "qk_norm": None, "tie_word_embeddings": False},
    "sliding": {**LIVELY, **GATED, "sliding_window": 4},
    "everything": {
        **LIVELY,
        # With 0.02 at this width the norm after the mlp divides by almost nothing, and the rounding of one training step
        # triples in the next.
        "initializer_range": 0.1,
        "mlp_type": "gated",
        "hidden_act": "gelu_pytorch_tanh",
        "mlp_bias": True,
        "head_dim": 12,
        "attention_bias": True,
        "attention_out_bias": True,
        "qk_norm": "head",
        "attention_multiplier": 0.2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        "rope_interleaved": True,
        "no_rope_layers": [1, 1],
        "norm_offset": True,
        "norm_position": "sandwich",
        "residual_multiplier": 0.7,
        "embedding_multiplier": 5.5,
        "lm_head_bias": True,
        # With 0.5 the gradient norm at the end of the suite's overfitting test is noise: rounding decides whether it passes.
        "logit_scale": 1.5,
        "final_logit_softcapping": 20.0,
    },
    "gemma2": {
        **LIVELY,
        "mlp_type": "gated",
        "hidden_act": "gelu_pytorch_tanh",
        "qk_norm": None,
        "attn_logit_softcapping": 10.0,
        "final_logit_softcapping": 20.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "norm_offset": True,
        "norm_position": "sandwich",
        "embedding_multiplier": 5.5,
    },
    "olmo2": {
        **LIVELY,
        **GATED,
        "qk_norm": "full",
        "norm_position": "post",
        "tie_word_embeddings": False,
        "no_rope_layers": [1, 0],
    },
    "gpt2": {
        **LIVELY,
        "hidden_act": "gelu_new",
        "qk_norm": None,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "norm_type": "layernorm",
        "norm_bias": True,
        "position_embedding_type": "learned",
    },
    "neox": {
        **LIVELY,
        "hidden_act": "gelu",
        "qk_norm": None,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "norm_type": "layernorm",
        "norm_bias": True,
        "parallel_residual": "separate",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
    },
    "cohere": {
        **LIVELY,
        **GATED,
        "qk_norm": None,
        "norm_type": "layernorm",
        "parallel_residual": "shared",
        "rope_interleaved": True,
        "logit_scale": 1.5,
    },
}


def tiny_config(name: str = "default", **changes) -> HfLmConfig:
    """The configuration called `name`, in tiny, with `changes`."""
    return HfLmConfig(**{**TINY, **TESTED_CONFIGS[name], **changes})
