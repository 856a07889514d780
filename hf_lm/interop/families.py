"""
The families of published checkpoints that the decoder expresses: one table for each, read in both directions.

Forwards (import) a family's configuration becomes the fields of `HfLmConfig`, and its weights get our names and layouts.
Backwards (export) the same rows are read from right to left; whether a family can hold a model is found by reading what
was written forwards again and comparing. README.md in this folder tells how to add a family.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration_hf_lm import ATTENTION_LAYER_TYPES, HfLmConfig
from ..errors import InputError
from .heads import HEADS

# What a model of a family is unless its table says otherwise. (The defaults of HfLmConfig are the from-scratch model.)
PLAIN = {
    "attention_bias": False,
    "attention_out_bias": False,
    "qk_norm": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "layer_types": None,
    "sliding_window": None,
    "position_embedding_type": "rope",
    "rope_interleaved": False,
    "no_rope_layers": None,
    "norm_type": "rmsnorm",
    "norm_bias": False,
    "norm_offset": False,
    "norm_position": "pre",
    "parallel_residual": "none",
    "residual_multiplier": 1.0,
    "mlp_type": "gated",
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "lm_head_bias": False,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "zero_init_residual": False,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}


def rows(text: str) -> dict[str, str | None]:
    """`"a b=c d="` -> our field a is their a, our b is their c, and d they do not have."""
    pairs = (word.partition("=") for word in text.split())
    return {ours: (theirs or None) if sign else ours for ours, sign, theirs in pairs}


# our field: theirs, where most families have the same name for it
SHARED = rows(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings hidden_act tie_word_embeddings initializer_range attention_dropout use_cache "
    "pad_token_id bos_token_id eos_token_id"
)
BIAS = "attention_bias attention_out_bias=attention_bias "
GEMMA = "norm_eps=rms_norm_eps head_dim hidden_act=hidden_activation final_logit_softcapping "
LAYERNORM = {"norm_type": "layernorm", "norm_bias": True}
PLAIN_MLP = {"mlp_type": "plain", "mlp_bias": True}
ALL_BIASES = {"attention_bias": True, "attention_out_bias": True}
# these change training, or nothing but the defaults of `generate`: no reason to refuse an export
WITHOUT_EFFECT_ON_LOGITS = (
    "initializer_range", "zero_init_residual", "embedding_dropout", "residual_dropout", "attention_dropout",
    "classifier_dropout", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
CARRIED_OVER = ("dtype", "torch_dtype", "id2label", "label2id", "problem_type", "quantization_config")


@dataclass(frozen=True)
class Rule:
    """Fields that are not simply copied: `read(their config) -> our fields`, `write(our config) -> their fields`."""

    read: Callable[[PreTrainedConfig], dict[str, Any]]
    write: Callable[[HfLmConfig], dict[str, Any]]


def _window_of(config) -> int | None:
    return config.sliding_window if "sliding_attention" in (config.layer_types or ()) else None


def _write_layer_types(ours: HfLmConfig) -> dict[str, Any]:
    window, sliding = _window_of(ours), [kind == "sliding_attention" for kind in ours.layer_types]
    written = {"layer_types": list(ours.layer_types), "sliding_window": window}
    if window is not None:
        written |= {"use_sliding_window": True, "max_window_layers": sliding.index(True)}
    return written


def _default_scale(ours: HfLmConfig) -> float:
    return ours.attention_multiplier or ours.head_dim**-0.5


def _inverse(value: float) -> float:
    """1 / value, such that the inverse of the inverse is the number that people wrote."""
    return float(f"{1 / value:.15g}")


# every layer slides, or none
ONE_WINDOW = Rule(
    lambda theirs: {"sliding_window": theirs.sliding_window},
    lambda ours: {"sliding_window": _window_of(ours)},
)
LAYER_TYPES = Rule(
    lambda theirs: {"layer_types": list(theirs.layer_types), "sliding_window": _window_of(theirs)},
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
    lambda ours: {"query_pre_attn_scalar": round(_default_scale(ours) ** -2)},
)
GRANITE_SCALES = Rule(
    lambda theirs: {"attention_multiplier": theirs.attention_multiplier, "logit_scale": 1 / theirs.logits_scaling},
    lambda ours: {"attention_multiplier": _default_scale(ours), "logits_scaling": _inverse(ours.logit_scale)},
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


@dataclass(frozen=True)
class Fused:
    """
    One projection that holds queries, keys and values.

    per_head: its rows are the query, key and value of one head after the other; else all queries, all keys, all values.
    """

    per_head: bool


@dataclass(frozen=True)
class Family:
    """
    Args:
        model_type: as in the family's `config.json`.
        architecture: the name of its causal language model in `transformers`.
        fields: our field -> theirs, same value. Two of ours may share one of theirs.
        fixed: our field -> the value that all models of the family have (beyond `PLAIN`).
        rules: fields that need a computation.
        refused: their switches that the decoder does not have; false in all that can be imported.
        weights: the part of their weight's name -> ours, or how it is fused. The rest of a name is the same.
        conv1d: the linear layers (their names) that are stored transposed, as GPT-2's `Conv1D` is.
        base_prefix: their name for `model.`
        token_score: their name for the head of a token classifier.
        load_only: further names, found in published files only: regular expression -> replacement.
        partial_rotary: whether `partial_rotary_factor` has an effect.
        nested_rope: each kind of layer has rotary parameters of its own.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str | None]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    refused: tuple[str, ...] = ()
    weights: Mapping[str, str | Fused] = field(default_factory=dict)
    conv1d: tuple[str, ...] = ()
    base_prefix: str = "model"
    token_score: str = "score"
    load_only: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: bool = False
    nested_rope: bool = False

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return CONFIG_MAPPING[self.model_type]

    def native_class(self, head: str | None) -> type[transformers.PreTrainedModel] | None:
        """Their class with a head (a key of `HEADS`; None: a language model's), None if they have none."""
        if head is None:
            return getattr(transformers, self.architecture)
        task = re.sub(r"(?<!^)(?=[A-Z])", "_", head).upper()
        return getattr(transformers, f"MODEL_{task}_MAPPING").get(self.config_class, None)

    def _field_pairs(self) -> dict[str, str]:
        return {ours: theirs for ours, theirs in (SHARED | dict(self.fields)).items() if theirs is not None}

    def to_hf_lm(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        """
        The fields of `HfLmConfig` that say what their configuration says.

        Raises:
            InputError: an option is on that the decoder does not have.
        """
        for name in self.refused:
            if getattr(theirs, name, None):
                raise InputError(
                    f"{self.model_type}: {name} is {getattr(theirs, name)!r}, which hf_lm cannot express; only "
                    f"checkpoints with {name} false can be imported."
                )
        ours = PLAIN | dict(self.fixed)
        ours |= {name: getattr(theirs, their_name) for name, their_name in self._field_pairs().items()}
        for rule in self.rules:
            ours |= rule.read(theirs)
        if not 0 <= (ours["pad_token_id"] or 0) < ours["vocab_size"]:  # -1 in old checkpoints means none
            ours["pad_token_id"] = None
        if not ours.get("head_dim"):
            ours["head_dim"] = getattr(theirs, "head_dim", None) or ours["hidden_size"] // ours["num_attention_heads"]
        if ours["position_embedding_type"] == "rope":
            ours["rope_parameters"] = deepcopy(theirs.rope_parameters)
            if not self.partial_rotary and ours["rope_parameters"].get("rope_type") == "default":
                ours["rope_parameters"].pop("partial_rotary_factor", None)
        return ours

    def from_hf_lm(self, ours: HfLmConfig) -> PreTrainedConfig:
        """Their configuration, as near to ours as the family comes (see `differences`)."""
        values: dict[str, Any] = {}
        for name, their_name in self._field_pairs().items():
            values.setdefault(their_name, getattr(ours, name))
        known = {item.name for item in fields(self.config_class)}
        for rule in self.rules:
            values |= {name: value for name, value in rule.write(ours).items() if name in known}
        if ours.position_embedding_type == "rope":
            values["rope_parameters"] = self._write_rope(ours)
        return self.config_class(**values, architectures=[self.architecture], dtype=ours.dtype)

    def _write_rope(self, ours: HfLmConfig) -> dict[str, Any]:
        """The rotary parameters, for each kind of layer where the family has them so."""
        rope = deepcopy(ours.rope_parameters)
        nested = any(kind in rope for kind in ATTENTION_LAYER_TYPES)
        if self.nested_rope and not nested:
            return {kind: dict(rope) for kind in ATTENTION_LAYER_TYPES}
        if nested and not self.nested_rope:
            rope = rope[ours.layer_types[0]]
        if self.partial_rotary:
            rope.setdefault("partial_rotary_factor", 1.0)
        return rope

    def differences(self, ours: HfLmConfig) -> dict[str, tuple[Any, Any]]:
        """`{option: (value in this model, the value the family has)}` for all that would change the logits."""
        try:
            native = HfLmConfig(**self.to_hf_lm(self.from_hf_lm(ours)))
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, IndexError) as error:
            return {"config": ("a value", f"none, as {self.config_class.__name__} refuses it ({error})")}
        mine, theirs = _effective(ours), _effective(native)
        return {name: (mine[name], theirs[name]) for name in mine if not _same(mine[name], theirs[name])}


def _effective(config: HfLmConfig) -> dict[str, Any]:
    """The options that have an effect on the logits, so that equal models have equal values."""
    skipped = {"rope_parameters", *WITHOUT_EFFECT_ON_LOGITS}
    values = {name: getattr(config, name) for name in (*PLAIN, *SHARED, "norm_eps", "head_dim") if name not in skipped}
    values |= {"sliding_window": _window_of(config), "attention_multiplier": _default_scale(config)}
    if config.no_rope_layers and all(config.no_rope_layers):
        values["no_rope_layers"] = None
    ropes = config.rope_parameters_by_layer_type()
    values["rope_parameters"] = {
        layer_type: {"partial_rotary_factor": 1.0}
        | {key: value for key, value in rope.items() if value is not None and key != "type"}
        for layer_type, rope in ropes.items()
    }
    return values


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9)
    return one == other


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
    The first family that can hold a model with exactly these options, or the wanted one if it can.

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
    name, options = min(lacking.items(), key=lambda item: len(item[1]))
    if not options:
        return FAMILIES[name]
    listed = "; ".join(f"{option} is {mine!r}, there {theirs!r}" for option, (mine, theirs) in options.items())
    kind = f"a class for {HEADS[head]} and " if head else ""
    raise InputError(
        f"No family of native checkpoints has {kind}all options of this model. The nearest is {name}, but for: {listed}."
    )
