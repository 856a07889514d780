"""Attention over packed documents by the FlashAttention that comes with PyTorch."""

import inspect

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from ..functional_hf_lm import autocast_dtype, repeat_kv

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "window_size" in inspect.signature(varlen_attn).parameters  # from PyTorch 2.11 on
except ImportError:  # before 2.10
    HAS_VARLEN = False


def has_varlen_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's FlashAttention for documents of different lengths can be used: in 16 bits on a CUDA device."""
    return HAS_VARLEN and device == "cuda" and dtype.itemsize == 2


def uses_varlen(config: PreTrainedConfig, inputs_embeds: torch.Tensor) -> bool:
    """The formula of this name, and PyTorch's FlashAttention."""
    device = inputs_embeds.device.type
    dtype = autocast_dtype(device) or inputs_embeds.dtype
    is_varlen = config._attn_implementation == "varlen" and has_varlen_kernel(device, dtype)
    return is_varlen or is_flash_attention_requested(config)


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """
    Attention `"varlen"`: packed documents through the FlashAttention that comes with PyTorch (arXiv:2307.08691), which
    needs their cumulative lengths instead of a mask and does no work between them. Without lengths or kernel, SDPA.

    Args:
        query: `(batch, heads, queries, head_dim)`; key, value: `(batch, kv_heads, keys, head_dim)`.
        cu_seq_lens_q, cu_seq_lens_k: where the documents of the flattened batch begin, and its end, int32.
        max_length_q, max_length_k: no document is longer.

    Returns:
        The output `(batch, queries, heads, head_dim)`, and no weights.
    """
    if cu_seq_lens_q is None or not has_varlen_kernel(query.device.type, query.dtype):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    lengths = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
    window = -1 if sliding_window is None else sliding_window - 1, 0  # tokens before and after that one sees
    output = varlen_attn(*flat, *lengths, scale=scaling, window_size=window)
    return output.view(query.shape[0], -1, *output.shape[1:]), None


if HAS_VARLEN:
    AttentionInterface.register("varlen", varlen_attention_forward)
    AttentionMaskInterface.register("varlen", sdpa_mask)
