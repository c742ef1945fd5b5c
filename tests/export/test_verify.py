"""The files read back: what a unit in the last place is, and that one of them too many is found."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lowrank_align import adapters
from lowrank_align.errors import NumericError
from lowrank_align.export.merge import merge, save
from lowrank_align.export.verify import scaling_of, spacing, verify_weights
from lowrank_align.loading import load_frozen


@pytest.fixture
def exported(adapter_on: Callable[..., Any], tmp_path: Path) -> Callable[[torch.dtype], Any]:
    """`exported(dtype)`: (the merged model's folder, its base's, the adapter)."""

    def make(dtype: torch.dtype) -> Any:
        base, adapter = adapter_on("llama")
        loaded = load_frozen(base.name, quantize="none", device="cpu", dtype="fp32")
        saved = adapters.read(adapter, loaded.name, loaded.weights_hash)
        save(merge(loaded.model, saved, dtype).model, tmp_path / "merged")
        return tmp_path / "merged", base.path, saved

    return make


def test_spacing() -> None:
    """bf16 has 8 bits, so 2^-7 above 1, 2^-8 from 0.5 to 1 and 2^-5 at 5; fp16 has 11, and 2^-24 below its normal
    numbers; fp32 has 24.
    """
    values = torch.tensor([1.0, 0.75, -5.0])
    assert spacing(values, torch.bfloat16).tolist() == [2.0**-7, 2.0**-8, 2.0**-5]
    assert spacing(torch.tensor([1.0, 1e-6, 0.0]), torch.float16).tolist() == [2.0**-10, 2.0**-24, 2.0**-24]
    assert spacing(torch.tensor([1.0]), torch.float32).tolist() == [2.0**-23]


def test_scaling() -> None:
    """alpha / r = 8 / 4; rank-stabilised: 8 / 2."""
    tensors = {"x.lora_A.weight": torch.zeros(4, 3)}
    plain, stable = (LoraConfig(r=4, lora_alpha=8, use_rslora=use) for use in (False, True))
    assert scaling_of(adapters.Saved(Path(), plain, tensors, 0.0), "x") == 2.0
    assert scaling_of(adapters.Saved(Path(), stable, tensors, 0.0), "x") == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_at_most_half_a_unit(dtype: torch.dtype, exported: Callable[..., Any]) -> None:
    """With 16 bits some weight comes close to the half; in fp32 what is left of the error is the arithmetic's."""
    check = verify_weights(*exported(dtype))
    assert check.passed and check.compared == check.tensors == 21
    assert check.largest_error <= 0.5 and (dtype == torch.float32 or check.largest_error > 0.45)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_one_weight_by_one_unit(name: str, exported: Callable[..., Any]) -> None:
    """In an adapted layer, a norm, and the head; the next number that bf16 holds."""
    folder, base, saved = exported(torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    flat = tensors[name].view(-1).view(torch.int16)
    flat[5] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check = verify_weights(folder, base, saved)
    assert check.wrong == (name,) and check.largest_error > 0.5


def test_nan_is_found(exported: Callable[..., Any]) -> None:
    folder, base, saved = exported(torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors")
    assert verify_weights(folder, base, saved).wrong == ("model.layers.0.self_attn.q_proj.weight",)


def test_a_file_that_cannot_be_read(exported: Callable[..., Any]) -> None:
    folder, base, saved = exported(torch.float32)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(NumericError, match="cannot be read back"):
        verify_weights(folder, base, saved)


def test_names_that_differ_are_not_compared(exported: Callable[..., Any], tmp_path: Path) -> None:
    """As of a model that sees: the base's names have something before them, which a pattern takes away."""
    folder, base, saved = exported(torch.float32)
    tensors = {f"language_model.{name}": t for name, t in load_file(base / "model.safetensors").items()}
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    found = verify_weights(folder, tmp_path / "other", saved, renamed={r"^language_model\.": ""})
    assert (found.compared, found.tensors) == (21, 21) and found.passed
    lost = verify_weights(folder, tmp_path / "other", saved)
    assert lost.compared == 0 and "no one tensor" in lost.note
