"""What the machine is good at, and how to get it."""

import ctypes
import gc
import sys

import torch
from torch import nn

from ..modeling_hf_lm import HfLmMLP

# Bytes. Computing it again took no time that could be measured (135M parameters, 2,048 tokens, AVX2: recipes/LOG.md).
KEPT_BY_MLPS = 2**28


def device_type() -> str:
    """The kind of device that training runs on: "cpu", "cuda", ..."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 there (on a CPU: AMX or AVX512-BF16)."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def best_attention(device: str, block_size: int, bfloat16: bool) -> str | None:
    """
    The attention implementation to train with; None for the library's choice.

    On a CPU, the backward of PyTorch's fused kernel costs more in bfloat16 than writing out short attention: at 128 tokens
    5.2 ms against 1.7 ms a layer (batch 8, 4 heads of 32, two cores). In float32 it costs no more, and takes less memory.
    """
    return "eager" if device == "cpu" and block_size <= 512 and bfloat16 else None


def recompute_if_large(model: nn.Module, tokens: int, itemsize: int) -> None:
    """
    Let training compute what is between the projections of the MLPs twice, where keeping it takes more than
    `KEPT_BY_MLPS`.

    Args:
        tokens: of a batch.
        itemsize: bytes of a number that products come out in.
    """
    layers = [module for module in model.modules() if isinstance(module, HfLmMLP)]
    widths = [layer.up_proj.out_features * (1 if layer.gate_proj is None else 2) for layer in layers]
    for layer in layers:
        layer.recompute = tokens * sum(widths) * itemsize > KEPT_BY_MLPS


def keep_freed_memory() -> None:
    """
    On Linux, tell malloc to keep what is freed instead of handing it back to the system.

    Training frees and takes the same megabytes every step; each return costs page faults. Written-out attention took
    1.8 ms instead of 2.9 ms this way. Elsewhere it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)


def hand_back_memory() -> None:
    """What was kept so far, of the preparation of data and models, goes back to the system: training needs other sizes."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return
