"""
A model made ready to write text on a CPU.

Decoding reads every weight once a token, so what counts is how fast they are read and how little happens in between:
the weights that stream by push everything else out of the caches, and each small operation then takes three times as
long. A plain 16-bit linear layer lays its weights out anew for the CPU's matrix unit at every call; here that is done
once, layers that read the same input become one product, and the residual is added by the product itself. Weights that
float16 holds as they are (those of a checkpoint in bfloat16) are read in 16 bits where the CPU computes in float32. With
8-bit weights there is half as much to read, and more numbers fit a register.
"""

import ctypes
import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError
from ..functional_hf_lm import CACHE_NAME, eager_attention_forward
from ..hardware import has_fast_bfloat16
from ..modeling_hf_lm import (
    HfLmAttention,
    HfLmDecoderLayer,
    HfLmForCausalLM,
    HfLmMLP,
    HfLmRMSNorm,
    HfLmRotaryEmbedding,
)

HUGE_PAGE = 2**21  # bytes
HAS_FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")  # products with 16- and 8-bit weights


def has_vnni() -> bool:
    """Whether the CPU has AVX512-VNNI, whose 8-bit matmuls do not overflow in between."""
    if hasattr(torch.cpu, "get_capabilities"):  # which older releases of torch lack
        return torch.cpu.get_capabilities().get("avx512_vnni", False)
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512_vnni" in path.read_text(encoding="utf-8")


HAS_VNNI = has_vnni()


@cache
def computes_in_bfloat16() -> bool:
    """Whether a model in bfloat16 stays in it: where its matmuls are fast, or, without FBGEMM, where there are any."""
    if HAS_FBGEMM:
        return has_fast_bfloat16("cpu")
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), 1)
    except RuntimeError:
        return False
    return True


def fits_half(weight: torch.Tensor, error: float) -> bool:
    """Whether rounding float32 weights `(out, in)` to float16 moves no row by more than this share of its norm."""
    moved, size = (weight - weight.half()).norm(dim=1), weight.norm(dim=1)
    return bool((moved <= error * size).all())


def pack_int8(weight: torch.Tensor):
    """Float32 weights `(out, in)` rounded to 8 bits, with one scale for each output, and laid out for FBGEMM."""
    largest = weight.abs().amax(dim=1)
    if not HAS_VNNI:  # then the products of two neighbours are added up in 16 bits, which 255 * 128 fit
        largest = largest.maximum((weight[:, 1:] + weight[:, :-1]).abs().amax(dim=1))
    scales, zeros = (largest / 127).clamp(min=1e-12), torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():  # a release after those that `pyproject.toml` allows will have no such tensors
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None)


class PackedLinear(nn.Module):
    """
    The outputs of linear layers of the same input, side by side: `(..., in)` -> `(..., sum of out)`.

    Args:
        layers: each with a bias, or none of them.
        bits: of the weights. 8: with one scale for each output; each row of inputs is rounded to 8 bits, too, as it is
            multiplied; sums and outputs are float32. 16: float16 where a float32 model's fit its range. None: float16
            where it holds them as they are. Without FBGEMM weights always stay as they are.

    Attributes:
        weight_bytes (`int`): bytes read for a matmul of one row.
    """

    def __init__(self, *layers: nn.Linear, bits: int | None = None):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        error = 2**-11 if bits == 16 else torch.finfo(torch.float32).eps
        self.in_int8 = HAS_FBGEMM and bits == 8
        self.in_half = HAS_FBGEMM and bits != 8 and weight.dtype == torch.float32 and fits_half(weight, error)
        if self.in_int8:
            self.packed = pack_int8(weight.float())
            self.sums = torch.ops.quantized.linear_dynamic(torch.ones(1, weight.shape[1]), self.packed, False)[0]
        elif self.in_half:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.weight_bytes = weight.numel() * (1 if self.in_int8 else 2 if self.in_half else weight.itemsize)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The outputs, added to `residual` where given."""
        if self.in_half:
            y = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)
        elif self.in_int8:
            y = self._multiply_int8(x)
        elif residual is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        else:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        if self.bias is not None:
            y.add_(self.bias)
        return y if residual is None else y.add_(residual)

    __call__ = forward  # nobody hooks these: looking for hooks takes 2% of a step

    def _multiply_int8(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        if x.numel() == x.shape[-1]:
            y = torch.ops.quantized.linear_dynamic(exact, self.packed, False)
        else:
            # The product rounds to whole numbers from 0 to 255, to which each row is scaled and shifted (0 to a whole one).
            low, high = exact.amin(dim=-1, keepdim=True), exact.amax(dim=-1, keepdim=True)
            step = (high - low).div_(254).clamp_(min=1e-12)
            shift = low.div_(step).round_()
            multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
            y = multiply((exact / step).sub_(shift), 1.0, 0, self.packed).addcmul_(shift, self.sums).mul_(step)
        return y.to(x.dtype)

    def separate(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output of each layer by itself."""
        return torch.split_with_sizes(self(x), self.sizes, dim=-1)


class Projected(NamedTuple):
    """What `HfLmAttention` projects from hidden states of this shape."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    shape: torch.Size


class PackedAttention(HfLmAttention):
    """`HfLmAttention` whose projections are one matmul: its `q_proj`, `k_proj` and `v_proj` take their part of it."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        projected = Projected(*self.qkv_proj.separate(hidden_states), hidden_states.shape)
        return super().forward(projected, *args, **kwargs)


class PackedGatedMLP(nn.Module):
    """`HfLmMLP` with a gate: gate and up projection are one product."""

    def __init__(self, mlp: HfLmMLP, up_bits: int | None, down_bits: int | None):
        super().__init__()
        self.gate_up_proj = PackedLinear(mlp.gate_proj, mlp.up_proj, bits=up_bits)
        self.down_proj = PackedLinear(mlp.down_proj, bits=down_bits)
        self.act_fn = mlp.act_fn

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = self.gate_up_proj.separate(hidden_states)
        return self.down_proj(self.act_fn(gate) * up, residual)

    __call__ = forward


class PackedRMSNorm(nn.Module):
    """`HfLmRMSNorm` in fewer operations: `x / hypot(|x|, sqrt(n * eps)) * (sqrt(n) * weight)`."""

    def __init__(self, norm: HfLmRMSNorm):
        super().__init__()
        size = norm.weight.numel()
        self.least = torch.tensor((size * norm.eps) ** 0.5)
        self.scaled = (norm.weight.detach().float() + norm.offset) * size**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).hypot_(self.least)
        return (exact / length).mul_(self.scaled).to(x.dtype)

    __call__ = forward


class SignedRotaryEmbedding(nn.Module):
    """The cosines, and the sines negated in their first half: `rotate_half(x) * sin` is then `roll(x) * sin`."""

    def __init__(self, rotary: HfLmRotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(x, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2)


def append(
    cache: Cache, key: torch.Tensor, value: torch.Tensor, index: int, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `cache.update(key, value, index, kwargs=kwargs)`, `(batch, heads, tokens, head_dim)`, that does not copy all tokens for
    each new one: there is room for as many again. Only what has no room left, or was replaced since (by the choice of beams), is copied.
    """
    layers = getattr(cache, "layers", ())  # a paged cache has none
    layer = layers[index] if index < len(layers) else None
    if type(layer) is not DynamicLayer or not layer.get_seq_length() or cache.offloading:
        return cache.update(key, value, index, kwargs=kwargs)
    (*sizes, length, _), rooms = layer.keys.shape, getattr(layer, "rooms", None)
    total = length + key.shape[-2]
    ours = rooms is not None and rooms[0].data_ptr() == layer.keys.data_ptr() and [*rooms[0].shape[:2]] == sizes
    if not ours or rooms[0].shape[-2] < total:
        layer.rooms = rooms = []
        for old in (layer.keys, layer.values):
            rooms.append(old.new_empty((*sizes, 2 * total, old.shape[3])))
            rooms[-1][:, :, :length] = old
    for room, new in zip(rooms, (key, value), strict=True):
        room.narrow(2, length, total - length).copy_(new)  # in less time than indexed
    layer.keys, layer.values = (room.narrow(2, 0, total) for room in rooms)
    return layer.keys, layer.values


class PackedDecoderLayer(HfLmDecoderLayer):
    """A packed layer of the Llama kind (see `is_plain`) in as few operations as it takes."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs) -> torch.Tensor:
        past_key_values = kwargs.pop(CACHE_NAME, None)
        attention, (batch, length, _), (cos, sin) = self.self_attn, hidden_states.shape, position_embeddings
        heads, kv_heads, size = self.heads, self.heads // attention.num_key_value_groups, attention.head_dim
        projected = attention.qkv_proj(self.input_layernorm(hidden_states)).view(batch, length, -1, size)
        turning, value = torch.split_with_sizes(projected, (heads + kv_heads, kv_heads), dim=2)
        turned = (turning * cos).addcmul_(turning.roll(size // 2, dims=-1), sin).transpose(1, 2)
        query, key = torch.split_with_sizes(turned, (heads, kv_heads), dim=1)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = append(past_key_values, key, value, attention.layer_idx, kwargs)
        kind = attention.config._attn_implementation
        if kind == "sdpa" and length == 1 and attention_mask is None:
            # Heads that share keys are as several queries of one head.
            query = query.reshape(batch, kv_heads, -1, size)
            output = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
            output, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
        hidden_states = attention.o_proj(output.reshape(batch, length, -1), hidden_states)
        return self.mlp(self.post_attention_layernorm(hidden_states), hidden_states)


def use_huge_pages(layers: list[PackedLinear]) -> None:
    """
    Ask Linux to hold the weights in pages of 2 MiB. What is read once from end to end otherwise takes a look into the
    page tables every 4 KiB. No more than a hint: where the kernel cannot (before 6.1, no memory in one piece), all
    stays unchanged.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for layer in layers:
        if layer.in_half or layer.in_int8:  # whose memory is not to be had
            continue
        start = torch.ops.mkldnn.data_ptr(layer.packed)
        end = -(-(start + layer.weight_bytes) // HUGE_PAGE) * HUGE_PAGE
        start = start // HUGE_PAGE * HUGE_PAGE
        for advice in (14, 25):  # MADV_HUGEPAGE, MADV_COLLAPSE
            madvise(start, end - start, advice)


def without_bookkeeping(forward: Callable) -> Callable:
    """For the layers, not the logits, which generation may change in place."""

    @wraps(forward)
    def wrapped(*args, **kwargs):
        # FBGEMM's packed weights are objects that PyTorch asks at each product whether they override it. The exception in
        # which that ends takes 10 us, two thirds of a small product.
        with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
            return forward(*args, **kwargs)

    return wrapped


def is_plain(config: HfLmConfig) -> bool:
    """Whether the layers are of the Llama kind, all with the same rotary positions over the whole head."""
    rotated = (config.rope_parameters or {}).get("partial_rotary_factor") or 1.0
    return (
        config.norm_position == "pre"
        and config.parallel_residual == "none"
        and config.residual_multiplier == 1.0
        and config.mlp_type == "gated"
        and config.position_embedding_type == "rope"
        and not (config.rope_interleaved or config.no_rope_layers or config.qk_norm or config.attn_logit_softcapping)
        and set(config.layer_types) == {"full_attention"}
        and rotated == 1.0
    )


def can_optimize(model: nn.Module) -> bool:
    """Whether `optimize_for_inference` takes the model: a plain hf_lm one on a CPU whose kernels know its dtype."""
    return (
        isinstance(model, HfLmForCausalLM)
        and model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and (model.dtype == torch.float32 or computes_in_bfloat16() or HAS_FBGEMM)
        and all(type(layer.mlp) is HfLmMLP for layer in model.model.layers)  # no other block is packed yet
        and all(type(m) is nn.Linear for name, m in model.named_modules() if name.endswith(("_proj", "lm_head")))
    )


def optimize_where_it_pays(model: nn.Module, int8: bool = False) -> None:
    """`optimize_for_inference` if asked for 8 bits, or if the model is in bfloat16, where laying out weights costs most."""
    if int8 or (model.dtype == torch.bfloat16 and can_optimize(model)):
        optimize_for_inference(model, int8)


def optimize_for_inference(model: HfLmForCausalLM, int8: bool = False) -> HfLmForCausalLM:
    """
    Replace, in place, the linear layers by packed ones. The model then writes text, and computes logits and losses as
    before, faster; it can no longer be trained or saved.

    Args:
        model: in bfloat16 or float32, on a CPU. One in bfloat16 goes to float32 where the CPU does not compute in bfloat16.
        int8: round the weights of the linear layers to 8 bits (see `PackedLinear`); without VNNI those of the MLPs' second
            projections to 16, for there 8 would cost as much quality as all else together.

    Raises:
        InputError: `can_optimize` says no.
    """
    if not can_optimize(model):
        raise InputError(
            "model: must be an hf_lm model without adapters, in float32 or bfloat16, on a CPU that PyTorch packs it for, got "
            f"{type(model).__name__} in {model.dtype} on {model.device}."
        )

    def refuse(*args, **kwargs):
        raise InputError("model: was optimized for inference, which cannot be saved. Load it anew to save it.")

    model.eval().requires_grad_(False)
    if not computes_in_bfloat16():
        model.float()
    plain = is_plain(model.config)
    if plain:
        model.model.rotary_emb = SignedRotaryEmbedding(model.model.rotary_emb)
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, HfLmRMSNorm):
                setattr(module, name, PackedRMSNorm(norm))
    bits, down_bits = (8, 8 if HAS_VNNI else 16) if int8 else (None, None)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv_proj = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj, bits=bits)
        del attention.q_proj, attention.k_proj, attention.v_proj
        attention.q_proj, attention.k_proj, attention.v_proj = map(attrgetter, ("query", "key", "value"))
        attention.__class__ = PackedAttention
        attention.o_proj = PackedLinear(attention.o_proj, bits=bits)
        if mlp.gate_proj is not None:
            layer.mlp = PackedGatedMLP(mlp, bits, down_bits)
        else:
            mlp.up_proj = PackedLinear(mlp.up_proj, bits=bits)
            mlp.down_proj = PackedLinear(mlp.down_proj, bits=down_bits)
        if plain:
            layer.__class__ = PackedDecoderLayer
            layer.heads = model.config.num_attention_heads
    model.lm_head = PackedLinear(model.lm_head, bits=bits)
    use_huge_pages([module for module in model.modules() if isinstance(module, PackedLinear)])
    model.model.forward = without_bookkeeping(model.model.forward)
    model.save_pretrained = refuse
    return model
