"""A linear layer with one LoRA adapter, forward and backward, without PEFT's extra copies.

PEFT computes `W x + scaling * B(A(x))` in steps that autograd sees one by one: the product is copied to be scaled, and
again to be added, and the same in the backward pass. Here the matrix products themselves add what has rank r. It takes
the place of a layer's forward where the layer is plain (see `_plain`); everything else stays PEFT's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

DENSE_COPIES_BYTES = 2**30


def speed_up(layer: LoraLayer) -> None:
    """Let a layer's forward take the short way whenever it can. Doing it twice changes nothing."""
    if "forward" not in vars(layer):
        layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]


def _forward(layer: LoraLayer, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _plain(layer, x)
    if adapter is None:
        return own(x, *args, **kwargs)
    base: Any = layer.get_base_layer()
    a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    if not torch.is_grad_enabled():
        return _adapted(x.reshape(-1, x.shape[-1]), base, a, b, scaling)[0].view(*x.shape[:-1], -1)
    found: Tensor = _Adapted.apply(x, base, a, b, scaling)
    return found


def _plain(layer: LoraLayer, x: Tensor) -> str | None:
    """The adapter, where it is alone, without dropout or variant, and everything computes in fp32 on a CPU."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or len(layer.active_adapters) != 1:
        return None  # on a GPU the 16-bit casts are autocast's, and nobody has measured this way there
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant or layer.disable_adapters or layer.merged:
        return None
    if layer.training and not isinstance(layer.lora_dropout[adapter], nn.Identity):
        return None
    if torch.is_grad_enabled() and not layer.lora_A[adapter].weight.requires_grad:
        return None
    base = layer.get_base_layer()
    dense = type(base) is nn.Linear and base.weight.dtype == torch.float32
    return adapter if dense or type(base).__name__ == "Linear4bit" else None


def dense_weight(base: Any) -> Tensor:
    """(out, in) a frozen layer's weight as the matrix product takes it."""
    if type(base) is nn.Linear:
        return base.weight
    if (copy := vars(base).get("dense_copy")) is not None:
        return copy  # type: ignore[no-any-return]
    import bitsandbytes.functional as bnb

    state = getattr(base.weight, "quant_state", None)  # a weight that FSDP put together has lost it
    return bnb.dequantize_4bit(base.weight, base.quant_state if state is None else state).to(torch.float32)


@contextmanager
def dense_copies(layers: Iterable[LoraLayer]) -> Iterator[None]:
    """Unpack NF4 layers on a CPU once for all that happens inside, where they are small enough.

    Every token of an answer takes all weights: unpacked each time, an answer alone takes nearly twice as long
    (docs/log.md).
    """
    packed = [base for layer in layers if type(base := layer.get_base_layer()).__name__ == "Linear4bit"]
    on_cpu = all(base.weight.device.type == "cpu" for base in packed)
    if not on_cpu or sum(4 * base.in_features * base.out_features for base in packed) > DENSE_COPIES_BYTES:
        yield
        return
    for base in packed:
        base.dense_copy = dense_weight(base)
    try:
        yield
    finally:
        for base in packed:
            del base.dense_copy


def _adapted(rows: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(M, in) -> W x + bias + scaling * B A x, (M, out), and scaling * A x, (M, r)."""
    low = rows @ a.T
    low *= scaling
    return nn.functional.linear(rows, dense_weight(base), base.bias).addmm_(low, b.T), low


class _Adapted(torch.autograd.Function):
    """W x + b + scaling * B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3) of a frozen W; x is (..., in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, low = _adapted(rows, base, a, b, scaling)
        ctx.save_for_backward(rows, low, a, b)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:  # type: ignore[override]
        rows, low, a, b = ctx.saved_tensors
        above = above.reshape(-1, above.shape[-1])
        low_above = above @ b
        low_above *= ctx.scaling
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (above @ dense_weight(ctx.base)).addmm_(low_above, a).view(ctx.shape)
        return to_x, None, low_above.T @ rows, above.T @ low, None
