"""Arithmetic in fp32 on weights that stay in 16 bits: what the weights say, without what 16-bit products add to it.

On CPUs without the instructions, 16-bit products are also ten to a hundred times slower. A whole model in fp32 would
take twice its memory, so that one block at a time is widened while it runs.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_align.export.verify import spacing

WIDENED = (torch.bfloat16, torch.float16)


@contextmanager
def fp32_arithmetic(model: nn.Module, rounding: torch.dtype | None = None) -> Iterator[None]:
    """Inside, every block of `model` has its weights in fp32 while it runs; its 16-bit tensors are untouched.

    With `rounding`, each weight is also moved at random by up to half a unit in its last place of that dtype (fp32: a
    whole one), the same way each time: what another rounding of these weights would do.
    """
    held: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def widen(module: nn.Module, _inputs: Any) -> None:
        held[module] = [(p, p.data) for p in _own(module, module in blocks) if _concerns(p, rounding)]
        for parameter, data in held[module]:
            wide = data.float()
            parameter.data = wide if rounding is None else _moved(wide, rounding, names[parameter])

    def restore(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for parameter, data in held.pop(module, []):
            parameter.data = data

    blocks = _blocks(model)
    inside = {part for block in blocks for part in block.modules()}
    units = [*blocks, *(m for m in model.modules() if m not in inside and any(True for _ in m.parameters(False)))]
    hooks = [h for m in units for h in (m.register_forward_pre_hook(widen), _after(m, restore))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(held):  # a forward that broke off
            restore(module, None, None)


def _after(module: nn.Module, restore: Any) -> Any:
    return module.register_forward_hook(restore, always_call=True)


def _blocks(model: nn.Module) -> set[nn.Module]:
    """The members of the outermost lists of modules: a decoder's layers, which may use each other's parts directly."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)]
    return {block for each in outer for block in each}


def _own(module: nn.Module, whole: bool) -> list[nn.Parameter]:
    return list(module.parameters(recurse=whole))


def _concerns(parameter: nn.Parameter, rounding: torch.dtype | None) -> bool:
    return parameter.dtype in WIDENED or (rounding is not None and parameter.dtype == torch.float32)


def _moved(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator(values.device).manual_seed(seed)
    shift = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    units = 2.0 if dtype == torch.float32 else 1.0  # fp32 itself holds no half units
    return values + units * shift * spacing(values, dtype)
