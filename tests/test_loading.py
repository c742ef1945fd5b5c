"""Bringing a model into memory: frozen and quantised as asked, or one line that says what is wrong with it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_align import loading
from lowrank_align.devices import pick_device, pick_dtype
from lowrank_align.errors import EXIT_DATA_OR_CONFIG, EXIT_ENVIRONMENT, EnvironmentProblem, UserError
from lowrank_align.loading import load_frozen, read_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A model folder of the test's own, to damage."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def refused(name: Any, **options: Any) -> str:
    """The one line that refuses it."""
    with pytest.raises(UserError) as error:
        load_frozen(str(name), **{"device": "cpu", "quantize": "none"} | options)
    assert error.value.exit_code == EXIT_DATA_OR_CONFIG
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what is loaded


@pytest.mark.parametrize(("quantize", "linear"), [("none", nn.Linear), ("nf4", Linear4bit), ("int8", Linear8bitLt)])
def test_a_frozen_base(model_folder: Callable[..., Path], quantize: str, linear: type) -> None:
    path = model_folder("llama")
    loaded = load_frozen(str(path), quantize=quantize, device="cpu")  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert {type(m) for n, m in loaded.model.named_modules() if n.endswith("_proj")} == {linear}
    assert type(loaded.model.lm_head) is nn.Linear  # embeddings and head stay as they are
    assert loaded.compute_dtype == torch.float32
    assert loaded.path == path.resolve()
    assert loaded.tokenizer.pad_token_id == 0
    if quantize == "nf4":
        weight = loaded.model.model.layers[0].mlp.up_proj.weight
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested  # double quantisation
    hashes = {load_frozen(str(path), quantize=q, device="cpu").weights_hash for q in ("none", quantize)}  # type: ignore[arg-type]
    assert hashes == {loaded.weights_hash}


def test_every_dropout_is_off(model_folder: Callable[..., Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
    assert {m.p for m in plain.modules() if isinstance(m, nn.Dropout)} == {0.1}
    model = load_frozen(str(model_folder("gpt2")), quantize="none", device="cpu").model
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    model = load_frozen(str(model_folder("llama", attention_dropout=0.3)), quantize="none", device="cpu").model
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.0}


def test_refusing_sdpa_is_no_error(model_folder: Callable[..., Path]) -> None:
    loaded = load_frozen(str(model_folder("gemma2")), quantize="none", device="cpu")
    assert loaded.model.config._attn_implementation == "eager"


# ---- devices and precision


@pytest.mark.parametrize(
    ("device", "present"),
    [("cuda", "cuda.is_available"), ("xpu", "xpu.is_available"), ("mps", "backends.mps.is_available")],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str, present: str) -> None:
    monkeypatch.setattr(f"torch.{present}", lambda: False)
    with pytest.raises(EnvironmentProblem) as error:
        load_frozen("nowhere/at-all", device=device)  # before anything is looked for
    assert error.value.exit_code == EXIT_ENVIRONMENT
    assert str(error.value) == (
        f"--device {device}: this torch ({torch.__version__}) sees no such device; use --device cpu, or install "
        "the torch build for your GPU (PyTorch's install selector names it)"
    )


def test_a_gpu_number_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EnvironmentProblem, match="--device cuda:2: there are only 2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_an_unknown_device(device: str) -> None:
    assert refused("nowhere", device=device) == (f"--device {device}: unknown; use auto, cpu, cuda, cuda:N, xpu or mps")


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.xpu.is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr("torch.xpu.is_available", lambda: True)
    assert pick_device("auto") == torch.device("xpu")


def test_bitsandbytes_has_no_apple_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(EnvironmentProblem, match="--quantize: bitsandbytes has no Apple GPU support; use --quantize"):
        load_frozen("nowhere", device="mps", quantize="nf4")


@pytest.mark.parametrize(
    ("dtype", "device", "has_bf16", "expected"),
    [
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),  # before Ampere bf16 is emulated, and slow
        ("auto", "cpu", True, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp32", "cuda", True, torch.float32),
    ],
)
def test_compute_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, has_bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert pick_dtype(dtype, torch.device(device)) == expected


# ---- models that are not there


def test_a_pipe_in_a_models_folder(folder: Path) -> None:
    """A reader of it would wait for ever."""
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json: a pipe or device, which may never end"):
        loading.model_folder(str(folder))


def test_a_folder_that_is_not_there(folder: Path) -> None:
    near = folder.with_name("modle")
    assert refused(near) == f"{near}: no such model folder (did you mean {folder}?)"
    far = folder.with_name("zzzzzz")
    assert refused(far) == f"{far}: no such model folder"


def test_a_relative_folder_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert refused("modle") == "modle: no such model folder (did you mean model?)"
    assert refused("./modle") == "./modle: no such model folder (did you mean model?)"


def test_a_hub_id_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests set HF_HUB_OFFLINE; a name with one slash may be either a folder or a hub id."""
    assert refused("someone/some-model") == (
        "someone/some-model: no such folder, and the hub cannot be reached for it (HF_HUB_OFFLINE is set)"
    )
    monkeypatch.chdir(folder.parent.parent)
    near = f"{folder.parent.name}/modle"
    assert refused(near) == (
        f"{near}: no such folder (did you mean {folder.parent.name}/model?), "
        "and the hub cannot be reached for it (HF_HUB_OFFLINE is set)"
    )
    with pytest.raises(UserError, match="not//one"):
        loading.model_folder("not//one")


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"{tmp_path}: no config.json in this folder; --model takes a transformers model folder, a hub id or tiny"
    )
    file = tmp_path / "model.safetensors"
    file.touch()
    assert refused(file) == f"{file}: is a file; --model takes a model folder, a hub id or tiny"


# ---- folders that are damaged, or of another kind


def test_weights_that_are_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for quantize in ("none", "nf4"):
        assert refused(folder, quantize=quantize) == (
            f"{folder}: 2 weights are missing from its files (first: model.layers.1.mlp.up_proj.weight); "
            "not a whole causal model"
        )


def test_weights_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for quantize in ("none", "nf4"):
        assert refused(folder, quantize=quantize) == (
            f"{folder}: 1 weights are not of the shape that its config.json says (first: model.norm.weight)"
        )


def test_weights_that_are_cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert re.match(f"{re.escape(str(folder))}: cannot be loaded as a causal language model: ", refused(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert refused(folder) == (
        f"{folder}: no *.safetensors; other weight formats are not read, convert the model first"
    )


def test_weights_that_are_quantised_already(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert refused(folder) == (
        f"{folder}: its weights are already quantised (gptq); give the 16-bit model, it is quantised while loading"
    )


@pytest.mark.parametrize(
    "content", ['{"model_type": ', '{"model_type": "nobody_knows"}', "{}", "[]", '{"model_type": 7}']
)
def test_a_configuration_that_cannot_be_used(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refused(folder).startswith(f"{folder}: config.json cannot be used: ")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            {"model_type": "nobody_knows"},
            f"model_type nobody_knows is not known to transformers {transformers.__version__}",
        ),
        (
            {"model_type": "llama", "intermediate_size": "x"},
            "Validation error for field 'intermediate_size': "
            "TypeError: Field 'intermediate_size' expected int, got str (value: 'x')",
        ),
    ],
    ids=["family", "field"],
)
def test_the_reason_is_in_the_one_line(folder: Path, content: dict[str, Any], why: str) -> None:
    (folder / "config.json").write_text(json.dumps(content))
    assert refused(folder) == f"{folder}: config.json cannot be used: {why}"


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refused(folder).startswith(f"{folder}: its tokenizer cannot be loaded")


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert refused(folder).startswith(f"{folder}: its tokenizer cannot be loaded")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        read_tokenizer(str(folder))


def test_a_tokenizer_without_the_model(folder: Path) -> None:
    """Rows are checked before the weights are read, or are even there: 256 positions, `ab` after 99 letters."""
    (folder / "model.safetensors").unlink()
    tokenizer, context_tokens = read_tokenizer(str(folder))
    assert tokenizer("ab").input_ids == [69, 70]
    assert context_tokens == 256


@pytest.mark.parametrize("steps", [0, 2])
def test_the_first_making_of_tiny_is_shown(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, in lines where that is no terminal; nothing where it is in the cache already."""

    def build(progress: Callable[[int, int, float], None]) -> Path:
        for step in range(steps):
            progress(step + 1, steps, 3.5 - step)
        return tmp_path

    monkeypatch.setattr("lowrank_align.tiny.tiny_path", build)
    assert loading.model_folder("tiny") == tmp_path
    out, err = capsys.readouterr()
    assert out == ""
    lines = ["tiny is not in the cache yet: pretraining it, once", "step 1/2  loss 3.5", "step 2/2  loss 2.5"]
    assert [line.split("  ")[: 2 if "/" in line else 1] for line in err.splitlines()] == [
        line.split("  ") for line in lines if steps
    ]


def test_a_model_that_does_not_speak(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert refused(folder) == f"{folder}: a vit is no causal language model; give one as --model"
