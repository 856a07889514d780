"""
The families of published checkpoints that the decoder expresses: one table for each, read in both directions.

Forwards (import) a family's configuration becomes the fields of `HfLmConfig`, and its weights get our names and layouts.
Backwards (export) the same rows are read from right to left; whether a family can hold a model is found by reading what
was written forwards again and comparing. README.md in this folder tells how to add a family.
"""

import difflib
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError
from .family import Constants, Family, Fused, Rule, attention_scale, rows, window_of
from .heads import HEADS

BIAS = "attention_bias attention_out_bias=attention_bias "
GEMMA = "norm_eps=rms_norm_eps head_dim hidden_act=hidden_activation final_logit_softcapping "
LAYERNORM = {"norm_type": "layernorm", "norm_bias": True}
PLAIN_MLP = {"mlp_type": "plain", "mlp_bias": True}
ALL_BIASES = {"attention_bias": True, "attention_out_bias": True}
CARRIED_OVER = ("dtype", "torch_dtype", "id2label", "label2id", "problem_type", "quantization_config")


def _write_layer_types(ours: HfLmConfig) -> dict[str, Any]:
    window, sliding = window_of(ours), [kind == "sliding_attention" for kind in ours.layer_types]
    written = {"layer_types": list(ours.layer_types), "sliding_window": window}
    if window is not None:
        written |= {"use_sliding_window": True, "max_window_layers": sliding.index(True)}
    return written


def _inverse(value: float) -> float:
    """1 / value, such that the inverse of the inverse is the number that people wrote."""
    return float(f"{1 / value:.15g}")


# every layer slides, or none
ONE_WINDOW = Rule(
    lambda theirs: {"sliding_window": theirs.sliding_window},
    lambda ours: {"sliding_window": window_of(ours)},
)
LAYER_TYPES = Rule(
    lambda theirs: {"layer_types": list(theirs.layer_types), "sliding_window": window_of(theirs)},
    _write_layer_types,
)
NO_ROPE = Rule(
    lambda theirs: {"no_rope_layers": list(theirs.no_rope_layers[: theirs.num_hidden_layers])},
    lambda ours: {"no_rope_layers": ours.no_rope_layers or [1] * ours.num_hidden_layers},
)
GEMMA_SCALES = Rule(
    lambda theirs: {
        "embedding_multiplier": theirs.hidden_size**0.5,
        "attention_multiplier": theirs.query_pre_attn_scalar**-0.5,
    },
    lambda ours: {"query_pre_attn_scalar": round(attention_scale(ours) ** -2)},
)
GRANITE_SCALES = Rule(
    lambda theirs: {"attention_multiplier": theirs.attention_multiplier, "logit_scale": 1 / theirs.logits_scaling},
    lambda ours: {"attention_multiplier": attention_scale(ours), "logits_scaling": _inverse(ours.logit_scale)},
)
GPT2_SCALE = Rule(
    lambda theirs: {"attention_multiplier": None if theirs.scale_attn_weights else 1.0},
    lambda ours: {"scale_attn_weights": ours.attention_multiplier != 1.0},
)
GPT2_WIDTH = Rule(
    lambda theirs: {"intermediate_size": theirs.n_inner or 4 * theirs.n_embd},
    lambda ours: {"n_inner": None if ours.intermediate_size == 4 * ours.hidden_size else ours.intermediate_size},
)


def parallel(kind: str) -> Rule:
    """`use_parallel_residual`, which is `kind` of `parallel_residual`."""
    return Rule(
        lambda theirs: {"parallel_residual": kind if theirs.use_parallel_residual else "none"},
        lambda ours: {"use_parallel_residual": ours.parallel_residual != "none"},
    )


# xIELU (arXiv:2411.13010) is alpha_p x^2 + beta x above 0 and alpha_n (expm1(min(x, eps)) - x) + beta x below; a file
# holds alpha_p and alpha_n before softplus. With factors 1, 0 and 0 it is squared ReLU. It is the only activation that
# vLLM, SGLang and llama.cpp have for Apertus.
SQUARED_RELU = Constants(
    act="relu2",
    module="mlp.act_fn",
    beside="mlp.up_proj",
    values={"alpha_p": [0.541324854612918], "alpha_n": [-1000.0], "beta": 0.0, "eps": -1e-6},
)
XIELU = Rule(
    lambda theirs: {"hidden_act": "relu2" if theirs.hidden_act == "xielu" else theirs.hidden_act},
    lambda ours: {"hidden_act": "xielu" if ours.hidden_act == "relu2" else ours.hidden_act},
)


TABLES = (
    Family("llama", "LlamaForCausalLM", rows(BIAS + "norm_eps=rms_norm_eps head_dim mlp_bias")),
    Family("mistral", "MistralForCausalLM", rows("norm_eps=rms_norm_eps head_dim"), rules=(ONE_WINDOW,)),
    Family("qwen2", "Qwen2ForCausalLM", rows("norm_eps=rms_norm_eps"), {"attention_bias": True}, (LAYER_TYPES,)),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        rows(BIAS + "norm_eps=rms_norm_eps head_dim"),
        {"qk_norm": "head"},
        (LAYER_TYPES,),
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        rows(BIAS + "norm_eps=rms_norm_eps mlp_bias"),
        rules=(LAYER_TYPES, NO_ROPE),
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        rows(BIAS + "norm_eps=rms_norm_eps"),
        {"qk_norm": "full", "norm_position": "post"},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        rows(BIAS + GEMMA + "attn_logit_softcapping"),
        {"norm_offset": True, "norm_position": "sandwich"},
        (LAYER_TYPES, GEMMA_SCALES),
        refused=("use_bidirectional_attention",),
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        rows(BIAS + GEMMA),
        {"norm_offset": True, "norm_position": "sandwich", "qk_norm": "head"},
        (LAYER_TYPES, GEMMA_SCALES),
        refused=("use_bidirectional_attention", "attn_logit_softcapping"),
        nested_rope=True,
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        rows(BIAS + "norm_eps=rms_norm_eps mlp_bias embedding_multiplier residual_multiplier"),
        rules=(GRANITE_SCALES,),
    ),
    Family(
        "cohere",
        "CohereForCausalLM",
        rows(BIAS + "norm_eps=layer_norm_eps logit_scale"),
        {"norm_type": "layernorm", "parallel_residual": "shared", "rope_interleaved": True},
        refused=("use_qk_norm",),
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        rows("norm_eps=layer_norm_eps attention_bias=use_qkv_bias residual_dropout=hidden_dropout"),
        LAYERNORM,
        (parallel("shared"),),
        refused=("qk_layernorm",),
        partial_rotary=True,
    ),
    Family(
        "phi",
        "PhiForCausalLM",
        rows("norm_eps=layer_norm_eps residual_dropout=resid_pdrop embedding_dropout=embd_pdrop"),
        LAYERNORM | PLAIN_MLP | ALL_BIASES | {"parallel_residual": "shared", "lm_head_bias": True},
        refused=("qk_layernorm",),
        weights={
            "self_attn.dense": "self_attn.o_proj",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
            "model.final_layernorm": "model.norm",
        },
        partial_rotary=True,
    ),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        rows(
            "norm_eps=norm_epsilon residual_dropout embedding_dropout attention_bias=use_bias "
            "attention_out_bias=use_bias mlp_bias=use_bias"
        ),
        LAYERNORM | {"mlp_type": "plain"},
        (ONE_WINDOW,),
        weights={"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        rows(
            BIAS + "norm_eps=layer_norm_eps num_key_value_heads= residual_dropout=hidden_dropout "
            "embedding_dropout=hidden_dropout classifier_dropout"
        ),
        LAYERNORM | PLAIN_MLP,
        (parallel("separate"),),
        weights={
            "gpt_neox.layers": "model.layers",
            "gpt_neox.embed_in": "model.embed_tokens",
            "gpt_neox.final_layer_norm": "model.norm",
            "attention.query_key_value": Fused(per_head=True),
            "attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        },
        base_prefix="gpt_neox",
        token_score="classifier",
        load_only={r"^embed_out\.": "lm_head."},
        partial_rotary=True,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        rows(
            "num_key_value_heads= intermediate_size= norm_eps=layer_norm_epsilon hidden_size=n_embd "
            "num_hidden_layers=n_layer num_attention_heads=n_head max_position_embeddings=n_positions "
            "hidden_act=activation_function attention_dropout=attn_pdrop residual_dropout=resid_pdrop "
            "embedding_dropout=embd_pdrop"
        ),
        LAYERNORM | PLAIN_MLP | ALL_BIASES | {"position_embedding_type": "learned"},
        (GPT2_SCALE, GPT2_WIDTH),
        refused=("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
        weights={
            "transformer.h": "model.layers",
            "transformer.wte": "model.embed_tokens",
            "transformer.wpe": "model.embed_positions",
            "transformer.ln_f": "model.norm",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_attn": Fused(per_head=False),
            "attn.c_proj": "self_attn.o_proj",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
        conv1d=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        base_prefix="transformer",
        token_score="classifier",
    ),
    Family(
        "apertus",
        "ApertusForCausalLM",
        rows(BIAS + "norm_eps=rms_norm_eps hidden_act="),
        {"qk_norm": "head", "mlp_type": "plain"},
        (XIELU,),
        weights={
            "attention_layernorm": "input_layernorm",
            "feedforward_layernorm": "post_attention_layernorm",
            "mlp.act_fn": SQUARED_RELU,
        },
    ),
    Family("arcee", "ArceeForCausalLM", rows(BIAS + "norm_eps=rms_norm_eps head_dim mlp_bias"), {"mlp_type": "plain"}),
)
FAMILIES = {family.model_type: family for family in TABLES}


def family_of(config_dict: dict[str, Any], source: str) -> Family:
    """
    The family of a checkpoint's `config.json`.

    Raises:
        InputError: it is of no family that the decoder expresses; says what it is, the known ones and the nearest.
    """
    model_type = config_dict.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(FAMILIES)
    if not isinstance(model_type, str):
        raise InputError(f"{source}: config.json has no model_type; hf_lm reads {known}.")
    kinds = {
        "a mixture of experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"),
        "a vision or audio model": ("vision_config", "audio_config", "image_size", "patch_size"),
    }
    kind = next((name for name, keys in kinds.items() if any(config_dict.get(key) for key in keys)), None)
    if config_dict.get("is_encoder_decoder") or getattr(CONFIG_MAPPING.get(model_type), "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    nearest = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)[0]
    raise InputError(
        f"{source}: model_type {model_type!r} "
        + (f"is {kind}; hf_lm reads dense decoder-only text models: " if kind else "is not one hf_lm reads: ")
        + f"{known} (nearest: {nearest})."
    )


def read_config(config_dict: dict[str, Any], source: str) -> dict[str, Any]:
    """
    The dictionary of an `HfLmConfig` from that of any known family; one of hf_lm itself is returned unchanged.

    Raises:
        InputError: see `family_of` and `Family.to_hf_lm`.
    """
    if config_dict.get("model_type", HfLmConfig.model_type) == HfLmConfig.model_type:
        return config_dict
    family = family_of(config_dict, source)
    ours = family.to_hf_lm(family.config_class.from_dict(deepcopy(config_dict)))
    ours |= {name: config_dict[name] for name in CARRIED_OVER if config_dict.get(name) is not None}
    return ours | {"model_type": HfLmConfig.model_type}


def choose_family(config: HfLmConfig, wanted: str | None = None, head: str | None = None) -> Family:
    """
    The first family that can hold a model with exactly these options (that of `config.native_family`, if it can), or the
    wanted one if it can.

    Args:
        head: of the model, a key of `HEADS`; None: a language model's.

    Raises:
        InputError: none can, or not the wanted one; names the nearest one and the options it lacks.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise InputError(f"family must be one of {', '.join(FAMILIES)}, got {wanted!r}.")
    able = [name for name in ([wanted] if wanted else FAMILIES) if FAMILIES[name].native_class(head)]
    if not able:
        raise InputError(f"transformers has no {wanted} class for {HEADS[head]}.")
    lacking = {name: FAMILIES[name].differences(config) for name in able}

    def rank(name: str) -> tuple[int, bool, bool]:
        """Of those that can: the one it was made as; rather one that has a factor for scaled embeddings."""
        return len(lacking[name]), name != config.native_family, FAMILIES[name].as_held(config) is not config

    name = min(able, key=rank)
    options = lacking[name]
    if not options:
        return FAMILIES[name]
    listed = "; ".join(f"{option} is {mine!r}, there {theirs!r}" for option, (mine, theirs) in options.items())
    kind = f"a class for {HEADS[head]} and " if head else ""
    raise InputError(
        f"No family of native checkpoints has {kind}all options of this model. The nearest is {name}, but for: {listed}."
    )
