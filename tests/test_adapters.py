"""Adapters on disk: other programs read them, and what does not fit is refused in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from lowrank_align.adapters import check_before_load, locate, read
from lowrank_align.base import Base
from lowrank_align.errors import EXIT_NUMERIC, NumericError, UserError
from lowrank_align.provenance import write_provenance
from lowrank_align.trees import TreeRow

LoadBase = Callable[..., Any]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def saved(load_base: LoadBase, speak: Callable[..., None], tmp_path: Path) -> Path:
    """A policy of rank 4 on q_proj and v_proj, saved by the base `llama`."""
    base = load_base("llama")
    base.add_role("saved", rank=4, target_modules=["q_proj", "v_proj"])
    speak(base, "saved")
    base.save_role("saved", tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def refused(base: Base, folder: Path) -> str:
    """The one line that refuses it; the base is left with the roles that it had."""
    roles, adapters = list(base.roles), set(base.model.peft_config)
    with pytest.raises(UserError) as error:
        base.add_role("policy", start_from=folder)
    assert "\n" not in str(error.value)
    assert list(base.roles) == roles
    assert set(base.model.peft_config) == adapters
    assert not [name for name, _ in base.model.named_parameters() if ".policy" in name]
    return str(error.value)


# ---- other programs read them


@torch.no_grad()
def test_plain_peft_gives_the_same_logits(
    load_base: LoadBase,
    speak: Callable[..., None],
    random_row: Callable[..., TreeRow],
    family: str,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    base = load_base(family)
    base.add_role("policy", rank=4, alpha=6)
    speak(base, "policy")
    base.save_role("policy", tmp_path)
    ids = torch.tensor([random_row(12).prompt_ids])
    with base.role("policy"):
        ours = base.model(ids).logits
    assert (ours - base.model(ids).logits).abs().max() > 0.1

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(peft(ids).logits, ours, atol=1e-5, rtol=0)
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]  # none missing, none unexpected
    config = peft.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type, config.modules_to_save) == (4, 6, "CAUSAL_LM", None)
    assert config.base_model_name_or_path == base.name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@torch.no_grad()
def test_sequence_classification_gives_the_same_scores(
    load_base: LoadBase,
    speak: Callable[..., None],
    random_row: Callable[..., TreeRow],
    family: str,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Raw scores, whatever the shift; of one sequence alone, and of two with padding after the shorter."""
    base = load_base(family)
    if type(base.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        pytest.skip(f"transformers has no sequence-classification class for {family}")
    base.add_role("reward", rank=4, head=True).shift = 0.7
    speak(base, "reward")
    base.save_role("reward", tmp_path, as_reward=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    row = random_row(6, 5, 9)
    with base.role("reward"):
        ours = base.scores(base.collate([row]))
    assert (ours[0] - ours[1]).abs() > 1e-3

    plain = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1, dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(plain, tmp_path)
    sequences = [row.prompt_ids + completion.ids for completion in row.completions]
    for score, ids in zip(ours, sequences, strict=True):
        torch.testing.assert_close(peft(torch.tensor([ids])).logits[0, 0], score, atol=1e-4, rtol=0)
    longest = max(map(len, sequences))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    torch.testing.assert_close(peft(padded, attention_mask=mask).logits[:, 0], ours, atol=1e-4, rtol=0)
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]


@torch.no_grad()
def test_an_adapter_made_by_peft_is_read(
    load_base: LoadBase, random_row: Callable[..., TreeRow], tmp_path: Path
) -> None:
    """With settings that we never write: rank-stabilised, on one layer alone, another rank for one module, fp16."""
    base = load_base("llama")
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
        rank_pattern={"down_proj": 2},
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), config).eval()
    peft.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: t.half().float() for k, t in tensors.items()}))
    peft.load_adapter(str(tmp_path), "default")
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    check_before_load(tmp_path, "policy", base.name, base.weights_hash, AutoConfig.from_pretrained(base.path))
    base.add_role("policy", start_from=tmp_path)
    assert len(base.trainable_parameters("policy")) == 4
    assert {p.dtype for p in base.trainable_parameters("policy").values()} == {torch.float32}
    ids = torch.tensor([random_row(12).prompt_ids])
    with base.role("policy"):
        torch.testing.assert_close(base.model(ids).logits, peft(ids).logits, atol=1e-5, rtol=0)


# ---- and back


@torch.no_grad()
def test_a_run_is_read_back(load_base: LoadBase, saved: Path, random_row: Callable[..., TreeRow]) -> None:
    """From the adapter's folder and from the run's; the run is remembered as the parent."""
    base = load_base("llama")
    batch = base.collate([random_row(5, 4)])
    run = saved.parent / "run"
    (run / "adapter").mkdir(parents=True)
    for file in saved.iterdir():
        file.rename(run / "adapter" / file.name)
    write_provenance(run, base=base.name, base_hash=base.weights_hash, method="sft")
    with base.role("saved"):
        expected = base.token_scores(batch).per_token_logps
    for start in (run, run / "adapter", str(run)):
        role = base.add_role("policy", start_from=start)
        assert role.parent == run
        assert role.shift == 0.0
        with base.role("policy"):
            assert torch.equal(base.token_scores(batch).per_token_logps, expected)


def test_a_reward_run_brings_its_head_and_shift(load_base: LoadBase, tmp_path: Path) -> None:
    base = load_base("llama")
    head = base.add_role("reward", rank=4, head=True, seed=1).head.weight.clone()
    base.save_role("reward", tmp_path / "adapter", as_reward=True)
    (tmp_path / "reward.json").write_text('{"shift": 1.25, "shift_over": "all"}')
    again = base.add_role("value", start_from=tmp_path, head=True, seed=2)
    assert torch.equal(again.head.weight, head)
    assert again.shift == 1.25
    assert again.parameters["score.weight"] is again.head.weight


def test_a_value_models_head_is_saved_too(load_base: LoadBase, tmp_path: Path) -> None:
    base = load_base("llama")
    head = base.add_role("value", rank=4, head=True, seed=1).head.weight.clone()
    base.save_role("value", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert torch.equal(base.add_role("again", start_from=tmp_path).head.weight, head)


def test_check_before_load_agrees(load_base: LoadBase, saved: Path, tmp_path: Path) -> None:
    base = load_base("llama")
    config = AutoConfig.from_pretrained(base.path)
    check_before_load(saved, "policy", base.name, base.weights_hash, config)
    base.add_role("reward", rank=2, head=True)
    base.save_role("reward", tmp_path / "reward", as_reward=True)
    check_before_load(tmp_path / "reward", "reward", base.name, base.weights_hash, config)


# ---- what is refused


def test_wrong_kind(load_base: LoadBase, saved: Path, tmp_path: Path) -> None:
    base = load_base("llama")
    base.add_role("reward", rank=2, head=True)
    reward = tmp_path / "reward"
    base.save_role("reward", reward, as_reward=True)
    with pytest.raises(UserError) as error:
        locate(reward, "policy")
    assert str(error.value) == f"{reward}: is a reward run, where a policy is expected"
    with pytest.raises(UserError) as error:
        locate(saved, "reward")
    assert str(error.value) == f"{saved}: is a policy run, where a reward is expected"
    assert locate(saved, "policy") == saved
    assert locate(reward, "reward") == reward


def test_missing_tensor(load_base: LoadBase, saved: Path) -> None:
    base = load_base("llama")
    edit_tensors(saved, lambda tensors: [tensors.pop(name) for name in (FIRST, FIRST.replace("q_proj", "v_proj"))])
    message = (
        f"{saved}: 2 tensors missing (first: model.layers.0.self_attn.q_proj.lora_A.weight); "
        "the adapter is incomplete, or made for another base"
    )
    assert refused(base, saved) == message
    with pytest.raises(UserError) as error:
        check_before_load(saved, "policy", base.name, base.weights_hash, AutoConfig.from_pretrained(base.path))
    assert str(error.value) == message


def test_unknown_tensor(load_base: LoadBase, saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({FIRST.replace("layers.0", "layers.9"): torch.zeros(4, 64)}))
    assert refused(load_base("llama"), saved) == (
        f"{saved}: unknown tensor model.layers.9.self_attn.q_proj.lora_A.weight; "
        "the adapter is made for another architecture"
    )


def test_wrong_shape(load_base: LoadBase, saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({FIRST: torch.zeros(4, 32)}))
    assert refused(load_base("llama"), saved) == (
        f"{saved}: model.layers.0.self_attn.q_proj.lora_A.weight: shape (4, 32), this base needs (4, 64); "
        "made for another base"
    )


def test_wrong_head_shape(load_base: LoadBase, tmp_path: Path) -> None:
    base = load_base("llama")
    base.add_role("saved", rank=2, head=True)
    base.save_role("saved", tmp_path, as_reward=True)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(2, 64)}))
    assert refused(base, tmp_path) == (
        f"{tmp_path}: score.weight: shape (2, 64), this base needs (1, 64); made for another base"
    )


def test_reward_without_head(load_base: LoadBase, tmp_path: Path) -> None:
    base = load_base("llama")
    base.add_role("saved", rank=2, head=True)
    base.save_role("saved", tmp_path, as_reward=True)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.score.weight"))
    assert refused(base, tmp_path) == (
        f"{tmp_path}: 1 tensors missing (first: score.weight); the adapter is incomplete, or made for another base"
    )


def test_other_base_by_weights(load_base: LoadBase, saved: Path) -> None:
    """Same name, same shapes, other weights: only the hash tells."""
    base = load_base("llama")
    write_provenance(saved, base=base.name, base_hash="f" * 64, method="sft")
    assert refused(base, saved) == (
        f"{saved}: made for {base.name} (weights ffffffffffff), not for {base.name} "
        f"(weights {base.weights_hash[:12]}); load it on its own base"
    )


def test_other_base_by_name(load_base: LoadBase, saved: Path) -> None:
    base = load_base("llama")
    edit_config(saved, base_model_name_or_path="someone/other-model")
    assert refused(base, saved) == (
        f"{saved}: made for someone/other-model, not for {base.name}; "
        f"if those are the same weights, correct base_model_name_or_path in {saved / 'adapter_config.json'}"
    )


def test_bin_only(load_base: LoadBase, saved: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert refused(load_base("llama"), saved) == (
        f"{saved}: holds no adapter_model.safetensors (only safetensors are read, never .bin)"
    )


def test_not_an_adapter(load_base: LoadBase, saved: Path, tmp_path: Path) -> None:
    base = load_base("llama")
    assert refused(base, tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such run or adapter folder"
    empty = tmp_path / "empty"
    empty.mkdir()
    holds_none = f"{empty}: holds no adapter_config.json; give a run's folder or a PEFT adapter folder"
    assert refused(base, empty) == holds_none
    (empty / "checkpoints").mkdir()
    assert refused(base, empty) == f"{holds_none} (an unfinished run? --resume it first)"


def test_damaged_files(load_base: LoadBase, saved: Path) -> None:
    base = load_base("llama")
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    line = refused(base, saved)
    assert re.fullmatch(rf"{re.escape(str(weights))}: cannot be read \(.*\); the file is damaged", line)
    with pytest.raises(UserError, match="the file is damaged"):
        check_before_load(saved, "policy", base.name, base.weights_hash, AutoConfig.from_pretrained(base.path))
    weights.write_bytes(whole)
    config = saved / "adapter_config.json"
    config.write_text('{"peft_type": "LORA", ')
    assert refused(base, saved).startswith(f"{config}: not readable as JSON (")
    config.write_text("[]")
    assert refused(base, saved) == f"{config}: not a JSON object"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"shift": "much"}', '{"shift": NaN}'])
def test_damaged_shift(load_base: LoadBase, saved: Path, content: str) -> None:
    file = saved / "reward.json"
    file.write_text(content)
    assert refused(load_base("llama"), saved) == f"{file}: holds no number under shift; restore it from the reward run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA is supported"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.json asks for lm_head, which is not loaded"),
        ({"auto_mapping": {"parent_library": "x"}}, "adapter_config.json asks for auto_mapping, which is not loaded"),
        ({"init_lora_weights": "pissa"}, "adapter_config.json asks for init_lora_weights=pissa, which is not loaded"),
        ({"bias": "all"}, "adapter_config.json asks for bias=all, which is not loaded"),
    ],
)
def test_settings_that_are_not_loaded(load_base: LoadBase, saved: Path, changes: dict[str, Any], message: str) -> None:
    """PiSSA and its like would change the frozen weights themselves, which all roles share."""
    base = load_base("llama")
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    edit_config(saved, **changes)
    assert refused(base, saved) == f"{saved}: {message}"
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_saved(load_base: LoadBase, tmp_path: Path, value: float) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=2)
    name = "model.layers.1.mlp.up_proj.lora_B.weight"
    base.trainable_parameters("policy")[name].data[3, 1] = value
    with pytest.raises(NumericError) as error:
        base.save_role("policy", tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path / 'out'}: base_model.model.{name} holds NaN or infinity; the adapter is not saved"
    )
    assert error.value.exit_code == EXIT_NUMERIC
    assert not (tmp_path / "out").exists()


def test_reading_keeps_the_tensors_names(load_base: LoadBase, saved: Path) -> None:
    base = load_base("llama")
    found = read(saved, base.name, base.weights_hash)
    assert found.tensors.keys() == base.trainable_parameters("saved").keys()
    assert found.shift == 0.0
    assert found.config.target_modules == {"q_proj", "v_proj"}
