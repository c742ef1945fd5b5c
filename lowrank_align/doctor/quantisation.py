"""bitsandbytes on the device: quantise, forward and backward of a small layer, against fp32."""

import warnings
from collections.abc import Callable
from typing import Any

from lowrank_align.doctor.finding import Finding, Level, first_line


def self_test(device: str) -> list[Finding]:
    """Quantise, forward and backward of a small layer on `device`, against fp32."""
    found = []
    trials: dict[str, tuple[Callable[[str], float], Level, str]] = {
        "NF4": (_try_nf4, "problem", "--quantize none goes without it (four times the memory); reinstall bitsandbytes"),
        "int8": (_try_int8, "warning", "--quantize int8 cannot be used; nf4 and none can"),
    }
    for name, (trial, level, advice) in trials.items():
        try:
            error = trial(device)
            found.append(Finding(f"{name} test", "ok", f"on {device}: as in fp32 to {error:.1%}, backward too"))
        except Exception as error:  # what a kernel raises is anything
            found.append(Finding(f"{name} test", level, f"on {device}: {first_line(error)}", advice))
    return found


def _try_nf4(device: str) -> float:
    """The quantisation's error, as a share of the weights' size; AssertionError where a result is wrong.

    NF4's codes lie at most 0.304 of a block's largest weight apart, so a weight moves by at most half of that, and by a
    little more through the double quantisation.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, inputs, gradient = _numbers(torch, device)
    options = {"quant_type": "nf4", "compress_statistics": True}
    layer: Any = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, **options)
    layer.weight = Params4bit(weight, requires_grad=False, **options)
    layer.support_avx512bf16_for_cpu = False  # see loading.py
    layer = layer.to(device)
    restored = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    moved = (restored - weight).view(-1, 64).abs().amax(1) / weight.view(-1, 64).abs().amax(1)
    if moved.max() > 0.17:
        raise AssertionError(f"quantised weights are off by {moved.max():.0%} of their block's largest")
    _check(layer, inputs, gradient, restored, tolerance=0.01)
    return float((restored - weight).norm() / weight.norm())


def _try_int8(device: str) -> float:
    import torch
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight, inputs, gradient = _numbers(torch, device)
    layer: Any = Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return _check(layer.to(device), inputs, gradient, weight, tolerance=0.05)


def _numbers(torch: Any, device: str) -> tuple[Any, Any, Any]:
    """Weight (64, 128), inputs (8, 128) and an output's gradient (8, 64); of the size that a model's have."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs, gradient = (torch.randn(*shape, generator=generator) for shape in ((64, 128), (8, 128), (8, 64)))
    return weight * 0.05, inputs.to(device).requires_grad_(), gradient.to(device)


def _check(layer: Any, inputs: Any, gradient: Any, weight: Any, tolerance: float) -> float:
    """The larger relative error of outputs and inputs' gradient against fp32; AssertionError over `tolerance`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = layer(inputs)
        outputs.backward(gradient.to(outputs.dtype))
    found = {"forward": (outputs, inputs.detach().cpu() @ weight.T), "backward": (inputs.grad, gradient.cpu() @ weight)}
    errors = {}
    for name, (ours, expected) in found.items():
        errors[name] = float((ours.detach().float().cpu() - expected).norm() / expected.norm())
        if not errors[name] <= tolerance:  # NaN is no pass
            raise AssertionError(f"{name} is off by {errors[name]:.0%}")
    return max(errors.values())
