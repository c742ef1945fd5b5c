"""Roles on one frozen base: what a role is, what switching leaves alone, where backward belongs, what is in memory."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_align.base import Base
from lowrank_align.errors import UserError
from lowrank_align.trees import TreeRow

LoadBase = Callable[..., Any]
MakeRow = Callable[..., TreeRow]
Speak = Callable[..., None]


@pytest.fixture
def rows(random_row: MakeRow) -> list[TreeRow]:
    return [random_row(6, 5, 3, seed=1), random_row(4, 6, 2, seed=2)]


def logps(base: Base, rows: list[TreeRow], role: str) -> Tensor:
    with base.role(role), torch.no_grad():
        return base.token_scores(base.collate(rows)).per_token_logps


def loss_of(base: Base, rows: list[TreeRow]) -> Tensor:
    return -base.token_scores(base.collate(rows)).logps.sum()


def weights_of(base: Base, role: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in base.trainable_parameters(role).items()}


def gradients_of(base: Base, role: str) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in base.trainable_parameters(role).items() if p.grad is not None}


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        assert same, key


def everything(base: Base) -> dict[str, Any]:
    """All that switching a role must leave alone: weights, gradients, flags, train or eval mode, the random state."""
    found: dict[str, Any] = {"rng": torch.get_rng_state(), "grad mode": torch.is_grad_enabled()}
    for name, parameter in base.model.named_parameters():
        found |= {name: parameter.detach().clone(), f"{name} flag": parameter.requires_grad}
        found[f"{name} gradient"] = None if parameter.grad is None else parameter.grad.clone()
    return found | {f"{name} mode": module.training for name, module in base.model.named_modules()}


def active_adapters(base: Base) -> set[tuple[str, ...]]:
    return {tuple(m.active_adapters) for m in base.model.modules() if hasattr(m, "lora_A")}


# ---- policy and reference


def test_reference_of_a_started_policy_is_a_frozen_copy(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], tmp_path: Path
) -> None:
    """The policy starts from an adapter: to switch adapters off gives the bare base, which is not its reference."""
    base = load_base("llama", "nf4")
    base.add_role("sft", rank=4)
    speak(base, "sft")
    base.save_role("sft", tmp_path)
    base.add_role("policy", start_from=tmp_path)
    base.add_role("reference", frozen_copy_of="policy")

    at_start = logps(base, rows, "policy")
    assert torch.equal(logps(base, rows, "sft"), at_start)
    assert torch.equal(logps(base, rows, "reference"), at_start)
    assert (logps(base, rows, "base") - at_start).abs().max() > 0.1
    assert not any(p.requires_grad for p in base.trainable_parameters("reference").values())

    for parameter in base.trainable_parameters("policy").values():
        parameter.data.add_(0.01)
    assert torch.equal(logps(base, rows, "reference"), at_start)
    assert not torch.equal(logps(base, rows, "policy"), at_start)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_policy_is_the_reference_at_the_start(load_base: LoadBase, rows: list[TreeRow], quantize: str) -> None:
    """A new adapter has B = 0 and adds an exact 0; its reference needs no adapter of its own."""
    base = load_base("llama", quantize)
    bare = logps(base, rows, "base")
    base.add_role("policy", rank=4)
    base.add_role("reference", frozen_copy_of="policy")
    assert base.roles["reference"].adapter is None
    assert torch.equal(logps(base, rows, "policy"), bare)
    assert torch.equal(logps(base, rows, "reference"), bare)


def test_policy_is_the_reference_at_the_start_in_every_family(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], family: str
) -> None:
    base = load_base(family)
    bare = logps(base, rows, "base")
    base.add_role("policy", rank=4, dropout=0.1)
    speak(base, "policy")
    base.add_role("reference", frozen_copy_of="policy")
    base.model.train()
    reference = logps(base, rows, "reference")  # a copy has no dropout
    base.model.eval()
    assert torch.equal(reference, logps(base, rows, "policy"))
    assert (reference - bare).abs().max() > 0.1


def test_a_frozen_copy_of_a_reward_keeps_head_and_shift(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    base = load_base("llama")
    base.add_role("reward", rank=4, head=True)
    speak(base, "reward")
    base.roles["reward"].shift = 1.5
    base.add_role("frozen", frozen_copy_of="reward")
    batch = base.collate(rows)
    with torch.no_grad(), base.role("reward"):
        raw = base.scores(batch)
    with torch.no_grad(), base.role("frozen"):
        assert torch.equal(base.scores(batch), raw)
        torch.testing.assert_close(base.scores(batch, shifted=True), raw - 1.5)
    assert not base.roles["frozen"].head.weight.requires_grad
    assert base.roles["frozen"].head.weight.data_ptr() != base.roles["reward"].head.weight.data_ptr()


# ---- precision


def test_lora_weights_stay_fp32_on_a_bf16_base(
    model_folder: Callable[..., Path], speak: Speak, rows: list[TreeRow], tmp_path: Path
) -> None:
    """At a learning rate of 1e-6, bf16 weights would hardly change: of fp32 ones, every one with a gradient does."""
    base = Base.load(str(model_folder("llama")), quantize="none", device="cpu", dtype="bf16")
    assert {p.dtype for p in base._frozen} == {torch.bfloat16}
    base.add_role("sft", rank=4)
    speak(base, "sft")
    base.save_role("sft", tmp_path)
    base.add_role("policy", start_from=tmp_path)
    base.add_role("reference", frozen_copy_of="policy")
    base.add_role("value", rank=4, head=True)
    for name in ("sft", "policy", "reference", "value"):
        assert {p.dtype for p in base.trainable_parameters(name).values()} == {torch.float32}, name
    assert torch.equal(logps(base, rows, "policy"), logps(base, rows, "reference"))

    with base.role("policy"):
        loss_of(base, rows).backward()
    before, gradients = weights_of(base, "policy"), gradients_of(base, "policy")
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    torch.optim.AdamW(base.trainable_parameters("policy").values(), lr=1e-6, weight_decay=0.0).step()
    after = weights_of(base, "policy")
    changed = torch.cat([(after[k] != before[k])[gradients[k] != 0].flatten() for k in before if "lora_A" in k])
    assert changed.float().mean() > 0.99
    in_bf16 = torch.cat([(after[k].bfloat16() != before[k].bfloat16()).flatten() for k in before if "lora_A" in k])
    assert in_bf16.float().mean() < 0.05


# ---- switching


def test_switching_flips_only_the_active_adapter(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    base = load_base("llama", "nf4")
    base.add_role("policy", rank=4, dropout=0.1)
    speak(base, "policy")
    base.add_role("value", rank=8, head=True)
    base.add_role("reference", frozen_copy_of="policy")
    base.model.train()
    with base.role("policy"):
        loss_of(base, rows).backward()
    before = everything(base)
    assert active_adapters(base) == {()}
    for name, active in [("policy", ("policy",)), ("value", ("value",)), ("reference", ("reference",)), ("base", ())]:
        with base.role(name) as role:
            assert role is base.active_role is base.roles[name]
            assert active_adapters(base) == {active}
            assert_equal(everything(base), before)
        assert active_adapters(base) == {()}
        assert_equal(everything(base), before)
    trained = {name for name, role in base.roles.items() for p in role.parameters.values() if p.requires_grad}
    assert trained == {"policy", "value"}


def test_a_reference_pass_leaves_the_policy_as_it_was(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    """In the middle of a policy step, in train mode and with LoRA dropout, which would draw from the random state."""
    base = load_base("llama")
    base.add_role("policy", rank=4, dropout=0.1)
    speak(base, "policy")
    base.add_role("reference", frozen_copy_of="policy")
    base.model.train()

    def step(with_reference: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)
        for parameter in base.trainable_parameters("policy").values():
            parameter.grad = None
        with base.role("policy"):
            loss = loss_of(base, rows)
            if with_reference:
                before = everything(base)
                with base.role("reference"), torch.no_grad():
                    base.token_scores(base.collate(rows))
                assert_equal(everything(base), before)
            loss = loss + loss_of(base, rows)
            loss.backward()
        return gradients_of(base, "policy"), torch.get_rng_state()

    (gradients, rng), (expected, expected_rng) = step(True), step(False)
    assert_equal(gradients, expected)
    assert torch.equal(rng, expected_rng)


def test_roles_nest_and_are_restored_on_error(load_base: LoadBase) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4)
    base.add_role("value", rank=4)
    with base.role("policy"):
        with base.role("value"):
            with base.role("policy"):
                assert active_adapters(base) == {("policy",)}
            assert active_adapters(base) == {("value",)}
        with pytest.raises(KeyError), base.role("base"):
            assert active_adapters(base) == {()}
            raise KeyError("anything")
        assert active_adapters(base) == {("policy",)}
        assert base.active_role.name == "policy"
        with pytest.raises(UserError, match="no role 'valeu'"), base.role("valeu"):
            pytest.fail("no such role")
        assert base.active_role.name == "policy"
    assert active_adapters(base) == {()}
    assert base.active_role.name == "base"


# ---- where backward belongs


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_leaving_with_a_pending_graph_is_an_error(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], checkpointing: bool
) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4)
    speak(base, "policy")
    base.enable_checkpointing(checkpointing)
    with pytest.raises(RuntimeError, match="'policy' was left with a graph that still waits"), base.role("policy"):
        loss = loss_of(base, rows)
    assert base.active_role.name == "base"
    with pytest.raises(RuntimeError, match="role 'policy' was left"), base.role("policy"):
        done, waiting = loss_of(base, rows), loss_of(base, rows)
        done.backward()
    del loss, waiting


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_backward_under_another_role_is_an_error(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], checkpointing: bool
) -> None:
    base = load_base("llama")
    for name in ("policy", "value"):
        base.add_role(name, rank=4)
        speak(base, name)
    base.enable_checkpointing(checkpointing)
    with base.role("policy"):
        loss = loss_of(base, rows)
        with pytest.raises(RuntimeError, match="backward of role 'policy' ran under role 'value'"), base.role("value"):
            loss.backward()
        assert not gradients_of(base, "policy")
        assert not gradients_of(base, "value")
        del loss
        with base.role("value"):
            loss_of(base, rows).backward()
        assert gradients_of(base, "value")
        assert not gradients_of(base, "policy")


def test_a_graph_that_is_dropped_is_no_error(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4)
    speak(base, "policy")
    gc.disable()  # reference counts alone must do
    try:
        with base.role("policy"):
            loss = loss_of(base, rows)
            del loss
        with pytest.raises(ZeroDivisionError), base.role("policy"):
            loss = loss_of(base, rows)
            raise ZeroDivisionError  # what went wrong inside is what the caller hears of
        del loss
        with base.role("policy"):
            loss = loss_of(base, rows)
            loss.backward()
            figure = loss  # a loss kept for the log after its backward
        assert figure.requires_grad
    finally:
        gc.enable()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_checkpointing_gives_the_same_gradients(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], quantize: str
) -> None:
    """With a reference pass between forward and backward, as every preference method has it."""
    base = load_base("llama", quantize)
    base.add_role("policy", rank=4)
    speak(base, "policy")
    base.add_role("reference", frozen_copy_of="policy")
    found = []
    for on in (False, True):
        base.enable_checkpointing(on)
        base.model.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules()) == on
        with base.role("policy"):
            loss = loss_of(base, rows)
            with base.role("reference"), torch.no_grad():
                loss_of(base, rows)
            loss.backward()
        found.append(gradients_of(base, "policy"))
        for parameter in base.trainable_parameters("policy").values():
            parameter.grad = None
    assert all(g.abs().max() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_checkpointing_leaves_the_bare_base_without_a_graph(
    load_base: LoadBase, rows: list[TreeRow], recwarn: pytest.WarningsRecorder
) -> None:
    """Nothing of it is trained; a pass outside no_grad must not keep activations or wait for a backward."""
    base = load_base("llama")
    for on in (True, False):
        base.enable_checkpointing(on)
        with base.role("base"):
            hidden = base.hidden_states(base.collate(rows))
        assert not hidden.requires_grad
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]  # transformers renamed its switches


# ---- policy and value


def test_a_value_step_leaves_the_policy_alone(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    base = load_base("llama", "nf4")
    for name, head in [("policy", False), ("value", True)]:
        base.add_role(name, rank=4, head=head)
        speak(base, name)
    assert not set(map(id, base.trainable_parameters("policy").values())) & set(
        map(id, base.trainable_parameters("value").values())
    )
    weights, outputs = weights_of(base, "policy"), logps(base, rows, "policy")
    value_weights = weights_of(base, "value")
    with base.role("value"):
        (base.values(base.collate(rows)) - 1).square().sum().backward()
    assert not gradients_of(base, "policy")
    torch.optim.SGD(base.trainable_parameters("value").values(), lr=0.1).step()
    assert_equal(weights_of(base, "policy"), weights)
    assert torch.equal(logps(base, rows, "policy"), outputs)
    moved = weights_of(base, "value")
    assert all(not torch.equal(moved[name], value_weights[name]) for name in moved)


# ---- scalar heads


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_scalar_head(load_base: LoadBase, rows: list[TreeRow], tmp_path: Path, quantize: str) -> None:
    """Width 64: drawn with std 1/sqrt(65) = 0.124; of 64 draws, the sample's own is within 0.3 of that (3 sigma)."""
    base = load_base("llama", quantize)
    role = base.add_role("reward", rank=4, head=True, seed=3)
    assert type(role.head) is torch.nn.Linear
    assert role.head.bias is None
    assert role.head.weight.dtype == torch.float32
    assert role.head.weight.shape == (1, 64)
    assert abs(role.head.weight.std().item() / 65**-0.5 - 1) < 0.3
    assert abs(role.head.weight.mean().item()) < 3 * (65 * 64) ** -0.5
    assert base.trainable_parameters("reward")["score.weight"] is role.head.weight
    assert role.head.weight.requires_grad

    with base.role("reward"):
        scores = base.scores(base.collate(rows))
        scores.sum().backward()
    assert scores.dtype == torch.float32
    assert role.head.weight.grad.abs().max() > 0
    base.save_role("reward", tmp_path, as_reward=True)
    again = base.add_role("again", start_from=tmp_path)
    assert torch.equal(again.head.weight, role.head.weight)
    with base.role("again"), torch.no_grad():
        assert torch.equal(base.scores(base.collate(rows)), scores)


def test_heads_differ_by_seed_and_are_only_where_asked_for(load_base: LoadBase, rows: list[TreeRow]) -> None:
    base = load_base("llama")
    first, second = (base.add_role(f"r{seed}", rank=4, head=True, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.head.weight, second.head.weight)
    base.add_role("policy", rank=4)
    with base.role("policy"), pytest.raises(UserError, match="role 'policy' has no scalar head"):
        base.scores(base.collate(rows))


def test_values_are_shifted_like_scores(load_base: LoadBase, random_row: MakeRow) -> None:
    """A value predicts shifted scores, so it starts shifted too, but stays 0 on padding."""
    base = load_base("llama")
    base.add_role("value", rank=4, head=True)
    batch = base.collate([random_row(3, 2, 1)])
    with base.role("value") as role, torch.no_grad():
        raw = base.values(batch)
        role.shift = 2.0
        torch.testing.assert_close(base.values(batch), raw - torch.tensor([[2.0, 2.0], [2.0, 0.0]]))


# ---- putting roles on and taking them off


def test_roles_are_replaced_and_removed(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    base = load_base("llama", "nf4")
    bare = logps(base, rows, "base")
    parameters = {name.replace(".base_layer", "") for name, _ in base.model.named_parameters()}
    base.add_role("policy", rank=4)
    speak(base, "policy")
    base.add_role("value", rank=4)
    flags = {name: p.requires_grad for name, p in base.trainable_parameters("value").items()}
    base.add_role("policy", rank=8)
    assert {p.shape[0] for n, p in base.trainable_parameters("policy").items() if "lora_A" in n} == {8}
    assert torch.equal(logps(base, rows, "policy"), bare)
    base.remove_role("policy")
    base.remove_role("policy")  # already gone
    assert list(base.roles) == ["base", "value"]
    assert {name: p.requires_grad for name, p in base.trainable_parameters("value").items()} == flags
    assert all(flags.values())
    base.remove_role("value")
    assert {name for name, _ in base.model.named_parameters() if "lora" in name} == set()
    assert {name.replace(".base_layer", "") for name, _ in base.model.named_parameters()} == parameters
    assert torch.equal(logps(base, rows, "base"), bare)
    base.remove_role("base")
    assert list(base.roles) == ["base"]


def test_an_active_role_stays(load_base: LoadBase) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4)
    base.add_role("value", rank=4)
    with base.role("policy"), base.role("value"):
        with pytest.raises(RuntimeError, match="role 'policy' is active; leave it before removing it"):
            base.remove_role("policy")
        with pytest.raises(RuntimeError, match="role 'value' is active"):
            base.add_role("value", rank=4)


def test_what_cannot_be_added_leaves_the_old_role(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], tmp_path: Path
) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4)
    speak(base, "policy")
    before = logps(base, rows, "policy")
    with pytest.raises(UserError, match="no such run or adapter folder"):
        base.add_role("policy", start_from=tmp_path / "missing")
    with pytest.raises(UserError, match=r"no role 'polcy' \(did you mean policy\?\)"):
        base.add_role("policy", frozen_copy_of="polcy")
    with pytest.raises(UserError, match="--target-modules: .*qproj") as error:
        base.add_role("policy", rank=4, target_modules=["qproj"])
    assert "\n" not in str(error.value)
    assert torch.equal(logps(base, rows, "policy"), before)
    assert base.model.peft_config.keys() == {"policy"}
    assert all(p.requires_grad for p in base.trainable_parameters("policy").values())
    base.add_role("policy", frozen_copy_of="policy")  # freezes it where it is
    assert len(base.model.peft_config) == 1
    assert torch.equal(logps(base, rows, "policy"), before)
    assert not any(p.requires_grad for p in base.trainable_parameters("policy").values())


@pytest.mark.parametrize("name", ["base", "", "my-policy", "a.b", "a b", "1st"])
def test_names_are_plain(load_base: LoadBase, name: str) -> None:
    with pytest.raises(UserError, match=f"role {name!r}: use a plain name"):
        load_base("llama").add_role(name, rank=4)


def test_the_bare_base_has_nothing_to_save(load_base: LoadBase, tmp_path: Path) -> None:
    base = load_base("llama")
    base.add_role("reference")
    with pytest.raises(UserError, match="role 'reference' is the bare base; there is no adapter to save"):
        base.save_role("reference", tmp_path)
    assert not list(tmp_path.iterdir())


def test_new_adapters_follow_their_seed_and_no_other(load_base: LoadBase) -> None:
    base = load_base("llama")
    before = torch.get_rng_state()
    base.add_role("one", rank=4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    base.add_role("two", rank=4, seed=5)
    base.add_role("other", rank=4, seed=6)
    assert_equal(weights_of(base, "one"), weights_of(base, "two"))
    assert all(not torch.equal(a, b) for a, b in _pairs(base, "one", "other", "lora_A"))


def _pairs(base: Base, first: str, second: str, part: str) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = base.trainable_parameters(first), base.trainable_parameters(second)
    return [(ours[name], theirs[name]) for name in ours if part in name]


def test_an_adapter_on_the_head_speaks_and_scores_alike(load_base: LoadBase, speak: Speak, random_row: MakeRow) -> None:
    """LoRA on `lm_head` changes what the model generates, so it must change what is scored."""
    base = load_base("llama", fresh=True)
    base.add_role("policy", rank=4, target_modules=["q_proj", "lm_head"])
    speak(base, "policy")
    row = random_row(5, 4)
    found = logps(base, [row], "policy")
    with base.role("policy"), torch.no_grad():
        theirs = base.model(torch.tensor([row.prompt_ids + row.completions[0].ids])).logits[0, 4:-1].log_softmax(-1)
    expected = theirs.gather(1, torch.tensor(row.completions[0].ids)[:, None])
    torch.testing.assert_close(found[0], expected.squeeze(1), atol=1e-5, rtol=0)
    with base.role("policy"):
        loss_of(base, [row]).backward()
    assert gradients_of(base, "policy").keys() == base.trainable_parameters("policy").keys()


# ---- dropout


def test_a_new_role_is_in_the_mode_of_the_model(load_base: LoadBase, speak: Speak, rows: list[TreeRow]) -> None:
    """Layers are born in train mode; on a model in eval mode, a new adapter's dropout must be off."""
    base = load_base("llama")
    base.add_role("policy", rank=4, dropout=0.5)
    speak(base, "policy")
    assert torch.equal(logps(base, rows, "policy"), logps(base, rows, "policy"))
    base.model.train()
    assert not torch.equal(logps(base, rows, "policy"), logps(base, rows, "policy"))


def test_dropout_of_the_base_is_off_in_train_mode(load_base: LoadBase, rows: list[TreeRow]) -> None:
    """GPT-2's three are 0.1 by default; with them, policy and reference would differ at the first step."""
    base = load_base("gpt2")
    assert base.config.resid_pdrop == base.config.attn_pdrop == base.config.embd_pdrop == 0.1
    bare = logps(base, rows, "base")
    base.model.train()
    assert torch.equal(logps(base, rows, "base"), bare)


# ---- one copy in memory


def storages() -> dict[int, int]:
    """Bytes of every tensor that is alive, by storage; each counted once."""
    gc.collect()
    kinds = {kind for kind in set(map(type, gc.get_objects())) if issubclass(kind, Tensor)}
    tensors = [x for x in gc.get_objects() if type(x) in kinds and x.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_four_roles_share_one_frozen_base(
    load_base: LoadBase, speak: Speak, rows: list[TreeRow], tmp_path: Path, quantize: str
) -> None:
    """Everything that four roles add to memory is their LoRA weights and heads; rank 4 on 2 layers of Llama.

    A layer's seven linears have in + out = 128 (q, o), 96 (k, v: 2 heads of 16 of 4) and 256 (gate, up, down): 1216
    in all, times rank 4, times 2 layers: 9728 numbers. A head has 64.
    """
    adapter, head = 9728 * 4, 64 * 4
    # with weights this small, int8 layers keep no columns of outliers from the last pass
    base = load_base("llama", quantize, fresh=True, initializer_range=0.05, intermediate_size=192)
    base.add_role("sft", rank=4)
    speak(base, "sft")
    base.save_role("sft", tmp_path)
    base.remove_role("sft")
    logps(base, rows, "base")
    alone, frozen = storages(), base.frozen_bytes()

    base.add_role("policy", start_from=tmp_path)
    base.add_role("reference", frozen_copy_of="policy")
    base.add_role("reward", rank=4, head=True)
    base.add_role("value", rank=4, head=True)
    for name in ("policy", "reference"):
        logps(base, rows, name)
    assert base.frozen_bytes() == frozen
    together = storages()
    assert sum(together.values()) - sum(alone.values()) == 4 * adapter + 2 * head
    assert base.copies_in_memory() == 1


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_second_copy_is_counted(load_base: LoadBase, quantize: str) -> None:
    """Of weights of a shape that no other test has loaded."""
    base = load_base("llama", quantize, fresh=True, intermediate_size=256)
    assert base.copies_in_memory() == 1
    second = load_base("llama", quantize, fresh=True, intermediate_size=256)
    assert base.copies_in_memory() == second.copies_in_memory() == 2


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_frozen_bytes_are_what_the_base_takes(load_base: LoadBase, quantize: str) -> None:
    """Llama's numbers: 2 x 128 x 64 for embeddings and head, 5 norms of 64, and 2 layers of linears of
    64 x (64 + 32 + 32 + 64) + 3 x 64 x 128 = 36864. Unquantised 4 bytes each. In int8 a linear's number takes 1 byte,
    and each of its outputs a scale of 4. In NF4 half a byte, and a byte of scale for 64 numbers; then, of each of
    the 14 linears, the scales' own scales (4 bytes for 256), offset (4), and the tables of 16 and 256 numbers (fp32).
    """
    base = load_base("llama", quantize, fresh=True)
    rest, linears = (2 * 128 * 64 + 5 * 64) * 4, 2 * 36864
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    if quantize == "none":
        assert base.frozen_bytes() == rest + 4 * linears
    elif quantize == "int8":
        assert base.frozen_bytes() == rest + linears + 4 * outputs
    else:
        tables = base.frozen_bytes() - (rest + linears // 2 + linears // 64 + 14 * 8)
        assert tables % 64 == 0  # 16 numbers of 4 bytes, and 256 of them, whether shared or not
        assert 16 * 4 + 256 * 4 <= tables <= 14 * (16 * 4 + 256 * 4)
