# Copyright 2026 The hf_lm authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the hf_lm decoder-only Transformer language model."""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

from transformers.utils.versions import require_version

require_version("transformers>=5.4")  # before what older ones lack

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters  # noqa: E402

ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention")
# Fields that must be greater than 0 where they are given, and those that are at least 0 and less than 1.
POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window", "norm_eps", "attention_multiplier",
    "attn_logit_softcapping", "embedding_multiplier", "residual_multiplier", "logit_scale", "final_logit_softcapping",
)  # fmt: skip
PROBABILITIES = "embedding_dropout", "residual_dropout", "attention_dropout", "classifier_dropout"
PER_LAYER = {"layer_types": "layer_type", "no_rope_layers": "has_rope"}  # lists: the attribute of a layer

# `"config"` and `"model"`: readers of other families' checkpoints, called in place of transformers' methods with the method
# as first argument. `hf_lm/interop` fills this in; in a copy of this file from the Hub it stays empty.
READERS: dict[str, Callable] = {}

# What the Auto classes find in the config.json of a saved model.
HEADS = "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
AUTO_MAP = {"AutoConfig": "configuration_hf_lm.HfLmConfig"}
AUTO_MAP |= {f"AutoModel{head}": f"modeling_hf_lm.HfLm{head or 'Model'}" for head in ("", *HEADS)}
# Which norm (by its name in published checkpoints) stands before attention, after it, before the MLP, after it.
NORM_NAMES = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
# transformers copies the files that a code file imports along with it (older releases: not those that they import), and
# finds them by a pattern, in strings as well: the config of a model from the Hub has all files at hand to save them.
IMPORTED_LATER = """
from .functional_hf_lm import check_ids
from .modeling_hf_lm import HfLmModel
"""


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def add_default_adapter_targets() -> None:
    """
    If PEFT is loaded, let it adapt this model as it adapts a Llama where no target modules are given. It has no call
    for that, but tables by `model_type`.
    """
    for module in ("peft.utils.constants", "peft.tuners.adaption_prompt.config"):
        for name, table in vars(sys.modules.get(module, object)).items():
            if name.startswith("TRANSFORMERS_MODEL") and "llama" in table:
                table.setdefault(HfLmConfig.model_type, table["llama"])


@strict
class HfLmConfig(PreTrainedConfig):
    r"""
    Configuration of an hf_lm model. One decoder, many families: every field exists because at least one family of
    published checkpoints (named in brackets) or a measured gain in from-scratch training needs it. The defaults are the
    from-scratch model of `recipes/moby_dick`; `recipes/benchmarks` has what each of them gains.

    Sizes (`vocab_size`, `hidden_size`, `num_hidden_layers`, `num_attention_heads` are as in Llama's configuration):
        intermediate_size: width of the MLP; default `4 * hidden_size` for a plain MLP, two thirds of that for a gated
            one (the same number of parameters), rounded up to a multiple of 32.
        num_key_value_heads: heads of grouped-query attention (arXiv:2305.13245); default: as many as query heads.
        head_dim: width of one head; default `hidden_size // num_attention_heads`.
        max_position_embeddings: longest sequence the model was made for, in tokens.

    Attention:
        attention_bias: bias on the query, key and value projections [Qwen2, StableLM, Phi, GPT-2, ...].
        attention_out_bias: bias on the output projection [Starcoder2, Phi, GPT-NeoX, GPT-2].
        qk_norm: RMS norm of queries and keys, per head [Qwen3, Gemma 3] or over the full projection width [OLMo2].
        attention_multiplier: factor on `q @ k.T`; default `head_dim ** -0.5` [Granite; Gemma's
            `query_pre_attn_scalar ** -0.5`].
        attn_logit_softcapping: `cap * tanh(scores / cap)` before the softmax [Gemma 2].
        layer_types: `"full_attention"` or `"sliding_attention"` for each layer; default: all sliding if
            `sliding_window` is set [Mistral], else all full. Alternating in [Gemma 2 and 3].
        sliding_window: how many tokens, itself included, a token of a sliding layer sees.

    Positions:
        position_embedding_type: rotary (arXiv:2104.09864) or learned absolute [GPT-2].
        rope_parameters: `rope_type`, `rope_theta`, `partial_rotary_factor` [StableLM, Phi, GPT-NeoX] and the scaling
            of any type transformers knows; or one such dict per layer type [Gemma 3].
        rope_interleaved: rotate neighbouring pairs instead of the two halves of a head [Cohere].
        no_rope_layers: 1 for each layer with rotary embedding, 0 for one without [SmolLM3].

    Norms and residual stream:
        norm_type: [rmsnorm: Llama and most; layernorm: GPT-2, GPT-NeoX, Phi, StableLM, Starcoder2, Cohere].
        norm_eps: added to the variance.
        norm_bias: bias of the LayerNorms [all with LayerNorm but Cohere].
        norm_offset: the RMS norm multiplies by `1 + weight` [Gemma].
        norm_position: before each sub-layer [Llama and most], after it [OLMo2], or both [Gemma 2 and 3].
        parallel_residual: attention and MLP both read the layer's input, through one norm (`"shared"`) [Cohere, Phi,
            StableLM-2-12B] or one each (`"separate"`) [GPT-NeoX].
        residual_multiplier: factor on each sub-layer's output [Granite].

    MLP:
        hidden_act: a key of `transformers.activations.ACT2FN`; default: squared ReLU (arXiv:2109.08668).
        mlp_type: `down(act(gate(x)) * up(x))`, gated [Llama and most], or `down(act(up(x)))`, plain [GPT-2, GPT-NeoX,
            Phi, Starcoder2].
        mlp_bias: bias on all MLP projections [GPT-2, GPT-NeoX, Phi, Starcoder2].

    Embedding and head:
        tie_word_embeddings: `lm_head` shares the embedding matrix.
        embedding_multiplier: factor on the token embeddings [Gemma, Granite].
        lm_head_bias: bias on `lm_head` [Phi].
        logit_scale: factor on the logits [Cohere; 1 / `logits_scaling` of Granite].
        final_logit_softcapping: `cap * tanh(logits / cap)` [Gemma 2].

    Training:
        initializer_range: standard deviation of the initial weights.
        zero_init_residual: start `o_proj` and `down_proj` at zero: each layer starts as the identity.
        embedding_dropout, residual_dropout, attention_dropout: probabilities [GPT-2, Phi, Starcoder2, ...].
        classifier_dropout: probability before the token-classification head.

    Export:
        native_family: `model_type` of the family as which `hf-lm export` writes the model, where several can hold it.

    Raises:
        ValueError: on construction, if fields are out of range or contradict each other (all `validate_*` methods).

    Example:
        >>> from hf_lm import HfLmConfig, HfLmForCausalLM
        >>> model = HfLmForCausalLM(HfLmConfig(vocab_size=512, hidden_size=64, num_attention_heads=4))
    """

    model_type = "hf_lm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # its names before and since transformers 5.24
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048

    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: Literal["head", "full"] | None = "head"
    attention_multiplier: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None

    position_embedding_type: Literal["rope", "learned"] = "rope"
    rope_parameters: RopeParameters | dict | None = None
    rope_interleaved: bool = False
    no_rope_layers: list[int] | None = None

    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_offset: bool = False
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    parallel_residual: Literal["none", "shared", "separate"] = "none"
    residual_multiplier: float | int = 1.0

    hidden_act: str = "relu2"
    mlp_type: Literal["gated", "plain"] = "plain"
    mlp_bias: bool = False

    tie_word_embeddings: bool = True
    embedding_multiplier: float | int = 1.0
    lm_head_bias: bool = False
    logit_scale: float | int = 1.0
    final_logit_softcapping: float | int | None = None

    initializer_range: float | int = 0.02
    zero_init_residual: bool = True
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0

    native_family: str | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.validate_sizes()
        width, heads = self.hidden_size, self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            message = (
                f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}), unless head_dim is given."
            )
            require(width % heads == 0, message)
            self.head_dim = width // heads
        if self.intermediate_size is None:
            self.intermediate_size = width * 4 if self.mlp_type == "plain" else -(-width // 12) * 32
        if self.layer_types is None:
            layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers
        for name in PER_LAYER:
            values = getattr(self, name)
            if values and len(set(values)) == 1:  # tools that add or remove layers write num_hidden_layers alone
                setattr(self, name, values[:1] * self.num_hidden_layers)
        super().__post_init__(**kwargs)
        # transformers calls these as well, but wraps what they raise in an exception that is no ValueError.
        self.validate_heads()
        self.validate_layers()
        self.validate_blocks()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "num_hidden_layers":  # too short a list is repeated; one that is too long keeps what it says
            for name in PER_LAYER:
                values = self.__dict__.get(name)
                if values and len(values) < value:
                    setattr(self, name, (values * value)[:value])

    def fit_to_layers(self, layers) -> None:
        """Make the lists say what a model's layers are: some may have been added, copied, moved or removed."""
        for name, attribute in PER_LAYER.items():
            known = getattr(self, name) or []
            values = [getattr(layer, attribute, value) for layer, value in zip(layers, known, strict=False)]
            if values != known:
                setattr(self, name, values)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As in transformers; with a reader, the config.json of other families as well."""
        load = super().get_config_dict
        load = partial(READERS["config"], load) if "config" in READERS else load
        return load(pretrained_model_name_or_path, **kwargs)

    def to_dict(self) -> dict:
        add_default_adapter_targets()  # PEFT asks for this dict before it looks up the targets
        return super().to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Save as transformers does, with all code that `auto_map` names, unless `_auto_class` is None: weights added to
        the folder make a model that loads where hf_lm is not installed.
        """
        for name in PER_LAYER:
            if getattr(self, name):
                setattr(self, name, getattr(self, name)[: self.num_hidden_layers])
        known = self.__dict__.pop("auto_map", None) or {}
        if self._auto_class is not None:
            # Of what was in the map, only a class whose file was just written: that of a model derived from ours.
            names = os.listdir(save_directory) if os.path.isdir(save_directory) else []
            written = {key: value for key, value in known.items() if f"{str(value).split('.')[0]}.py" in names}
            self.auto_map = AUTO_MAP | written
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if known:
                self.auto_map = known

    def validate_sizes(self):
        """Numbers are in their ranges, and the padding token is in the vocabulary."""
        pad, last, spread = self.pad_token_id, self.vocab_size - 1, self.initializer_range
        for name in POSITIVE:
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be greater than 0, got {value}.")
        for name in PROBABILITIES:
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{name} must be at least 0 and less than 1, got {value}.")
        require(0.0 <= spread <= 1.0, f"initializer_range must be between 0 and 1, got {spread}.")
        is_id = pad is None or 0 <= pad <= last
        require(is_id, f"pad_token_id must be between 0 and vocab_size - 1 ({last}), got {pad}.")

    def validate_heads(self):
        """Query heads share key/value heads evenly; a rotated head has an even number of rotated dimensions."""
        heads, shared, size = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        message = f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared})."
        require(heads % shared == 0, message)
        for rope in self.rope_parameters_by_layer_type().values():
            rope_type, theta, known = rope["rope_type"], rope.get("rope_theta", 1.0), ("default", *ROPE_INIT_FUNCTIONS)
            rotated = int(size * (rope.get("partial_rotary_factor") or 1.0))
            require(rope_type in known, f"rope_type must be one of {', '.join(known)}, got {rope_type!r}.")
            message = f"The rotated part of a head must be even and between 2 and head_dim ({size}), got {rotated}"
            require(rotated % 2 == 0 and 0 < rotated <= size, f"{message} from rope_parameters {rope}.")
            is_defined = rope_type != "dynamic" or rotated > 2  # its formula divides by rotated - 2
            require(is_defined, f'rope_type "dynamic" needs more than 2 rotated dimensions a head, got {rotated}.')
            require(theta > 0, f"rope_theta must be greater than 0, got {theta}.")

    def validate_layers(self):
        """The two per-layer lists fit the number of layers and the other fields."""
        number, types, with_rope = self.num_hidden_layers, self.layer_types, self.no_rope_layers
        for name in PER_LAYER:
            length = number if getattr(self, name) is None else len(getattr(self, name))
            require(length == number, f"{name} has {length} entries, but num_hidden_layers is {number}.")
        unknown = ", ".join(sorted(set(types) - set(ATTENTION_LAYER_TYPES)))
        require(not unknown, f"layer_types may hold {' and '.join(ATTENTION_LAYER_TYPES)}, got {unknown}.")
        has_window = "sliding_attention" not in types or self.sliding_window is not None
        require(has_window, "layer_types holds sliding_attention, which needs sliding_window (tokens), got None.")
        is_rotary = with_rope is None or self.position_embedding_type == "rope"
        require(is_rotary, 'no_rope_layers needs position_embedding_type "rope", got "learned".')
        is_binary = set(with_rope or ()) <= {0, 1}
        require(is_binary, f"no_rope_layers may hold 0 (no rotary) and 1 (rotary), got {with_rope}.")

    def validate_blocks(self):
        """Norms, residual paths and activations can be built together."""
        from transformers.activations import ACT2FN  # here, since it loads torch

        act, parallel, position = self.hidden_act, self.parallel_residual, self.norm_position
        is_layernorm = self.norm_type == "layernorm"
        can_be_parallel = parallel == "none" or position == "pre"
        require(act in ACT2FN, f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {act!r}.")
        require(can_be_parallel, f'parallel_residual "{parallel}" needs norm_position "pre", got "{position}".')
        has_offset = is_layernorm and self.norm_offset
        require(not has_offset, 'norm_offset is for norm_type "rmsnorm" only, got "layernorm".')
        require(is_layernorm or not self.norm_bias, 'norm_bias is for norm_type "layernorm" only, got "rmsnorm".')

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """
        Tensor parallelism: each rank computes some of the heads and a part of the MLP's width. A norm over the width of
        all heads needs them gathered, as in OLMo2.
        """
        gathered = self.qk_norm == "full"
        plan = {
            f"layers.*.self_attn.{name}_proj": "colwise_gather_output" if gathered else "colwise" for name in "qkv"
        }
        plan["layers.*.self_attn.o_proj"] = "rowwise_split_input" if gathered else "rowwise"
        if self.qk_norm == "head":
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        if self.mlp_type == "gated":
            plan["layers.*.mlp.gate_proj"] = "colwise"
        plan |= {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
        return self.__dict__.get("base_model_tp_plan", plan)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]):
        self.__dict__["base_model_tp_plan"] = plan  # transformers 5.20 adds the embedding's entry

    def rope_parameters_by_layer_type(self) -> dict[str, dict]:
        """
        The rotary parameters each kind of layer uses: `{layer type: parameters}`, empty with learned positions.

        Raises:
            ValueError: `rope_parameters` names layer types, but not all that `layer_types` holds.
        """
        if self.position_embedding_type != "rope":
            return {}
        rope = self.rope_parameters
        layer_types = sorted(set(self.layer_types))  # all processes must build their buffers in the same order
        if not any(key in ATTENTION_LAYER_TYPES for key in rope):
            return dict.fromkeys(layer_types, rope)
        missing = ", ".join(layer_type for layer_type in layer_types if not rope.get(layer_type))
        require(not missing, f"rope_parameters has no entry for {missing}; it has {', '.join(rope)}.")
        return {layer_type: rope[layer_type] for layer_type in layer_types}
