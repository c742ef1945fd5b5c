"""Adapters on the top layers alone: the pass below them is shared by all roles, and nothing else changes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.config import SFTSettings
from lowrank_align.errors import UserError
from lowrank_align.plan import Workload
from lowrank_align.plan.prediction import adapter_parameters, predict
from lowrank_align.skeleton import measure
from lowrank_align.trunk import first_layer

Run = Callable[..., Path]
PAIRS = [{"prompt": f"{i}. Say: ", "chosen": f"a good word {i}", "rejected": f"bad {i}"} for i in range(6)]


@contextmanager
def unshared(base: Any) -> Iterator[None]:
    """Every role goes through all layers."""
    depth, base.trunk.depth = base.trunk.depth, 0
    try:
        yield
    finally:
        base.trunk.depth = depth


def layers_run(base: Any) -> list[int]:
    """How often each decoder layer computes from now on (a layer that is passed over does not)."""
    counts = [0] * len(base.trunk.layers)
    for place, layer in enumerate(base.trunk.layers):
        norm = next(module for name, module in layer.named_modules() if name.endswith(("layernorm", "ln_1")))
        norm.register_forward_hook(lambda *_, place=place: counts.__setitem__(place, counts[place] + 1))
    return counts


def test_every_family_says_the_same_bit_for_bit(
    family: str, load_base: Any, random_row: Any, speak: Callable[..., None]
) -> None:
    """Policy (top layer), a reference that is the bare base, and a judge there: with and without the shared pass."""
    base = load_base(family)
    base.add_role("policy", rank=2, lora_layers=1)
    base.add_role("judge", rank=2, lora_layers=1, head=True, trainable=False)
    base.add_role("reference")
    for name in ("policy", "judge"):
        speak(base, name)
    assert base.trunk.depth == base.config.num_hidden_layers - 1

    def said() -> list[torch.Tensor]:
        batch = base.collate([random_row(5, 3, 4), random_row(7, 2, seed=1)])
        with base.role("reference"):
            found = [base.token_logps(batch)]
        with base.role("judge"), torch.no_grad():
            found.append(base.scores(batch))
        with base.role("policy"):
            scores = base.token_scores(batch)
            scores.logps.sum().backward()
        parameters = base.trainable_parameters("policy")
        found += [scores.per_token_logps.detach(), *(p.grad for p in parameters.values())]
        for parameter in parameters.values():
            parameter.grad = None
        return found

    shared = said()
    with unshared(base):
        alone = said()
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    assert shared[2].abs().sum() > 0 and not torch.equal(shared[0], shared[2])


def test_the_lower_layers_run_once_for_a_batch(load_base: Any, random_row: Any) -> None:
    base = load_base("llama", num_hidden_layers=4, fresh=True)
    base.add_role("policy", rank=2, lora_layers=1)
    base.add_role("reference")
    counts = layers_run(base)
    for batch in (base.collate([random_row(5, 3)]), base.collate([random_row(5, 3)])):
        for name in ("reference", "policy", "reference"):
            with base.role(name), torch.no_grad():
                base.token_logps(batch)
    assert counts == [2, 2, 2, 6]


def test_a_role_that_sits_lower_goes_through_all_layers(load_base: Any, random_row: Any) -> None:
    """A judge with adapters everywhere neither takes nor leaves the shared pass."""
    base = load_base("llama", num_hidden_layers=4, fresh=True)
    base.add_role("policy", rank=2, lora_layers=2)
    base.add_role("judge", rank=2, head=True, trainable=False)
    counts = layers_run(base)
    batch = base.collate([random_row(5, 3)])
    for name in ("judge", "policy", "judge", "policy"):
        with base.role(name), torch.no_grad():
            base.hidden_states(batch)
    assert counts == [3, 3, 4, 4]
    base.add_role("value", rank=2, head=True)  # a trained one everywhere: nothing is left to share
    assert base.trunk.depth == 0
    base.remove_role("value")
    assert base.trunk.depth == 2


def test_it_is_let_go_with_its_batch(load_base: Any, random_row: Any) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=2, lora_layers=1)
    batch = base.collate([random_row(5, 3)])
    with base.role("policy"), torch.no_grad():
        base.hidden_states(batch)
    assert base.trunk._found is not None
    del batch
    assert base.trunk._found is None


@pytest.mark.parametrize("method", ["dpo", "ppo", "grpo"])
def test_a_run_is_the_same_with_and_without_it(method: str, run: Run, tiny_base: Any, tmp_path: Path) -> None:
    """Bytes of the adapter; with recomputation, dropout, and for PPO a value model beside the policy."""
    rows = PAIRS if method == "dpo" else [{"prompt": pair["prompt"]} for pair in PAIRS]
    (tmp_path / "trunk_reward.py").write_text(
        "def letters(prompts, completions):\n    return [len(set(c)) for c in completions]\n"
    )
    knobs: dict[str, Any] = {"lora_layers": 1, "learning_rate": 5e-3, "gradient_checkpointing": True}
    if method != "dpo":
        knobs |= {"reward": "trunk_reward:letters", "max_new_tokens": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        shared = run(method, rows, "shared", **knobs)
        patch.setattr("lowrank_align.trunk.Trunk.serves", lambda *_: False)
        alone = run(method, rows, "alone", **knobs)
    names = ["adapter", "value"] if method == "ppo" else ["adapter"]
    for name in names:
        one, other = ((folder / name / "adapter_model.safetensors").read_bytes() for folder in (shared, alone))
        assert one == other
        config = json.loads((shared / name / "adapter_config.json").read_text())
        assert config["layers_to_transform"] == [1]


def test_plain_peft_loads_it_and_it_goes_on(run: Run, tiny_base: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = run("dpo", PAIRS, "top", lora_layers=1, learning_rate=5e-3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base.name), folder / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    tiny_base.add_role("policy", start_from=folder)
    with tiny_base.role("policy"), torch.no_grad():
        ours = tiny_base.model(ids).logits
    assert torch.allclose(ours, model(ids).logits, atol=1e-5)
    again = run("dpo", PAIRS, "again", adapter=str(folder))  # the continued adapter keeps its layers
    assert json.loads((again / "adapter/adapter_config.json").read_text())["layers_to_transform"] == [1]
    assert first_layer(tiny_base.roles["policy"]) == 1


def test_more_layers_than_there_are_are_refused(load_base: Any, command: Any, tiny_llama: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="--lora-layers 3: .* has 2 layers"):
        load_base("llama").add_role("policy", rank=2, lora_layers=3)
    given = ("--model", tiny_llama, "--data", trained / "pairs.jsonl", "--out", trained / "none")
    outcome = command("dpo", *given, "--lora-layers", "3")
    assert (outcome.code, outcome.err) == (2, "error: lora_layers: 3 are more than the model has (2)\n")


def test_the_plan_counts_the_top_layers_alone(load_base: Any) -> None:
    """Half of the layers: half of the adapter, and less than half of what autograd keeps beside the trunk's result."""
    architecture = measure(load_base("llama", num_hidden_layers=4).model.config, "llama")
    whole = Workload("dpo", dtype="fp32", device="cpu", prompt_tokens=64, completion_tokens=64, completions=2)
    half = Workload(**{**vars(whole), "lora_layers": 2})
    assert adapter_parameters(architecture, half) == adapter_parameters(architecture, whole) / 2
    all_layers, top = (predict(architecture, work).phases["training"] for work in (whole, half))
    assert top.optimizer == all_layers.optimizer / 2
    assert top.activations < all_layers.activations
    assert SFTSettings(model="m", data="d", out="o").lora_layers is None
