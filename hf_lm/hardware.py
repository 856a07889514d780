"""What this machine is: its kind of device, memory, power and speed; and how the allocator treats freed memory."""

import ctypes
import gc
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


def device_type() -> str:
    """The kind of device that training runs on: "cpu", "cuda", ..."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 matmuls are faster than float32 ones on a device (on a CPU: AMX or AVX512-BF16)."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


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


def describe_hardware(device: torch.device) -> str:
    """The processor or accelerator, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory() -> int:
    """The most memory that this process has had so far, bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_of(device: torch.device) -> float:
    """Bytes that the device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(psutil.virtual_memory().total)


@dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet: memory (bytes), peak of dense bfloat16 matmuls (1/s), board power (W)."""

    watts: int
    memory: float | None = None
    peak_flops: float | None = None


# By the name that the driver's description of the device holds. SXM models where there are several.
DEVICES = {
    "H100": Device(700, 80e9, 989e12),
    "H200": Device(700, 141e9, 989e12),
    "B200": Device(1000),
    "A100": Device(400, 80e9, 312e12),
    "4090": Device(450, 24e9, 165e12),
    "L40": Device(300),
    "L4": Device(72),
    "T4": Device(70),
    "V100": Device(300),
}
WATTS_PER_CPU_CORE = 10  # assumed, of one busy core with its share of memory and board


def assumed_watts(hardware: str | None) -> int | None:
    """The power draw assumed for a hardware description such as "1x NVIDIA H100" or "AMD EPYC, 2 cores"; or None."""
    for name, device in DEVICES.items():
        if hardware and re.search(rf"\b{name}\b", hardware):
            devices = re.search(r"(\d+)\s*[x×]", hardware)
            return device.watts * int(devices[1] if devices else 1)
    cores = re.search(r"(\d+)\s*(?:CPU\s*)?(?:cores?|threads?)\b", hardware or "", flags=re.IGNORECASE)
    return WATTS_PER_CPU_CORE * int(cores[1]) if cores else None
