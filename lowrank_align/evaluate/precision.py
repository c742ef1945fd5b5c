"""Arithmetic in fp32 on weights that stay in 16 bits: what the weights say, without what 16-bit products add to it.

On CPUs without the instructions, 16-bit products are also ten to a hundred times slower. A whole model in fp32 would
take twice its memory, so that one block at a time is widened while it runs.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WIDENED = (torch.bfloat16, torch.float16)


@contextmanager
def fp32_arithmetic(model: nn.Module, rounding: torch.dtype | None = None) -> Iterator[None]:
    """Inside, every block of `model` has its weights in fp32 while it runs, embeddings and head all the time.

    Afterwards the 16-bit tensors are back. With `rounding`, each weight is also moved at random by up to half a unit in
    its last place of that dtype (fp32: a whole one), the same way each time: what another rounding of it would do.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    held: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}
    room: dict[tuple[int, torch.Size], Tensor] = {}  # blocks take turns in it: new pages for each would cost as much

    def widen(owner: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        held[owner] = [(p, p.data) for p in parameters if _concerns(p, rounding)]
        for place, (parameter, data) in enumerate(held[owner]):
            key = (-1 - place if owner is model else place, data.shape)
            if key not in room:
                room[key] = torch.empty_like(data, dtype=torch.float32)
            parameter.data = room[key].copy_(data)
            if rounding is not None:
                _move(parameter.data, rounding, names[parameter])

    def restore(owner: nn.Module) -> None:
        for parameter, data in held.pop(owner, []):
            parameter.data = data

    blocks = _blocks(model)
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    hooks: list[Any] = [b.register_forward_pre_hook(lambda block, _: widen(block, block.parameters())) for b in blocks]
    hooks += [b.register_forward_hook(lambda block, *_: restore(block), always_call=True) for b in blocks]
    widen(model, (p for p in model.parameters() if id(p) not in within))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner in list(held):  # the model, and a block whose forward broke off
            restore(owner)


def _blocks(model: nn.Module) -> set[nn.Module]:
    """The members of the outermost lists of modules: a decoder's layers, which may use each other's parts directly."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)]
    return {block for each in outer for block in each}


def _concerns(parameter: nn.Parameter, rounding: torch.dtype | None) -> bool:
    return parameter.dtype in WIDENED or (rounding is not None and parameter.dtype == torch.float32)


def _move(values: Tensor, dtype: torch.dtype, name: str) -> None:
    """In place. The bits of a float count its units in the last place: those of `dtype` are so many of fp32's."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator(values.device).manual_seed(seed)
    half = max(1, round(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) // 2)
    bits = values.view(torch.int32)
    steps = torch.randint(-half, half + 1, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    bits += steps.mul_((bits & 0x7FFFFFFF) > half)  # not across zero
