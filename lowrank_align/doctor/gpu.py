"""GPUs: whether torch and bitsandbytes have code for them, or why torch sees none."""

import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lowrank_align.doctor.finding import Finding, first_line

Capability = tuple[int, int]

SELECTOR = "PyTorch's install selector names the build"
BITSANDBYTES_NEEDS: Capability = (6, 0)  # its README's table; from 7.5 on all of it is fast
BITSANDBYTES_LIKES: Capability = (7, 5)
GIB = 2**30
LITTLE_BYTES = 4 * GIB


def gpus() -> list[Finding]:
    """torch's build, and each GPU: whether torch and bitsandbytes have kernels for it, its memory, bf16."""
    import torch

    build = next(
        (f"{name} {version}" for name, version in _builds(torch).items() if version), "built for CPUs and Apple GPUs"
    )
    found = [Finding("torch", "ok", f"{torch.__version__}, {build}")]
    available, reason = _cuda_available(torch)
    if available:
        return found + [_cuda_gpu(torch, i) for i in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        names = [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
        return [*found, *(Finding("GPU", "ok", f"{name} (XPU)") for name in names)]
    return [*found, _no_gpu(torch, reason)]


def training_device(found: Sequence[Finding]) -> str | None:
    """The device that training takes by itself; the CPU in place of a GPU that cannot be used; None without torch."""
    if not found:
        return None
    if any(finding.level == "problem" for finding in found):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"


def kernels_for(capability: Capability, architectures: Sequence[str]) -> Literal["built", "compiled at start", "none"]:
    """Whether torch has machine code for a GPU, from `torch.cuda.get_arch_list()`.

    `sm_86` runs on 8.6 and every later 8.x; `compute_90` is code that the driver compiles for 9.0 and everything later;
    with a letter (`sm_90a`) it is for that one alone.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = number.rstrip("abcdef")
        if kind != "sm" or not digits.isdigit():
            continue
        major, minor = divmod(int(digits), 10)
        if capability == (major, minor) or (digits == number and capability[0] == major and capability[1] >= minor):
            return "built"
    compiled = [name.removeprefix("compute_") for name in architectures if name.startswith("compute_")]
    if any(number.isdigit() and divmod(int(number), 10) <= capability for number in compiled):
        return "compiled at start"
    return "none"


def _builds(torch: Any) -> dict[str, str | None]:
    return {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}


def _cuda_available(torch: Any) -> tuple[bool, str]:
    """And what torch warns of where it is not."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        available = bool(torch.cuda.is_available())
    return available, first_line(heard[0].message) if heard else ""


def _cuda_gpu(torch: Any, index: int) -> Finding:
    try:
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        architectures = list(torch.cuda.get_arch_list())
        rocm = _rocm_architecture(torch, index)
    except Exception as error:  # a driver in trouble
        advice = "nvidia-smi shows whether its driver is well; --device cpu goes without it"
        return Finding("GPU", "problem", f"GPU {index} cannot be asked: {first_line(error)}", advice)
    number = rocm or f"capability {capability[0]}.{capability[1]}{_driver(index)}"
    what = f"{name}, {number}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {'bf16' if bf16 else 'fp16 (no bf16)'}"
    if rocm:
        return _amd(what, rocm, architectures, free)
    kernels = kernels_for(capability, architectures)
    if capability < BITSANDBYTES_NEEDS:
        return Finding("GPU", "problem", f"{what}; too old for bitsandbytes (6.0 and up)", "--device cpu")
    if kernels == "none":
        listed = ", ".join(name for name in architectures if name.startswith("sm_"))
        older = capability < min(
            (divmod(int(n[3:]), 10) for n in listed.split(", ") if n[3:].isdigit()), default=(0, 0)
        )
        which = "one for an older CUDA" if older else "a newer one"
        advice = f"install another torch build, {which} ({SELECTOR}), or --device cpu"
        return Finding("GPU", "problem", f"{what}; this torch has no code for it (only {listed})", advice)
    if kernels == "compiled at start":
        advice = f"works, but the driver compiles at first start (minutes); a newer build has its code ({SELECTOR})"
        return Finding("GPU", "warning", f"{what}; newer than this torch", advice)
    if capability < BITSANDBYTES_LIKES:
        return Finding("GPU", "warning", what, "works, slowly: bitsandbytes recommends 7.5 (RTX 20, GTX 16) and up")
    return _with_memory(what, free)


def _amd(what: str, architecture: str, architectures: Sequence[str], free: int) -> Finding:
    if architecture not in architectures:
        advice = f"install a torch build for it ({SELECTOR}), or --device cpu"
        return Finding("GPU", "problem", f"{what}; this torch has no code for it ({', '.join(architectures)})", advice)
    return _with_memory(what, free)


def _with_memory(what: str, free: int) -> Finding:
    if free < LITTLE_BYTES:
        return Finding("GPU", "warning", what, "little of it is free: close what else uses it; `plan` shows what fits")
    return Finding("GPU", "ok", what)


def _rocm_architecture(torch: Any, index: int) -> str | None:
    """`gfx1100` and the like; None on CUDA."""
    if torch.version.hip is None:
        return None
    return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]


def _no_gpu(torch: Any, reason: str) -> Finding:
    """Why torch sees no GPU, as far as it can be told. Training runs on the CPU then: no problem, but slow."""
    seen = _nvidia_smi()
    if seen and torch.version.cuda is None:
        advice = f"install torch for CUDA ({SELECTOR}); until then training runs on the CPU"
        return Finding("GPU", "warning", f"{'; '.join(seen)}: not used, this torch is not built for CUDA", advice)
    if seen:
        because = f": {reason}" if reason else ""
        advice = f"update its driver to one for CUDA {torch.version.cuda}; until then training runs on the CPU"
        return Finding("GPU", "warning", f"{'; '.join(seen)}: not used, CUDA does not start{because}", advice)
    if Path("/dev/kfd").exists() and torch.version.hip is None:
        advice = f"install torch for ROCm ({SELECTOR}); until then training runs on the CPU"
        return Finding("GPU", "warning", "an AMD GPU: not used, this torch is not built for ROCm", advice)
    if torch.backends.mps.is_available():
        advice = "training runs on the CPU; --device mps --quantize none uses it"
        return Finding("GPU", "warning", "an Apple GPU: not used, NF4 does not run on it here", advice)
    advice = "training runs on the CPU: enough for tiny and for models of a few hundred million weights"
    return Finding("GPU", "warning", "none", advice)


def _nvidia_smi(fields: str = "name,driver_version,compute_cap") -> list[str]:
    """A line a GPU as the driver's own tool sees it; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in out.splitlines() if line.strip()]


def _driver(index: int) -> str:
    versions = _nvidia_smi("driver_version")
    return f", driver {versions[min(index, len(versions) - 1)]}" if versions else ""
