# Copyright 2026 The hf_lm authors.
# SPDX-License-Identifier: Apache-2.0
"""
The functions of the model that hold no weights: masks, rotary positions, attention, norm, losses.

All are plain formulas. The hf_lm package replaces some by faster functions with the same values and gradients.
"""

import inspect
from collections.abc import Callable
from copy import copy
from functools import wraps

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.loss import loss_utils
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_torch_fx_proxy, is_tracing

# What transformers calls the cache: past_key_values before 5.24, cache since.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"

# Replacements of the functions marked `replaceable` and of activations, by name, and `linear_cross_entropy`, the loss
# without the logits. `hf_lm/kernels` fills this in; in a copy of this file from the Hub it stays empty.
KERNELS: dict[str, Callable] = {}


def replaceable(formula: Callable) -> Callable:
    """Let `KERNELS` replace a function. Its argument `training`, if any, is for replacements with their own gradient."""

    @wraps(formula)
    def compute(*args, **kwargs):
        return KERNELS.get(formula.__name__, formula)(*args, **kwargs)

    return compute


def check_ids(name: str, ids: Tensor, size: int, ignore_index: int | None = None) -> None:
    """
    Raise `ValueError` for ids outside `[0, size)`. Only CPU tensors are looked at: reading those of an accelerator back
    would stall the step, and its kernels have assertions of their own.
    """
    if has_no_values(ids) or ids.device.type != "cpu":
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low == ignore_index and high < size:  # the usual case of masked labels: look at the others
        low = int(torch.where(ids == ignore_index, 0, ids).min())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be between 0 and {size - 1}, got {low if low < 0 else high}.")


def has_no_values(tensor: Tensor) -> bool:
    """Whether code cannot branch on the values: in a traced graph, of a fake or meta tensor, under `torch.func`."""
    return is_tracing(tensor) or torch._C._are_functorch_transforms_active() or tensor.is_meta


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of matmuls under autocast; None where it is off or, as on the meta device, does not exist."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def make_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None = None,
) -> tuple[dict, dict]:
    """
    Return `{layer type: mask}` and further arguments for the attention functions. (llm-compressor does not trace into a
    function of this name.) transformers looks for packed documents only without mask and cache; here they are found
    whatever is passed, as long as nothing is cached yet. Varlen attention with given lengths needs no mask.
    """
    if isinstance(attention_mask, dict):
        return attention_mask, {}
    if not isinstance(past_key_values, Cache):  # a paged cache, which comes with a mask or lengths
        past_key_values = None
    no_cache = past_key_values is None
    if cu_seq_lens is not None and no_cache and uses_varlen(config, inputs_embeds):
        return dict.fromkeys(config.layer_types), {}
    attention_kwargs, mask_kwargs = {}, {}
    is_2d = attention_mask is None or attention_mask.ndim == 2
    if position_ids is not None and position_ids.shape[-1] > 1 and is_2d and nothing_cached(past_key_values):
        documents = packed_document_ids(position_ids.expand(inputs_embeds.shape[0], -1), attention_mask)
        is_flash = is_flash_attention_requested(config)  # its lengths depend on the data: not for a traced graph
        if not is_flash if has_no_values(documents) else bool((documents[:, -1] > 0).any()):
            if no_cache and uses_varlen(config, inputs_embeds) and not has_no_values(documents):
                return dict.fromkeys(config.layer_types), varlen_arguments(documents, attention_mask)
            if is_flash:
                attention_kwargs = varlen_arguments(documents, attention_mask)
                attention_mask = None
            if past_key_values is not None:  # a static cache has room for more keys than there are yet
                length = documents.shape[1]
                sizes = [past_key_values.get_mask_sizes(length, i)[0] for i in range(config.num_hidden_layers)]
                documents = nn.functional.pad(documents, (0, max(sizes) - length), value=-1)
            mask_kwargs["and_mask_function"] = packed_sequence_mask_function(documents)

    # The mask takes the dtype of the embeddings; under autocast the scores it is added to have another.
    mixed = autocast_dtype(inputs_embeds.device.type)
    if mixed is not None:
        inputs_embeds = inputs_embeds[..., :1].to(mixed)
    if past_key_values is not None and config._attn_implementation == "flex_attention":
        past_key_values = with_lengths_kept(past_key_values)
    masks = create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **mask_kwargs)
    return masks, attention_kwargs


def nothing_cached(past_key_values: Cache | None) -> bool:
    """Whether there are no keys yet; not known, and so False, while a graph is traced."""
    length = 0 if past_key_values is None else past_key_values.get_seq_length()
    return not (isinstance(length, Tensor) and has_no_values(length)) and int(length) == 0


def default_position_ids(
    inputs_embeds: Tensor, attention_mask: Tensor | dict | None, past_key_values: Cache | None
) -> Tensor:
    """The number of real tokens before each token, cached ones included: `(batch or 1, sequence)`."""
    length = inputs_embeds.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)


@replaceable
def uses_varlen(config: PreTrainedConfig, inputs_embeds: Tensor) -> bool:
    """Whether attention takes the documents' cumulative lengths instead of a mask."""
    return is_flash_attention_requested(config)


def packed_document_ids(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """
    Number the documents of each row from 0: a new one starts where a position does not follow on the one before it.
    Padding (`attention_mask == 0`) is stepped over: positions on both of its sides may follow on each other.
    Arguments and result are `(batch, sequence)`.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    real = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    last_real = torch.where(real, index, -1).cummax(dim=-1).values
    previous = nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    follows = position_ids == position_ids.gather(1, previous.clamp(min=0)) + 1
    return (real & (previous >= 0) & ~follows).long().cumsum(dim=-1)


def varlen_arguments(document_ids: Tensor, attention_mask: Tensor | None) -> dict:
    """
    What FlashAttention's variable-length kernels need to keep documents (and padding) apart: the cumulative lengths
    of all runs of the flattened batch.
    """
    runs = document_ids if attention_mask is None else document_ids * 2 + attention_mask.long()
    starts = torch.ones_like(runs, dtype=torch.bool)
    starts[:, 1:] = runs[:, 1:] != runs[:, :-1]
    starts = starts.flatten().nonzero().flatten()
    lengths = nn.functional.pad(starts, (0, 1), value=runs.numel()).to(torch.int32)
    longest = int(lengths.diff().max())
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


def with_lengths_kept(cache: Cache) -> Cache:
    """
    The cache to make a mask from that FlexAttention evaluates later: by then a static cache has counted the new tokens
    in place, and the mask would let them see too much. The tensors of keys and values are shared.
    """
    cache = copy(cache)
    cache.layers = [copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        if isinstance(getattr(layer, "cumulative_length", None), Tensor):
            layer.cumulative_length = layer.cumulative_length.clone()
    return cache


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair `(a, b)` of the last dimension into `(-b, a)`; pairs are halves apart, or neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@replaceable
def cosines_and_sines(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of rotary positions."""
    return angles.cos(), angles.sin()


@replaceable
def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, training: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Rotate the leading dimensions of each head by its position's angles; the others pass through.

    Args:
        q, k: `(batch, heads, sequence, head_dim)`.
        cos, sin: `(batch, sequence, rotated dims)`, the same for both numbers of a pair.
    """
    cos, sin = cos.unsqueeze(1).to(q.dtype), sin.unsqueeze(1).to(q.dtype)
    rotated = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        turned = x[..., :rotated] * cos + rotate_half(x[..., :rotated], interleaved) * sin
        return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)

    return turn(q), turn(k)


def repeat_kv(hidden_states: Tensor, repeats: int) -> Tensor:
    """`(batch, kv_heads, sequence, head_dim)` -> `(batch, kv_heads * repeats, sequence, head_dim)`."""
    return hidden_states if repeats == 1 else hidden_states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """
    `softmax(scaling Q K^T + mask) V` (arXiv:1706.03762) written out. The softmax of 16-bit scores adds up in float32.

    Args:
        query: `(batch, heads, queries, head_dim)`; key, value: `(batch, kv_heads, keys, head_dim)`.
        attention_mask: added to the scores, broadcastable to `(batch, heads, queries, keys)`.

    Returns:
        The output `(batch, queries, heads, head_dim)` and the weights `(batch, heads, queries, keys)`.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value)
    return output.transpose(1, 2).contiguous(), weights


@replaceable
def rms_norm(x: Tensor, weight: Tensor, eps: float, training: bool = False) -> Tensor:
    """
    `x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension, computed in float32. Returns the dtype of `x`, or
    under autocast that of autocast, which the linear layer that follows would turn it to.
    """
    if is_torch_fx_proxy(x):  # tools that trace a model look for these operations
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    dtype = autocast_dtype(x.device.type) or x.dtype
    if x.dtype == weight.dtype:
        return nn.functional.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


def number_of_items(labels: Tensor, given: Tensor | int | None = None, ignore_index: int = -100) -> Tensor | int:
    """
    The divisor of a summed loss: the number given, or of labels that count; 1 instead of 0, which makes loss and gradients
    0 instead of NaN.
    """
    number = (labels != ignore_index).sum() if given is None else given
    return number + (number == 0)


# The losses of the heads take the arguments of those of transformers, but are 0 instead of NaN where no label counts.
def causal_lm_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
) -> Tensor:
    """Next-token loss: logits `(batch, sequence, vocabulary)`; labels `(batch, sequence)`, shifted here."""
    learned = labels[..., 1:] if shift_labels is None else shift_labels
    number = number_of_items(learned, num_items_in_batch, ignore_index)
    return loss_utils.ForCausalLMLoss(logits, labels, vocab_size, number, ignore_index, shift_labels, **kwargs)


def sequence_classification_loss(labels, pooled_logits, config, num_items_in_batch=None, **kwargs) -> Tensor:
    """Loss of texts: logits `(batch, labels)`; labels `(batch,)`, multi-label and regression: `(batch, labels)`."""
    number = number_of_items(labels, num_items_in_batch)
    return loss_utils.ForSequenceClassificationLoss(labels, pooled_logits, config, num_items_in_batch=number)


def token_classification_loss(logits, labels, config, num_items_in_batch=None, **kwargs) -> Tensor:
    """Loss of tokens: logits `(batch, sequence, labels)`; labels `(batch, sequence)`."""
    number = number_of_items(labels, num_items_in_batch)
    return loss_utils.ForTokenClassification(logits, labels, config, num_items_in_batch=number)


def question_answering_loss(
    start_logits, end_logits, start_positions, end_positions, num_items_in_batch=None, **kwargs
) -> Tensor:
    """Loss of spans: logits `(batch, sequence)`, positions `(batch,)`; -100 and those past the end do not count."""
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        positions = positions.view(-1).to(logits.device)
        is_outside = (positions == -100) | (positions >= logits.shape[1])
        labels = positions.clamp(min=0).masked_fill(is_outside, -100)
        losses.append(loss_utils.fixed_cross_entropy(logits, labels, number_of_items(labels, num_items_in_batch)))
    return sum(losses) / 2


LOSSES = {  # by the name in transformers' `LOSS_MAPPING`
    "ForCausalLM": causal_lm_loss,
    "ForSequenceClassification": sequence_classification_loss,
    "ForTokenClassification": token_classification_loss,
    "ForQuestionAnswering": question_answering_loss,
}
