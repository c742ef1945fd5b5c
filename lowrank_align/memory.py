"""Peak memory of this process, on the GPU where the base is there, else in RAM."""

import ctypes
import sys
from pathlib import Path

import psutil
import torch


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement where the system allows it (CUDA; Linux); elsewhere the peak is the process's whole."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """What this process holds in RAM now."""
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_unused() -> None:
    """Give freed heap back to the system, where the C library can (glibc): rollouts leave it in small pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
