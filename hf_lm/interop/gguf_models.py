"""
Which models a GGUF file holds, and their configuration and weights under llama.cpp's names.

`MODELS` has one row for each family. A row says what llama.cpp computes for this architecture, as read from its sources
(`src/models/*.cpp`); a model with other options is refused by name. The names of the tensors are those of the package gguf.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError
from ..modeling_hf_lm import HfLmRotaryEmbedding
from .families import FAMILIES, SQUARED_RELU, choose_family
from .family import attention_scale
from .gguf_types import type_of

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
GELU = (*TANH_GELU, "gelu")  # of the last one, llama.cpp computes the tanh form
SCALED = ("linear", "yarn")  # by keys of the file, in all architectures
WITH_FACTORS = (*SCALED, "llama3")  # and by a tensor of factors, where llama.cpp reads one


def default_scale(config: HfLmConfig) -> float:
    return config.head_dim**-0.5


def window_period(config: HfLmConfig) -> int | None:
    """`n` such that all but each n-th layer slide; None if the layers are ordered otherwise."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    periods = range(1, len(slides) + 2)
    return next((n for n in periods if slides == [i % n < n - 1 for i in range(len(slides))]), None)


def rope_of(config: HfLmConfig, layer_type: str) -> dict[str, Any]:
    """The rotary parameters of a kind of layer; those of the other kind if there is no such layer."""
    ropes = config.rope_parameters_by_layer_type()
    return ropes.get(layer_type) or next(iter(ropes.values()))


@dataclass(frozen=True, eq=False)
class GgufModel:
    """
    How llama.cpp's implementation of an architecture computes a family of models.

    Args:
        family: a key of `FAMILIES`.
        architecture: `general.architecture` of the file.
        activations: values of `hidden_act`.
        biases: fields of `HfLmConfig` for biases that may be on.
        needs_biases: every linear layer must have a bias; zeros are written where the model has none.
        head: whether `output.weight` is "optional" (absent when tied), "required" (a copy when tied) or must be "tied".
        fused_qkv: queries, keys and values are one tensor.
        rotates_neighbours: the rotary embedding pairs neighbouring elements of a head, not those half a head apart.
        rope_types: values of `rope_type` besides "default".
        partial_rotary: a part of a head may stay unrotated.
        any_head_dim: heads need not be as wide as hidden_size / num_attention_heads.
        windows: how layers with a sliding window are said: "none"; or all but each n-th one slide: "period".
        own_sliding_rope: sliding layers have a rotary base of their own, and no scaling.
        attention_scale: what the attention's logits are multiplied with; None if a key of the file says it.
        needs: options that must be on.
        fixed: option -> its only value, a function of the configuration.
        keys: method of `GGUFWriter` -> the value it writes; None is not written.
    """

    family: str
    architecture: str
    activations: tuple[str, ...] = SILU
    biases: tuple[str, ...] = ()
    needs_biases: bool = False
    head: str = "optional"
    fused_qkv: bool = False
    rotates_neighbours: bool = False
    rope_types: tuple[str, ...] = SCALED
    partial_rotary: bool = False
    any_head_dim: bool = False
    windows: str = "none"
    own_sliding_rope: bool = False
    attention_scale: Callable[[HfLmConfig], float] | None = default_scale
    needs: tuple[str, ...] = ()
    fixed: Mapping[str, Callable[[HfLmConfig], Any]] = field(default_factory=dict)
    keys: Mapping[str, Callable[[HfLmConfig], Any]] = field(default_factory=dict)

    def differences(self, config: HfLmConfig) -> dict[str, tuple[Any, Any]]:
        """`{option: (value in this model, what llama.cpp computes)}` for all that a file cannot say."""
        found = {}
        if config.hidden_act not in self.activations:
            found["hidden_act"] = (config.hidden_act, self.activations[0])
        for name in ("attention_bias", "attention_out_bias", "mlp_bias", "lm_head_bias"):
            if getattr(config, name) and name not in self.biases:
                found[name] = (True, False)
        if not self.any_head_dim and config.head_dim * config.num_attention_heads != config.hidden_size:
            found["head_dim"] = (config.head_dim, config.hidden_size / config.num_attention_heads)
        if self.head == "tied" and not config.tie_word_embeddings:
            found["tie_word_embeddings"] = (False, True)
        found |= {name: (None, "a number") for name in self.needs if not getattr(config, name)}
        for name, value_of in self.fixed.items():
            if getattr(config, name) != value_of(config):
                found[name] = (getattr(config, name), value_of(config))
        if self.attention_scale is not None:
            mine, theirs = attention_scale(config), self.attention_scale(config)
            if not math.isclose(mine, theirs, rel_tol=1e-6):
                found["attention_multiplier"] = (mine, theirs)
        if self.windows == "period" and window_period(config) is None:
            found["layer_types"] = (config.layer_types, "all but each n-th layer sliding")
        if config.position_embedding_type == "rope":
            found |= self._rope_differences(config)
        return found

    def _rope_differences(self, config: HfLmConfig) -> dict[str, tuple[Any, Any]]:
        rope, sliding = (rope_of(config, kind) for kind in ("full_attention", "sliding_attention"))
        known = ("default", *self.rope_types)
        if rope["rope_type"] not in known:
            return {"rope_type": (rope["rope_type"], " or ".join(known))}
        if self.own_sliding_rope and sliding["rope_type"] != "default":
            return {"rope_type of the sliding layers": (sliding["rope_type"], "default")}
        if not self.own_sliding_rope and sliding != rope:
            return {"rope_parameters of the sliding layers": (sliding, rope)}
        factor = rope.get("partial_rotary_factor") or 1.0
        if factor != 1.0 and not self.partial_rotary:
            return {"partial_rotary_factor": (factor, 1.0)}
        if rope["rope_type"] == "yarn":
            plain = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
            given = {name: rope.get(name) for name in plain}
            return {name: (given[name], plain[name]) for name in plain if given[name] not in (None, plain[name])}
        return {}

    def notes(self, config: HfLmConfig) -> list[str]:
        """What llama.cpp computes nearly, not exactly, or within limits."""
        notes = []
        if config.hidden_act == "gelu":
            notes.append("llama.cpp computes hidden_act gelu in its tanh form")
        if self.context_length(config) < config.max_position_embeddings:
            notes.append(
                f"context_length is sliding_window, {config.sliding_window} tokens, since llama.cpp's "
                f"{self.architecture} has no window"
            )
        return notes

    def context_length(self, config: HfLmConfig) -> int:
        """As many tokens as fit into one window if llama.cpp has none: with them, a window changes nothing."""
        if self.windows == "none" and "sliding_attention" in config.layer_types:
            return min(config.sliding_window, config.max_position_embeddings)
        return config.max_position_embeddings


def xielu(name: str) -> Callable[[HfLmConfig], list[float]]:
    """One of the constants that make xIELU the squared ReLU, for each layer; llama.cpp applies softplus to the alphas."""
    value = SQUARED_RELU.values[name]
    return lambda config: (value if isinstance(value, list) else [value]) * config.num_hidden_layers


def gemma_scale(layers_of_27b: int) -> Callable[[HfLmConfig], float]:
    """The scale of the attention's logits, which llama.cpp chooses by the number of layers."""

    def scale(config: HfLmConfig) -> float:
        is_27b = config.num_hidden_layers == layers_of_27b
        return (config.hidden_size // config.num_attention_heads if is_27b else config.head_dim) ** -0.5

    return scale


GEMMA = {
    "activations": GELU,
    "head": "tied",
    "any_head_dim": True,
    "windows": "period",
}
GEMMA_KEYS = {
    "sliding_window": lambda config: config.sliding_window,
    "sliding_window_pattern": window_period,
    "final_logit_softcapping": lambda config: config.final_logit_softcapping,
}
MODELS = (
    GgufModel(
        "llama",
        "llama",
        biases=("attention_bias", "attention_out_bias", "mlp_bias"),
        rotates_neighbours=True,
        rope_types=WITH_FACTORS,
        any_head_dim=True,
    ),
    GgufModel("mistral", "llama", rotates_neighbours=True, any_head_dim=True),
    GgufModel("qwen2", "qwen2", biases=("attention_bias",)),
    GgufModel("qwen3", "qwen3", any_head_dim=True),
    GgufModel(
        "smollm3",
        "smollm3",
        rotates_neighbours=True,
        fixed={"no_rope_layers": lambda config: [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]},
    ),
    GgufModel("olmo2", "olmo2", head="required"),
    GgufModel(
        "gemma2",
        "gemma2",
        **GEMMA,
        attention_scale=gemma_scale(46),
        needs=("attn_logit_softcapping", "final_logit_softcapping"),
        keys=GEMMA_KEYS | {"attn_logit_softcapping": lambda config: config.attn_logit_softcapping},
    ),
    GgufModel(
        "gemma3_text",
        "gemma3",
        **GEMMA,
        rope_types=("linear",),
        own_sliding_rope=True,
        attention_scale=gemma_scale(62),
        keys=GEMMA_KEYS | {"rope_freq_base_swa": lambda config: rope_of(config, "sliding_attention")["rope_theta"]},
    ),
    GgufModel(
        "granite",
        "granite",
        biases=("attention_bias", "attention_out_bias", "mlp_bias"),
        rotates_neighbours=True,
        rope_types=WITH_FACTORS,
        any_head_dim=True,
        attention_scale=None,
        keys={
            "embedding_scale": lambda config: config.embedding_multiplier,
            "attention_scale": attention_scale,
            "residual_scale": lambda config: config.residual_multiplier,
            "logit_scale": lambda config: 1 / config.logit_scale,
        },
    ),
    GgufModel(
        "cohere",
        "command-r",
        head="tied",
        rotates_neighbours=True,
        keys={"logit_scale": lambda config: config.logit_scale},
    ),
    GgufModel("stablelm", "stablelm", biases=("attention_bias",), head="required", partial_rotary=True),
    GgufModel(
        "phi",
        "phi2",
        GELU,
        biases=("attention_bias", "attention_out_bias", "mlp_bias", "lm_head_bias"),
        head="required",
        partial_rotary=True,
    ),
    GgufModel(
        "starcoder2",
        "starcoder2",
        GELU,
        biases=("attention_bias", "attention_out_bias", "mlp_bias"),
        needs_biases=True,
    ),
    GgufModel(
        "gpt_neox",
        "gptneox",
        GELU,
        biases=("attention_bias", "attention_out_bias", "mlp_bias"),
        needs_biases=True,
        head="required",
        fused_qkv=True,
        partial_rotary=True,
        keys={"parallel_residual": lambda config: config.parallel_residual != "none"},
    ),
    GgufModel(
        "gpt2",
        "gpt2",
        GELU,
        biases=("attention_bias", "attention_out_bias", "mlp_bias"),
        fused_qkv=True,
    ),
    GgufModel(
        "apertus",
        "apertus",
        ("relu2",),
        biases=("attention_bias", "attention_out_bias"),
        head="required",
        rope_types=WITH_FACTORS,
        keys={f"xielu_{name}": xielu(name) for name in SQUARED_RELU.values},
    ),
    GgufModel("arcee", "arcee", ("relu2",), rotates_neighbours=True, rope_types=WITH_FACTORS, any_head_dim=True),
)


def gguf_model(config: HfLmConfig) -> GgufModel:
    """
    The row of a model.

    Raises:
        InputError: it has options that llama.cpp does not have.
    """
    fitting = [row for row in MODELS if not FAMILIES[row.family].differences(config)]
    if not fitting:
        family = choose_family(config).model_type
        known = ", ".join(dict.fromkeys(row.family for row in MODELS))
        raise InputError(f"GGUF export is for models of {known}; this one is of {family}.")
    lacking = {row: row.differences(FAMILIES[row.family].as_held(config)) for row in fitting}
    row = min(lacking, key=lambda row: (len(lacking[row]), FAMILIES[row.family].as_held(config) is not config))
    if options := lacking[row]:
        listed = "; ".join(f"{option} is {mine!r}, there {theirs!r}" for option, (mine, theirs) in options.items())
        raise InputError(f"GGUF export: llama.cpp's {row.architecture} lacks options of this model: {listed}.")
    return row


def add_config(writer, row: GgufModel, config: HfLmConfig, file_type: int, name: str) -> None:
    """The configuration, under llama.cpp's names."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(row.context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm_type == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    for method, value_of in row.keys.items():
        if (value := value_of(config)) is not None:
            getattr(writer, f"add_{method}")(value)
    if config.position_embedding_type == "rope":
        _add_rope(writer, config)


def _add_rope(writer, config: HfLmConfig) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config, "full_attention")
    writer.add_rope_dimension_count(int(config.head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in SCALED:
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        _, scaling = ROPE_INIT_FUNCTIONS["yarn"](_flat(config))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(scaling / (0.1 * math.log(rope["factor"]) + 1))  # llama.cpp has the rest


def _flat(config: HfLmConfig) -> HfLmConfig:
    """With the rotary parameters of the full layers as the only ones."""
    return type(config)(**(config.to_dict() | {"rope_parameters": rope_of(config, "full_attention")}))


def rope_factors(config: HfLmConfig) -> torch.Tensor:
    """What llama.cpp divides each of the unscaled frequencies by, shape `(rotated dims / 2,)`."""
    flat = _flat(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[flat.rope_parameters["rope_type"]](flat)
    return HfLmRotaryEmbedding.compute_default_rope_parameters(flat)[0] / scaled


def pair_neighbours(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, such that the pairs that are rotated become neighbours."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def tensors(row: GgufModel, model: PreTrainedModel):
    """
    All weights of an hf_lm model as llama.cpp wants them.

    Yields:
        Its name of each tensor, and the tensor in float32.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, get_tensor_name_map

    config, weights = model.config, model.state_dict()
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == row.architecture)
    names = get_tensor_name_map(MODEL_ARCH(architecture), config.num_hidden_layers)
    if config.tie_word_embeddings and row.head != "required":
        del weights["lm_head.weight"]
    if row.needs_biases:
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(weights[name])))

    def converted(name: str) -> np.ndarray:
        tensor = weights[name].float().numpy()
        if config.norm_offset and name.endswith("norm.weight"):
            return tensor + 1
        is_query, is_key = (f"{part}." in name for part in QKV[:2])
        if (is_query or is_key) and row.rotates_neighbours and not config.rope_interleaved:
            return pair_neighbours(tensor, config.num_attention_heads if is_query else config.num_key_value_heads)
        return tensor

    for name in weights:
        stem, _, suffix = name.rpartition(".")
        if not (row.fused_qkv and stem.endswith(QKV)):
            yield f"{names.get_name(stem)}.{suffix}", converted(name)
        elif stem.endswith(QKV[0]):
            fused = np.concatenate([converted(name.replace(QKV[0], part)) for part in QKV])
            yield f"{TENSOR_NAMES[MODEL_TENSOR.ATTN_QKV].format(bid=int(name.split('.')[2]))}.{suffix}", fused
    if config.position_embedding_type == "rope" and rope_of(config, "full_attention")["rope_type"] == "llama3":
        yield f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight", rope_factors(config).numpy()


def add_tensors(writer, row: GgufModel, model: PreTrainedModel, dtype: str) -> None:
    """All weights of an hf_lm model, in the type asked for."""
    from gguf import quants

    for name, tensor in tensors(row, model):
        kind = type_of(dtype, name, tensor, model.config.tie_word_embeddings)
        writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
