"""What is in memory: this process's peak, on the GPU where the base is there, else in RAM; a model's weights."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

M_MMAP_THRESHOLD = -3  # malloc.h
OWN_PAGES_FROM_BYTES = 2**22


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement where the system allows it (CUDA; Linux); elsewhere the peak is the process's whole."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """What this process holds in RAM now."""
    return psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """What a new model could take: free on the GPU, or available in RAM."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "xpu":
        return int(torch.xpu.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)


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


def steady_heap() -> None:
    """Give every tensor of four megabytes or more pages of its own, which go back to the system with it (glibc).

    By default the C library learns to keep larger and larger blocks in its heap, where training's tensors leave gaps
    that the next ones do not fill. Fresh pages cost time, which is why smaller ones stay there (docs/log.md).
    `MALLOC_MMAP_THRESHOLD_` keeps its say.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, OWN_PAGES_FROM_BYTES)


def release_unused() -> None:
    """Give freed heap back to the system, where the C library can (glibc): rollouts leave it in small pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def bytes_of(model: nn.Module, parameters: Iterable[Tensor]) -> int:
    """Bytes of a model's parameters, with what quantisation keeps beside them; shared storage counts once."""
    int8: list[Any] = [m.state for m in model.modules() if hasattr(m, "state") and hasattr(m.state, "SCB")]
    tensors = [t for p in parameters for t in (p.data, *_quantisation_tensors(p))]
    tensors += [t for state in int8 for t in (state.CB, state.SCB) if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def copies_of(sample: Tensor) -> int:
    """How many tensors of this process have the same content, shape, type and device, the sample with them."""
    gc.collect()  # what nobody has any more is no copy
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    same = [t.detach() for t in tensors if t.shape == sample.shape and t.dtype == sample.dtype]
    return len({t.data_ptr() for t in same if t.device == sample.device and torch.equal(t, sample.detach())})


def _quantisation_tensors(parameter: Tensor) -> list[Tensor]:
    """The scales that bitsandbytes keeps beside a packed weight (nested ones too)."""
    found = [t for name in ("CB", "SCB") if isinstance(t := getattr(parameter, name, None), Tensor)]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        found += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor)]
        state = state.state2
    return found
