"""
One family of checkpoints as a table that is read in both directions: its configuration and weights, and ours.

`families.py` holds the tables of all families.
"""

import math
import re
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration_hf_lm import ATTENTION_LAYER_TYPES, HfLmConfig
from ..errors import InputError

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
# these change training, or nothing but the defaults of `generate`: no reason to refuse an export
WITHOUT_EFFECT_ON_LOGITS = (
    "initializer_range", "zero_init_residual", "embedding_dropout", "residual_dropout", "attention_dropout",
    "classifier_dropout", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Fields that are not simply copied: `read(their config) -> our fields`, `write(our config) -> their fields`."""

    read: Callable[[PreTrainedConfig], dict[str, Any]]
    write: Callable[[HfLmConfig], dict[str, Any]]


def unscaled(config: HfLmConfig) -> HfLmConfig:
    """The configuration of the same model with `embedding_multiplier` in its embedding, which unties the head."""
    folded = copy(config)
    folded.embedding_multiplier, folded.tie_word_embeddings = 1.0, False
    return folded


def window_of(config) -> int | None:
    return config.sliding_window if "sliding_attention" in (config.layer_types or ()) else None


def attention_scale(ours: HfLmConfig) -> float:
    return ours.attention_multiplier or ours.head_dim**-0.5


@dataclass(frozen=True)
class Fused:
    """
    One projection that holds queries, keys and values.

    per_head: its rows are the query, key and value of one head after the other; else all queries, all keys, all values.
    """

    per_head: bool


@dataclass(frozen=True)
class Constants:
    """
    Tensors that a family learns in each layer's activation and the decoder does not: written, and accepted, with these
    values only. They are written in float32, whatever the dtype of the rest.

    Args:
        act: our activation that they make of theirs.
        module: the activation, as a part of their weights' names.
        beside: the linear layer in front of it.
        values: by name; a number for a tensor without dimensions.
    """

    act: str
    module: str
    beside: str
    values: Mapping[str, float | list[float]]


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
        weights: the part of their weight's name -> ours, how it is fused, or what it always is. The rest of a name is the
            same.
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
    weights: Mapping[str, str | Fused | Constants] = field(default_factory=dict)
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

    def field_pairs(self) -> dict[str, str]:
        """`{our field: theirs}` for all that are copied."""
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
                    f"{self.model_type}: {name} is {getattr(theirs, name)!r}, which hf_lm cannot express; it must be "
                    "false."
                )
        ours = PLAIN | dict(self.fixed)
        ours |= {name: getattr(theirs, their_name) for name, their_name in self.field_pairs().items()}
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

    def as_held(self, ours: HfLmConfig) -> HfLmConfig:
        """
        The configuration of the model that the family holds in place of this one: the same, or with scaled embeddings
        folded into the weights (`unscaled`) if the family comes nearer to that.
        """
        if ours.embedding_multiplier == 1.0:
            return ours
        return min(ours, unscaled(ours), key=lambda config: len(self._differences(config)))

    def from_hf_lm(self, ours: HfLmConfig) -> PreTrainedConfig:
        """Their configuration, as near to ours as the family comes (see `differences`)."""
        return self.write(self.as_held(ours))

    def write(self, ours: HfLmConfig) -> PreTrainedConfig:
        """As `from_hf_lm`, without folding anything into the weights."""
        values: dict[str, Any] = {}
        for name, their_name in self.field_pairs().items():
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
        return self._differences(self.as_held(ours))

    def _differences(self, ours: HfLmConfig) -> dict[str, tuple[Any, Any]]:
        try:
            native = HfLmConfig(**self.to_hf_lm(self.write(ours)))
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, IndexError) as error:
            return {"config": ("a value", f"none, as {self.config_class.__name__} refuses it ({error})")}
        mine, theirs = _effective(ours), _effective(native)
        return {name: (mine[name], theirs[name]) for name in mine if not _same(mine[name], theirs[name])}


def same_logits(one: HfLmConfig, other: HfLmConfig) -> bool:
    """Whether all options are equal that have an effect on the logits, numbers to the precision of float32."""
    return _same(_effective(one), _effective(other), rel_tol=1e-6)


def _effective(config: HfLmConfig) -> dict[str, Any]:
    """The options that have an effect on the logits, so that equal models have equal values."""
    skipped = {"rope_parameters", *WITHOUT_EFFECT_ON_LOGITS}
    values = {name: getattr(config, name) for name in (*PLAIN, *SHARED, "norm_eps", "head_dim") if name not in skipped}
    values |= {"sliding_window": window_of(config), "attention_multiplier": attention_scale(config)}
    if config.no_rope_layers and all(config.no_rope_layers):
        values["no_rope_layers"] = None
    ropes = config.rope_parameters_by_layer_type()
    values["rope_parameters"] = {
        layer_type: {"partial_rotary_factor": 1.0}
        | {key: value for key, value in rope.items() if value is not None and key != "type"}
        for layer_type, rope in ropes.items()
    }
    return values


def _same(one: Any, other: Any, rel_tol: float = 1e-9) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], rel_tol) for key in one)
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and math.isclose(one, other, rel_tol=rel_tol)
    return one == other
