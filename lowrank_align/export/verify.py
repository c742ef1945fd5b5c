"""The exported weight files, read back and compared with the base's files and the adapter, tensor by tensor.

A second way to the same numbers, from the files alone: no model is loaded, PEFT is not asked. Every weight must be
base + scaling B A (arXiv 2106.09685, eq. 3), rounded once: at most half a unit in the last place away.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_align.adapters import HEAD, Saved
from lowrank_align.errors import NumericError
from lowrank_align.export.merge import through_nf4

ROWS = 2048  # of a matrix at a time
FP32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class WeightCheck:
    """What came of it. Errors are in units in the last place of the exported precision; 0.5 is rounding."""

    compared: int
    tensors: int
    largest_error: float
    wrong: tuple[str, ...]  # tensors that are off by more than rounding
    note: str = ""  # why not all could be compared

    @property
    def passed(self) -> bool:
        return not self.wrong


class TensorFiles:
    """The tensors of a model folder by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        try:
            for path in _weight_files(folder):
                file = safe_open(path, framework="pt").__enter__()
                self._files |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise NumericError(f"{folder}: cannot be read back ({error}); check the disk") from error

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def names(self) -> list[str]:
        """Every tensor's name."""
        return sorted(self._files)


def verify_weights(
    folder: Path,
    base: Path,
    saved: Saved,
    *,
    transposed: Collection[str] = (),
    nf4: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> WeightCheck:
    """Compare the model in `folder` with `base` and `saved`; `transposed` and `nf4` name layers as in `merge`.

    `renamed`: patterns in the base's names of weights, and what stands in their place in the exported model's.
    """
    exported, original = TensorFiles(folder), TensorFiles(base)
    called = {_renamed(name, renamed or {}): name for name in original.names()}
    marks = (key.removesuffix(".lora_A.weight") for key in saved.tensors if key.endswith(".lora_A.weight"))
    adapted = {name.removesuffix(".base_layer") for name in marks}
    names = exported.names()
    if saved.config.use_dora or saved.config.lora_bias:
        return WeightCheck(0, len(names), 0.0, (), "the adapter's form is one that only PEFT merges")
    elsewhere = tuple(f"{name}." for name in adapted if f"{name}.weight" not in exported)  # an expert's, for one
    if len(elsewhere) == len(adapted):
        return WeightCheck(0, len(names), 0.0, (), "this family's files name the adapted layers otherwise")
    compared, largest, wrong = 0, 0.0, []
    for key in names:
        name, found = key.removesuffix(".weight"), exported[key]
        source = called.get(key) or called.get(key.partition(".")[2])  # GPT-2's files leave the first part out
        if key == HEAD and HEAD in saved.tensors:
            error, allowed = _differs(found, saved.tensors[HEAD]), 0.0
        elif source is None or key.startswith(elsewhere):
            continue
        else:
            weight = original[source]
            weight = through_nf4(weight, name in transposed) if name in nf4 else weight
            if name in adapted:
                error, allowed = _error(found, weight, saved, name, name in transposed), 0.5
            else:
                error, allowed = _differs(found, weight), 0.0
        compared, largest = compared + 1, max(largest, error)
        if not error <= allowed:
            wrong.append(key)
    note = "" if compared == len(names) else "the others have no one tensor of the base to compare with"
    return WeightCheck(compared, len(names), largest, tuple(wrong), note)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each fp32 value to the next that `dtype` holds, away from zero: a unit in its last place."""
    kind = torch.finfo(dtype)
    power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of 2 not above |value|
    return power.clamp_(min=kind.smallest_normal).mul_(kind.eps)


def scaling_of(saved: Saved, name: str) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732); r is the tensors' own."""
    rank = saved.tensors[f"{name}.lora_A.weight"].shape[0]
    patterns = saved.config.alpha_pattern or {}
    own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(own, saved.config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if saved.config.use_rslora else rank))


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, place in patterns.items():
        name = re.sub(pattern, place, name)
    return name


def _error(found: Tensor, weight: Tensor, saved: Saved, name: str, transposed: bool) -> float:
    """The largest error in units in the last place, less what fp32 arithmetic, here and there, may have added."""
    a, b = (saved.tensors[f"{name}.lora_{part}.weight"].float() for part in "AB")  # (r, inputs), (outputs, r)
    if transposed:
        found, weight = found.T, weight.T
    b, worst = b * scaling_of(saved, name), 0.0
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        before, got = (tensor[rows].to(torch.float32, copy=True) for tensor in (weight, found))
        exact = b[rows] @ a + before
        arithmetic = (b[rows].abs() @ a.abs()).add_(before.abs_()).mul_(2 * (len(a) + 4) * FP32_EPS)
        error = got.sub_(exact).abs_().sub_(arithmetic).clamp_(min=0).div_(spacing(exact, found.dtype)).max().item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _differs(found: Tensor, expected: Tensor) -> float:
    """0 where a tensor that no adapter touches is the expected one, rounded; infinity where not."""
    same = found.shape == expected.shape and torch.equal(found, expected.to(found.dtype))
    return 0.0 if same else math.inf


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
