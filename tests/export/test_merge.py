"""Merging: against plain PEFT, by hand, and across families."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lowrank_align import adapters
from lowrank_align.errors import NumericError, UserError
from lowrank_align.export.merge import as_classifier, empty_classifier, merge, quantised_layers, save, through_nf4
from lowrank_align.export.verify import verify_weights
from lowrank_align.loading import load_frozen
from lowrank_align.trees import Completion, TreeRow

FAMILIES = ("gpt2", "gemma3_text", "qwen3_next")
SPLIT = {"qwen3_next": 4 * 4 * 3}  # PEFT adapts the stacked experts; in the files, three matrices an expert and layer


def merged(base: Any, adapter: Path, dtype: torch.dtype = torch.float32, own: str = "fp32", **options: Any) -> Any:
    loaded = load_frozen(base.name, quantize="none", device="cpu", dtype=own)
    saved = adapters.read(adapter, loaded.name, loaded.weights_hash)
    return merge(loaded.model, saved, dtype, **options), saved


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_says_what_base_and_adapter_say(family: str, adapter_on: Callable[..., Any], tmp_path: Path) -> None:
    """In plain transformers, after a round through the files; and every tensor is compared that has one counterpart."""
    base, adapter = adapter_on(family)
    ids = torch.randint(4, 99, (2, 12))
    with base.role("policy"), torch.no_grad():
        wanted = base.model(input_ids=ids).logits
    made, saved = merged(base, adapter)
    save(made.model, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (found(input_ids=ids).logits - wanted).abs().max() < 2e-4
    check = verify_weights(tmp_path / "merged", base.path, saved, transposed=made.transposed)
    assert check.passed and check.compared == check.tensors - SPLIT.get(family, 0), check


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_alpha": 3, "alpha_pattern": {"q_proj": 16}}])
def test_the_weights_are_those_of_peft(changes: dict[str, Any], adapter_on: Callable[..., Any]) -> None:
    """PEFT's own `merge_and_unload` of a model in fp32, whatever the scaling."""
    base, adapter = adapter_on("llama")
    LoraConfig(**LoraConfig.from_pretrained(adapter).to_dict() | changes).save_pretrained(adapter)
    made, _ = merged(base, adapter)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter).merge_and_unload()
    ours = made.model.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name


def test_every_weight_is_rounded_once() -> None:
    """By hand. bf16 goes in steps of 2^-7 above 1, of 2^-8 below. 1 + (2^-8 + 2^-20) lies just over the middle of a
    step and becomes 1 + 2^-7. Were the difference rounded first it would be 2^-8, and 1 + 2^-8, halfway, the even 1:
    that is what adding in bf16 gives. 1 - 2^-8 needs no rounding, and the second row is left as it is.
    """
    difference = torch.tensor([[2.0**-8 + 2.0**-20, -(2.0**-8)]])
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["layer"])
    tensors = {"layer.lora_A.weight": difference, "layer.lora_B.weight": torch.tensor([[1.0], [0.0]])}
    model = Tiny(torch.tensor([[1.0, 1.0], [0.0, 0.5]], dtype=torch.bfloat16))
    made = merge(model, adapters.Saved(Path("x"), config, tensors, 0.0), torch.bfloat16)
    assert made.model.layer.weight.dtype == torch.bfloat16
    assert made.model.layer.weight.tolist() == [[1 + 2.0**-7, 1 - 2.0**-8], [0.0, 0.5]]
    assert (torch.tensor(1.0, dtype=torch.bfloat16) + difference[0, 0].bfloat16()).item() == 1.0


def test_shards_with_an_index(adapter_on: Callable[..., Any], tmp_path: Path) -> None:
    """The largest tensors have 128 x 64 numbers of 4 bytes, 32 KiB: one or two in a shard of 64 KB."""
    base, adapter = adapter_on("llama")
    made, saved = merged(base, adapter)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    save(made.model, tmp_path, max_shard_size="64KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 and all(file.stat().st_size < 70_000 for file in shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    check = verify_weights(tmp_path, base.path, saved)
    assert check.passed and check.compared == check.tensors == len(before)


def test_tied_embeddings_stay_tied(adapter_on: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter = adapter_on("llama", tie_word_embeddings=True)
    made, _ = merged(base, adapter)
    save(made.model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_an_adapter_on_a_tied_head_is_refused(adapter_on: Callable[..., Any]) -> None:
    base, adapter = adapter_on("llama", tie_word_embeddings=True)
    tensors = load_file(adapter / adapters.WEIGHTS)
    tensors |= {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save_file(tensors, adapter / adapters.WEIGHTS)
    with pytest.raises(UserError, match="adapts lm_head, whose weights are the embeddings too"):
        merged(base, adapter)


def test_what_does_not_fit_into_fp16_is_told(adapter_on: Callable[..., Any]) -> None:
    """fp16 ends at 65,504."""
    base, adapter = adapter_on("llama")
    loaded = load_frozen(base.name, quantize="none", device="cpu", dtype="fp32")
    loaded.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    saved = adapters.read(adapter, loaded.name, loaded.weights_hash)
    with pytest.raises(NumericError, match=r"layers\.1\.mlp\.up_proj: 1e\+05 does not fit into fp16; take"):
        merge(loaded.model, saved, torch.float16)


def test_weights_as_trained_are_those_of_the_nf4_model(adapter_on: Callable[..., Any]) -> None:
    """bitsandbytes' own dequantisation of the layers that a 4-bit model packs; no other layer is one of them."""
    base, adapter = adapter_on("llama", quantize="nf4")
    plain = base.model.get_decoder().layers[0].self_attn.q_proj.get_base_layer()
    packed = bnb.dequantize_4bit(plain.weight.data, plain.weight.quant_state)
    loaded = load_frozen(base.name, quantize="none", device="cpu", dtype="fp32")
    own = loaded.model.model.layers[0].self_attn.q_proj.weight.data.clone()
    assert torch.equal(through_nf4(own), packed) and not torch.equal(own, packed)
    layers = quantised_layers(base.model)
    assert len(layers) == 14 and "lm_head" not in layers
    made, saved = merged(base, adapter, nf4=layers)
    a, b = (saved.tensors[f"model.layers.0.self_attn.q_proj.lora_{part}.weight"] for part in "AB")
    found = made.model.model.layers[0].self_attn.q_proj.weight
    assert (found - (packed + 2.0 * b @ a)).abs().max() < 1e-6  # alpha 8, rank 4


def test_a_reward_model_becomes_a_classifier(adapter_on: Callable[..., Any], tmp_path: Path) -> None:
    """The scores that the base with its role gives to the same tokens."""
    base, adapter = adapter_on("llama", head=True)
    rows = [TreeRow([5, 6, 7], [Completion([8, 9, 10 + i], [True] * 3)]) for i in range(3)]
    with base.role("policy"), torch.no_grad():
        wanted = base.scores(base.collate(rows))
    made, saved = merged(base, adapter)
    save(as_classifier(made, saved, torch.float32, 0).model, tmp_path / "merged")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1).eval()
    ids = torch.tensor([[*row.prompt_ids, *row.completions[0].ids, 0, 0] for row in rows])
    with torch.no_grad():
        scores = found(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    assert found.config.num_labels == 1 and (scores - wanted).abs().max() < 1e-5


def test_a_family_without_a_classifier_is_refused() -> None:
    with pytest.raises(UserError, match="a granite has no sequence-classification class"):
        empty_classifier(AutoConfig.for_model("granite"))


class Tiny(nn.Module):
    """One layer, and what `merge` asks of a transformers model."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.config = SimpleNamespace(dtype=None, model_type="tiny", tie_word_embeddings=False)
        self.get_output_embeddings = self.get_input_embeddings = lambda: None

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype
