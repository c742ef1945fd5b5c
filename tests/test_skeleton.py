"""Models built without weights: what is counted of every family, and what becomes of those that cannot be planned."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from lowrank_align.architecture import Linear, UnknownFigures
from lowrank_align.skeleton import measure, stated_figures

FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
ALL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "gpt2", "qwen3_moe", "falcon_h1",
    "qwen3_next", "granite", "cohere", "gemma2",
)  # fmt: skip
HYBRID = ("falcon_h1", "qwen3_next")


@pytest.mark.parametrize("family", ALL)
def test_every_weight_is_counted(family: str, model_folder: Callable[..., Path]) -> None:
    """As many as the model of these sizes has, and flat rows for those with a state."""
    config = AutoConfig.from_pretrained(model_folder(family))
    found = measure(config, family)
    assert found.parameters == AutoModelForCausalLM.from_config(config).num_parameters()
    assert found.needs_flat_rows == (family in HYBRID)


def test_a_family_with_names_of_its_own() -> None:
    """GPT-2's config has names of its own, and nothing of its MLP, which is four times as wide as the model."""
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=128)
    found = measure(config, "gpt2")
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (64, 256, 2)
    assert (found.num_attention_heads, found.head_dim, found.max_position_embeddings) == (4, 16, 256)
    sizes = [("c_attn", 64, 192), ("c_proj", 64, 64), ("c_fc", 64, 256), ("c_proj", 256, 64)]
    assert set(found.linears) == {Linear(*size, layers=2) for size in sizes}


def test_layers_with_a_state_and_a_cache_keep_their_cache(model_folder: Callable[..., Path]) -> None:
    found = measure(AutoConfig.from_pretrained(model_folder("falcon_h1")), "m")
    assert (found.hybrid_layers, found.recurrent_layers, found.caching_layers) == (2, 0, (2, 0))


def test_a_width_a_layer_is_no_figure() -> None:
    """Where the layers differ, the widest one counts; without a model to measure there is none."""
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=2, intermediate_size=[64, 96], hidden_size=32)
    with pytest.raises(UnknownFigures, match="no figure for intermediate_size, so its memory cannot be planned"):
        stated_figures(config, "m")
    assert stated_figures(config, "m", intermediate_size=96).intermediate_size == 96


# ---- what cannot be planned


@pytest.fixture
def mamba(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model without attention, so without heads."""
    shutil.copytree(tiny_llama, tmp_path / "mamba")
    config = MambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def test_training_goes_on_without_a_plan(
    mamba: Path, trained: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and `plan` itself ends with it."""
    monkeypatch.chdir(mamba.parent)
    lacking = "mamba: its config.json gives no figure for num_attention_heads, so its memory cannot be planned"
    asked = command("plan", "--model", "mamba", "--gpu", "12GiB")
    assert (asked.code, asked.out, asked.err) == (2, "", f"error: {lacking}\n")
    words = ("sft", "--model", "mamba", "--data", trained / "demonstrations.jsonl", "--out", "run", *FEW)
    done = command(*words)
    assert (done.code, done.err) == (0, "")
    assert [line for line in done.out.splitlines() if line.startswith("plan")] == [f"plan: none ({lacking}); going on"]
    wrong = command(*words, "--overwrite", "--gpu", "12GiBs")
    assert (wrong.code, Path("run").is_dir()) == (2, True)
    assert wrong.err.startswith("error: gpu: '12GiBs' is no size of memory (did you mean")


@pytest.mark.parametrize("family", ["gpt2", *HYBRID])
def test_other_families_are_planned_and_train(
    family: str, model_folder: Callable[..., Path], trained: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    pairs, out = trained / "pairs.jsonl", tmp_path / "run"
    done = command("dpo", "--model", model_folder(family), "--data", pairs, "--out", out, *FEW)
    assert (done.code, done.err) == (0, "")
    assert sum(line.startswith("plan: ") and " (training on cpu: " in line for line in done.out.splitlines()) == 1
