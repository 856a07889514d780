"""What the machine is good at, and how to get it."""

import ctypes
import gc
import sys

import torch


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


def best_attention(device: str, block_size: int) -> str | None:
    """
    The attention implementation to train with; None for the library's choice.

    On a CPU, the backward of PyTorch's fused kernel costs more than writing out short attention: at 128 tokens 5.2 ms
    against 1.7 ms a layer (batch 8, 4 heads of 32, two cores, bfloat16).
    """
    return "eager" if device == "cpu" and block_size <= 512 else None


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
