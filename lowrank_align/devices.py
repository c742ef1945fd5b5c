"""Where a base runs and in which numbers, and what a machine cannot do."""

import os
from typing import Literal

import torch

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.workers import local_rank

Quantize = Literal["nf4", "int8", "none"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_device(device: str, quantize: Quantize, attention: Attention) -> torch.device:
    """The device, where it can do what is asked of it; EnvironmentProblem otherwise."""
    where = pick_device(device)
    if quantize != "none" and where.type == "mps":
        raise EnvironmentProblem(
            "--quantize: bitsandbytes has no Apple GPU support; use --quantize none or --device cpu"
        )
    if attention == "flex_attention" and where.type == "cpu":  # torch has no backward for it there, and may crash
        raise EnvironmentProblem("--attention flex_attention needs a GPU; use auto on the CPU")
    return where


def pick_device(device: str) -> torch.device:
    """`auto` takes the first of CUDA (also ROCm), XPU, CPU. EnvironmentProblem for a GPU that is not there.

    Of several processes on a machine each takes a GPU of its own, by its place among them.
    """
    place = local_rank()
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device() if place is None else place)
        if torch.xpu.is_available():
            return torch.device("xpu" if place is None else f"xpu:{place}")
        return torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: unknown; use auto, cpu, cuda, cuda:N, xpu or mps") from error
    if place is not None and wanted.type in ("cuda", "xpu"):
        if wanted.index is not None:
            raise UserError(f"--device {device}: each process takes a GPU of its own; leave the number out")
        wanted = torch.device(wanted.type, place)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}
    present["mps"] = torch.backends.mps.is_available()
    if not present.get(wanted.type, False):
        raise EnvironmentProblem(
            f"--device {device}: this torch ({torch.__version__}) sees no such device; use --device cpu, "
            "or install the torch build for your GPU (PyTorch's install selector names it)"
        )
    if wanted.type == "cuda" and wanted.index is not None and wanted.index >= torch.cuda.device_count():
        raise EnvironmentProblem(f"--device {device}: there are only {torch.cuda.device_count()} GPUs")
    return wanted


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bf16 where the GPU has it, fp16 on older ones, fp32 on CPU (bf16 without its instructions is 10-100x slower)."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "xpu" else torch.float32
