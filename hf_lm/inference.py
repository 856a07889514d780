"""
A model made ready to write text on a CPU.

Decoding reads every weight once a token, so what counts is how fast they are read and how little happens in between:
the weights that stream by push everything else out of the caches, and each small operation then takes three times as
long. A plain 16-bit linear layer lays its weights out anew for the CPU's matrix unit at every call; here that is done
once, layers that read the same input become one product, and the residual is added by the product itself. Weights that
float16 holds as they are (those of a checkpoint in bfloat16) are read in 16 bits where the CPU computes in float32. With
8-bit weights there is half as much to read.
"""

import ctypes
import sys

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hf_lm import HfLmConfig
from .errors import InputError
from .functional_hf_lm import eager_attention_forward
from .modeling_hf_lm import HfLmDecoderLayer, HfLmForCausalLM, HfLmMLP, HfLmRMSNorm, HfLmRotaryEmbedding

HUGE_PAGE = 2**21  # bytes
HAS_HALF = torch.backends.quantized.engine in ("x86", "fbgemm")  # FBGEMM: float32 inputs, float16 weights
HAS_INT8 = getattr(torch.cpu, "_is_vnni_supported", bool)()  # products of 8 bits that do not overflow between


def computes_in_bfloat16() -> bool:
    """Whether oneDNN multiplies in it on this CPU, fast or not (fast: `training.hardware.has_fast_bfloat16`)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fits_half(weight: torch.Tensor, error: float) -> bool:
    """Whether rounding float32 weights `(out, in)` to float16 moves no row by more than this share of its norm."""
    moved, size = (weight - weight.half()).norm(dim=1), weight.norm(dim=1)
    return bool((moved <= error * size).all())


class PackedLinear(nn.Module):
    """
    The outputs of linear layers of the same input, side by side: `(..., in)` -> `(..., sum of out)`.

    Args:
        layers: each with a bias, or none of them.
        int8: round the weights to 8 bits, with one scale for each output. Where the CPU has products of 8 bits, weights are
            kept twice: one or two rows of inputs (decoding) are multiplied as they are, in bfloat16; of more, each
            input becomes two 8-bit numbers, that is 16 bits of the largest in its row, and the products add up exactly
            in 32 bits. Where it has none, the rounded weights are read in 16 bits: as fast as those not rounded.

    Attributes:
        weight_bytes (`int`): so many are read to multiply one row.
    """

    def __init__(self, *layers: nn.Linear, int8: bool = False):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        dtype = weight.dtype
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        if int8:
            # In the dtype that the small product takes: the weights are rounded with what it multiplies by.
            scales = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
            self.scales = scales.float()
            rounded = (weight.float() / self.scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.int8 = int8 and HAS_INT8
        if self.int8:
            self.rounded, self.small_scales = rounded, scales
            self.zeros, self.middle = torch.zeros(len(weight), dtype=torch.long), torch.tensor(128.0)
            self.packed = torch.ops.onednn.qlinear_prepack(rounded, [1, weight.shape[1]])
        elif int8:
            weight = rounded * self.scales[:, None]
        # 8 bits moved the weights by up to 1/254 of the largest in the row: what float16 adds does not count.
        error = 2**-11 if int8 else torch.finfo(torch.float32).eps
        self.in_half = HAS_HALF and not self.int8 and weight.dtype == torch.float32 and fits_half(weight, error)
        if self.in_half:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        elif not self.int8:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 1)
        self.weight_bytes = weight.numel() * (2 if self.in_half else 1 if self.int8 else dtype.itemsize)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The outputs, added to `residual` where given."""
        if self.in_half:
            y = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)
        elif self.int8:
            y = self._multiply_int8(x)
        elif residual is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        else:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        if self.bias is not None:
            y.add_(self.bias)
        return y if residual is None else y.add_(residual)

    def _multiply_int8(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= 2 and rows.shape[1] % 16 == 0:  # the kernel reads 16 at a time
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.rounded, self.small_scales)
        else:
            y = self._multiply_halves(rows)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiply_halves(self, rows: torch.Tensor) -> torch.Tensor:
        exact = rows.float()
        largest = torch.linalg.vector_norm(exact, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-12)
        # n = 256 * high + low, both in [-128, 127]: add 128, and the lower byte is low + 128; its top bit turned, low.
        numbers = torch.add(self.middle, exact / largest, alpha=32512).to(torch.int16).bitwise_xor_(128)
        halves = numbers.view(torch.int8).unflatten(-1, (-1, 2)).movedim(-1, 0)
        low, high = torch.ops.onednn.qlinear_pointwise(
            halves.contiguous(),
            1 / 32512,
            0,
            self.packed,
            self.scales,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return low.add_(high, alpha=256).mul_(largest)

    def separate(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output of each layer by itself."""
        return self(x).split(self.sizes, dim=-1)


class PackedGatedMLP(nn.Module):
    """`HfLmMLP` with a gate: gate and up projection are one product."""

    def __init__(self, mlp: HfLmMLP, int8: bool):
        super().__init__()
        self.gate_up_proj = PackedLinear(mlp.gate_proj, mlp.up_proj, int8=int8)
        self.down_proj = PackedLinear(mlp.down_proj, int8=int8)
        self.act_fn = mlp.act_fn

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = self.gate_up_proj.separate(hidden_states)
        return self.down_proj(self.act_fn(gate) * up, residual)


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


class SignedRotaryEmbedding(nn.Module):
    """The cosines, and the sines negated in their first half: `rotate_half(x) * sin` is then `roll(x) * sin`."""

    def __init__(self, rotary: HfLmRotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(x, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2)


class PackedDecoderLayer(HfLmDecoderLayer):
    """A packed layer of the Llama kind (see `is_plain`) in as few operations as it takes."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ) -> torch.Tensor:
        attention, (batch, length, _), (cos, sin) = self.self_attn, hidden_states.shape, position_embeddings
        heads, kv_heads, size = self.heads, self.heads // attention.num_key_value_groups, attention.head_dim
        projected = attention.qkv_proj(self.input_layernorm(hidden_states)).view(batch, length, -1, size)
        turning, value = projected.split((heads + kv_heads, kv_heads), dim=2)
        turned = (turning * cos).addcmul_(turning.roll(size // 2, dims=-1), sin).transpose(1, 2)
        query, key, value = turned[:, :heads], turned[:, heads:], value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        kind = attention.config._attn_implementation
        if kind == "sdpa" and length == 1 and attention_mask is None:  # what the library's function comes to
            output = nn.functional.scaled_dot_product_attention(
                query, key, value, scale=attention.scaling, enable_gqa=heads != kv_heads
            ).transpose(1, 2)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
            output, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
        hidden_states = attention.o_proj(output.reshape(batch, length, -1), hidden_states)
        return self.mlp(self.post_attention_layernorm(hidden_states), hidden_states)


def use_huge_pages(layers: list[PackedLinear]) -> None:
    """
    Ask Linux to hold the weights in pages of 2 MiB. What is read once from end to end otherwise takes a look into the
    page tables every 4 KiB. No more than a hint: where the kernel cannot (before 6.1, no memory in one piece), all
    stays as it was.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for layer in layers:
        if layer.in_half:  # whose memory is not to be had
            continue
        start, size = torch.ops.mkldnn.data_ptr(layer.packed), torch.ops.mkldnn._nbytes(layer.packed)
        end = -(-(start + size) // HUGE_PAGE) * HUGE_PAGE
        start = start // HUGE_PAGE * HUGE_PAGE
        for advice in (14, 25):  # MADV_HUGEPAGE, MADV_COLLAPSE
            madvise(start, end - start, advice)


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
        and (model.dtype == torch.float32 or computes_in_bfloat16() or HAS_HALF)
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
        int8: round the weights of the linear layers to 8 bits (see `PackedLinear`).

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
            if type(norm) is HfLmRMSNorm:
                setattr(module, name, PackedRMSNorm(norm))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv_proj = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj, int8=int8)
        attention.project = attention.qkv_proj.separate
        del attention.q_proj, attention.k_proj, attention.v_proj
        attention.o_proj = PackedLinear(attention.o_proj, int8=int8)
        if mlp.gate_proj is not None:
            layer.mlp = PackedGatedMLP(mlp, int8)
        else:
            mlp.up_proj, mlp.down_proj = PackedLinear(mlp.up_proj, int8=int8), PackedLinear(mlp.down_proj, int8=int8)
        if plain:
            layer.__class__ = PackedDecoderLayer
            layer.heads = model.config.num_attention_heads
    model.lm_head = PackedLinear(model.lm_head, int8=int8)
    use_huge_pages([module for module in model.modules() if isinstance(module, PackedLinear)])
    # Less to keep book of; the logits are made outside of it, for generation may change them in place.
    model.model.forward = torch.inference_mode()(model.model.forward)
    model.save_pretrained = refuse
    return model
