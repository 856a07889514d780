# Copyright 2026 The hf_lm authors.
# SPDX-License-Identifier: Apache-2.0
"""
The hf_lm model: one decoder-only Transformer that `HfLmConfig` alone turns into any dense family of the field.

Token embedding -> decoder layers (multi-head self-attention, MLP, norms, residual stream) -> final norm -> head.
The file stands alone (torch, transformers and its two siblings): they are copied to the Hub beside the weights.
"""

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, GradientCheckpointingLayer, PreTrainedModel
from transformers import initialization as init
from transformers import modeling_layers as generic
from transformers.activations import ACT2FN
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hf_lm import NORM_NAMES, READERS, HfLmConfig

from .functional_hf_lm import (  # isort: skip
    CACHE_NAME, KERNELS, LOSSES, apply_rotary_pos_emb, causal_lm_loss, check_ids, cosines_and_sines,
    default_position_ids, eager_attention_forward, make_causal_mask, rms_norm,
)  # fmt: skip


class HfLmRMSNorm(nn.Module):
    """
    Root-mean-square norm (arXiv:1910.07467) over the last dimension, computed in float32:
    `x / sqrt(mean(x ** 2) + eps) * (weight + offset)`.
    """

    offset = 0.0

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return rms_norm(hidden_states, weight, self.eps, self.training)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.offset}"


class HfLmOffsetRMSNorm(HfLmRMSNorm):
    """Gemma's norm. A class of its own: vLLM builds one by its size alone, and sees that the weights start at 0."""

    offset = 1.0


def build_rms_norm(config: HfLmConfig, size: int) -> HfLmRMSNorm:
    return (HfLmOffsetRMSNorm if config.norm_offset else HfLmRMSNorm)(size, config.norm_eps)


def build_norm(config: HfLmConfig) -> nn.Module:
    """The norm of the residual stream that `config` asks for."""
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
    return build_rms_norm(config, config.hidden_size)


class HfLmScaledEmbedding(nn.Embedding):
    """Embedding times a constant, which is first rounded to the dtype of the weights, as Gemma does."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.scalar_embed_scale = embed_scale
        self.embed_scale = nn.Buffer(torch.tensor(embed_scale), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class HfLmRotaryEmbedding(nn.Module):
    """
    Rotary position embedding (arXiv:2104.09864): the cosines and sines of each position's angles.

    `config.rope_parameters` must be one flat dict; a model whose layer types differ has one of these modules for each.
    """

    def __init__(self, config: HfLmConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: HfLmConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        """Inverse frequencies `theta ** (-2i / dim)` of shape `(rotated dims / 2,)`, and the scaling 1."""
        dim = int(config.head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        in_pairs = self.config.rope_interleaved
        angles = angles.repeat_interleave(2, dim=-1) if in_pairs else torch.cat((angles, angles), dim=-1)
        cosines, sines = cosines_and_sines(angles)
        return (cosines * self.attention_scaling).to(x.dtype), (sines * self.attention_scaling).to(x.dtype)


torch.fx.wrap("apply_rotary_pos_emb")  # one node of a symbolic trace, in which its shapes are not known


class HfLmAttention(nn.Module):
    """Multi-head self-attention with grouped key/value heads."""

    def __init__(self, config: HfLmConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_multiplier or config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        # reading them from the config in every step is slow
        self.qk_norm, self.softcap = config.qk_norm, config.attn_logit_softcapping
        self.rope_interleaved = config.rope_interleaved
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        is_rotated = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        self.use_rope = config.position_embedding_type == "rope" and is_rotated

        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.o_proj.starts_at_zero = config.zero_init_residual
        if self.qk_norm is not None:
            per_head = self.qk_norm == "head"
            self.q_norm = build_rms_norm(config, self.head_dim if per_head else q_size)
            self.k_norm = build_rms_norm(config, self.head_dim if per_head else kv_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """
        `(batch, sequence, hidden)` in and out; also the weights, from implementations of attention that have them.

        Args:
            position_embeddings: cosines and sines of rotary positions, each `(batch, sequence, rotated dims)`.
            attention_mask: as the implementation takes it: `(batch, 1 or heads, queries, keys)`, or None.
            kwargs: among them the cache, by its name in transformers, to which keys and values are added.
        """
        cache = kwargs.pop(CACHE_NAME, None)
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.view(head_shape), key.view(head_shape), value.view(head_shape)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

        if self.use_rope:
            cos, sin = position_embeddings
            query, key = apply_rotary_pos_emb(query, key, cos, sin, self.rope_interleaved, self.training)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # a paged cache adds to `kwargs`

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(  # vLLM reads `scaling` from the source of this call
            self, query, key, value, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, softcap=self.softcap, **kwargs,
        )  # fmt: skip
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class HfLmMLP(nn.Module):
    """`down(act(up(x)))`, or with a gate `down(act(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, config: HfLmConfig):
        super().__init__()
        self.gate_proj = None
        if config.mlp_type == "gated":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.starts_at_zero = config.zero_init_residual
        act = config.hidden_act
        self.act_fn = KERNELS[act]() if act in KERNELS else ACT2FN[act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class HfLmDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each added to the residual stream; one after the other or both from the layer's input."""

    def __init__(self, config: HfLmConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.has_rope = config.no_rope_layers and config.no_rope_layers[layer_idx]
        self.parallel_residual = config.parallel_residual
        self.residual_multiplier = config.residual_multiplier
        self.self_attn = HfLmAttention(config, layer_idx)
        self.mlp = HfLmMLP(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)
        self.norm_names = NORM_NAMES[config.norm_position]
        if config.parallel_residual == "shared":
            self.norm_names = ("input_layernorm", None, None, None)
        for name in filter(None, self.norm_names):
            self.add_module(name, build_norm(config))

    def _norm(self, place: int, hidden_states: Tensor) -> Tensor:
        name = self.norm_names[place]
        return hidden_states if name is None else getattr(self, name)(hidden_states)

    def unread_linear(self) -> nn.Module | None:
        """The last linear map, if its output is only added to the residual stream: recomputation can leave it out."""
        is_read = self.norm_names[3] is not None or self.residual_dropout.p > 0
        return None if is_read else self.mlp.down_proj

    def _branch(self, output: Tensor) -> Tensor:
        """What a sub-layer adds to the residual stream."""
        output = self.residual_dropout(output) if self.training else output
        return output if self.residual_multiplier == 1.0 else output * self.residual_multiplier

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """`(batch, sequence, hidden)` in and out; further arguments as in `HfLmAttention.forward`, by name."""
        attention_input = self._norm(0, hidden_states)
        attention_output, _ = self.self_attn(hidden_states=attention_input, **kwargs)
        attention_output = self._branch(self._norm(1, attention_output))
        if self.parallel_residual == "shared":
            return hidden_states + attention_output + self._branch(self.mlp(attention_input))
        if self.parallel_residual == "separate":
            return hidden_states + attention_output + self._branch(self.mlp(self._norm(2, hidden_states)))
        hidden_states = hidden_states + attention_output
        return hidden_states + self._branch(self._norm(3, self.mlp(self._norm(2, hidden_states))))


class HfLmPreTrainedModel(PreTrainedModel):
    config: HfLmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfLmDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HfLmDecoderLayer, "attentions": HfLmAttention}

    def __init__(self, config: HfLmConfig):
        super().__init__(config)
        if self.loss_type in LOSSES:  # unlike those of transformers, 0 instead of NaN where no label counts
            self.loss_function = LOSSES[self.loss_type]

    @property
    def _supports_sdpa(self) -> bool:
        """SDPA has no soft cap: models with one fall back to eager attention, and say so if SDPA is asked for."""
        return self.config.attn_logit_softcapping is None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False) or isinstance(module, HfLmOffsetRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, HfLmScaledEmbedding):
            init.constant_(module.embed_scale, module.scalar_embed_scale)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; with a reader, checkpoints of other families as well, and none that lacks weights."""
        load = super().from_pretrained
        load = partial(READERS["model"], load) if "model" in READERS else load
        return load(pretrained_model_name_or_path, *args, **kwargs)

    def matrix_parameters(self) -> list[nn.Parameter]:
        """Weights of the layers' linear maps, which an optimizer of whole matrices such as Muon trains."""
        layers = getattr(self, self.base_model_prefix, self).layers
        return [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]

    def save_pretrained(self, save_directory, *args, save_code: bool = True, **kwargs):
        """
        Save as transformers does, but let `HfLmConfig.save_pretrained` write the code: transformers writes that of one class.

        Args:
            save_code: False leaves out the Python files and `auto_map`: loading then takes the installed package.
        """
        # The code of a class derived elsewhere is for transformers to find.
        own = type(self).__module__ == __name__ or type(self).__name__.startswith("FSDP")
        if own or not save_code:
            self._auto_class, self.is_remote_code = None, lambda: False  # the first is asked before transformers 5.10
        if not save_code:
            self.config._auto_class = None
        self.config.fit_to_layers(getattr(self, self.base_model_prefix, self).layers)
        if gathered := kwargs.get("state_dict"):  # from several processes: tied weights are no longer one tensor
            tied = self.all_tied_weights_keys
            kwargs["state_dict"] = {name: tensor for name, tensor in gathered.items() if name not in tied}
        try:
            super().save_pretrained(save_directory, *args, **{"save_original_format": False} | kwargs)  # ours, always
        finally:
            for name in ("_auto_class", "is_remote_code"):
                self.__dict__.pop(name, None)
            self.config.__dict__.pop("_auto_class", None)


class HfLmModel(HfLmPreTrainedModel):
    """The decoder without a head: token ids or embeddings in, the final norm's output out."""

    def __init__(self, config: HfLmConfig):
        super().__init__(config)
        sizes, scale = (config.vocab_size, config.hidden_size, config.pad_token_id), config.embedding_multiplier
        self.embed_tokens = nn.Embedding(*sizes) if scale == 1.0 else HfLmScaledEmbedding(*sizes, embed_scale=scale)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([HfLmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.rotary_emb = self._build_rotary_embeddings(config)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def _build_rotary_embeddings(config: HfLmConfig) -> nn.Module | None:
        """None, one module for all layers, or a dict of one for each layer type whose parameters differ."""
        modules = nn.ModuleDict()
        for layer_type, parameters in config.rope_parameters_by_layer_type().items():
            if parameters is config.rope_parameters:
                return HfLmRotaryEmbedding(config)
            layer_config = copy(config)
            layer_config.rope_parameters = parameters
            modules[layer_type] = HfLmRotaryEmbedding(layer_config)
        return modules or None

    def _position_embeddings(self, hidden_states: Tensor, position_ids: Tensor) -> dict:
        """`{layer type: (cos, sin)}`, each of shape `(batch, sequence, rotated dims)`."""
        if self.rotary_emb is None:
            return dict.fromkeys(self.config.layer_types)
        if isinstance(self.rotary_emb, nn.ModuleDict):
            return {name: rotary(hidden_states, position_ids) for name, rotary in self.rotary_emb.items()}
        return dict.fromkeys(self.config.layer_types, self.rotary_emb(hidden_states, position_ids))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(batch, sequence)`, or `inputs_embeds`: `(batch, sequence, hidden)`; exactly one of them.
            attention_mask: `(batch, cached + sequence)`, 0 for padding on either side; or a prepared 4D mask.
            position_ids: `(batch, sequence)`; where they do not count on, a new packed document starts, which does
                not see those before it. Default: the number of real tokens before, those in the cache included.
            past_key_values: keys and values of earlier tokens.

        Raises:
            ValueError: both or neither input given, no tokens, ids outside the vocabulary, positions past the
                learned ones.
        """
        if CACHE_NAME == "cache" or isinstance(kwargs.get("cache"), Cache):  # not yet the name of a paged cache alone
            past_key_values = kwargs.pop("cache", past_key_values)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given.numel() == 0:
            raise ValueError(f"The input must hold at least one token, got shape {tuple(given.shape)}.")
        if inputs_embeds is None:
            size = getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)  # without it: an adapter's
            check_ids("input_ids", input_ids, size)
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            self.config.fit_to_layers(self.layers)
            past_key_values = DynamicCache(config=self.config)

        masks, attention_kwargs = make_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids, kwargs.get("cu_seq_lens_q")
        )
        if attention_kwargs:  # in place, since llm-compressor traces this and cannot pass on a dict it does not know
            kwargs.update(attention_kwargs | kwargs)
        if position_ids is None:
            position_ids = default_position_ids(inputs_embeds, attention_mask, past_key_values)

        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            check_ids("position_ids", position_ids, self.config.max_position_embeddings)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        hidden_states = self.embedding_dropout(hidden_states)

        position_embeddings = self._position_embeddings(hidden_states, position_ids)
        # The config says how many layers there are now: assistants leave early, tools add and remove layers.
        for i, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            layer_type = getattr(decoder_layer, "layer_type", self.config.layer_types[i])
            hidden_states = decoder_layer(
                hidden_states, position_embeddings=position_embeddings[layer_type], attention_mask=masks[layer_type],
                position_ids=position_ids, **{CACHE_NAME: past_key_values}, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class HfLmForCausalLM(HfLmPreTrainedModel, GenerationMixin):
    """The language model: `HfLmModel` and a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfLmConfig):
        super().__init__(config)
        self.model = HfLmModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """`(..., hidden)` after the final norm -> `(..., vocabulary)`."""
        logits = self.lm_head(hidden_states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def generate(self, *args, **kwargs):
        """As in transformers, which makes the cache from the config's list of layers."""
        self.config.fit_to_layers(self.model.layers)
        return super().generate(*args, **kwargs)

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs):
        """As transformers, which copies masks as tensors: those of FlexAttention are none, `forward` makes them."""
        is_flex = self.config._attn_implementation == "flex_attention"
        return attention_mask if is_flex else create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _may_skip_logits(self) -> bool:
        """The head is the plain layer built above (no adapter, hook, quantiser or sharding), the loss the usual one."""
        head = self.lm_head
        is_plain = type(head) is nn.Linear and type(head.weight).__name__ in ("Parameter", "FakeTensor")
        is_hooked = head._forward_hooks or head._forward_pre_hooks
        return is_plain and not is_hooked and self.loss_function is causal_lm_loss

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Inputs as in `HfLmModel.forward`, and:

        Args:
            labels: `(batch, sequence)`, the input ids or -100 where there is nothing to learn; shifted here.
                `num_items_in_batch` and already shifted `shift_labels` are taken from `kwargs` as transformers does.
            logits_to_keep: number of last positions to compute logits of (0: all), or of the given ones.
            skip_logits: with labels, compute the loss without ever holding all logits, and return none; not where
                something has taken the place of the head or the loss.

        Returns:
            `loss`: mean negative log-likelihood in nats a token, `logits`: `(batch, sequence, vocabulary)`, ...

        Raises:
            ValueError: as `HfLmModel.forward`, and labels outside the vocabulary.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden_states, loss = outputs.last_hidden_state, None
        is_skipping = skip_logits and labels is not None and self._may_skip_logits()
        chunked_loss = KERNELS.get("linear_cross_entropy") if is_skipping else None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.compute_logits(hidden_states[:, kept, :]) if chunked_loss is None else None
        if labels is not None:
            check_ids("labels", labels, self.config.vocab_size, ignore_index=-100)
            if chunked_loss is not None:
                scale, cap = self.config.logit_scale, self.config.final_logit_softcapping
                loss = chunked_loss(hidden_states, self.lm_head, labels, scale, cap, **kwargs)
            else:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        logits = None if is_skipping else logits
        cache = outputs.get(CACHE_NAME)
        return CausalLMOutputWithPast(loss, logits, cache, outputs.hidden_states, outputs.attentions)


# transformers' heads build their base model with AutoModel, which refuses remote code: only their forward is used. It
# leaves out `num_items_in_batch`, so the Trainer must not count on it: gradient accumulation would multiply the loss.
class HfLmForSequenceClassification(generic.GenericForSequenceClassification, HfLmPreTrainedModel):
    """A label for the whole text, from its last token that is not padding (on either side)."""

    accepts_loss_kwargs = False

    def __init__(self, config: HfLmConfig):
        HfLmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfLmModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HfLmForTokenClassification(generic.GenericForTokenClassification, HfLmPreTrainedModel):
    """A label for each token."""

    accepts_loss_kwargs = False

    def __init__(self, config: HfLmConfig):
        HfLmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfLmModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class HfLmForQuestionAnswering(generic.GenericForQuestionAnswering, HfLmPreTrainedModel):
    """Start and end of the answer inside the text."""

    def __init__(self, config: HfLmConfig):
        HfLmPreTrainedModel.__init__(self, config)
        self.model = HfLmModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HfLmConfig.model_type] = "HfLmForCausalLM"  # Trainer's label smoothing shifts these
