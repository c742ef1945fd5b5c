"""The short way through an adapted layer against PEFT's own: the same outputs and gradients, taken where it may be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_align import lora
from lowrank_align.trees import TreeRow


def gradients(base: Any, row: TreeRow) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with base.role("policy") as role:
        scores = base.token_scores(base.collate([row]))
        scores.logps.sum().backward()
    found = {name: p.grad.clone() for name, p in role.parameters.items()}
    for parameter in role.parameters.values():
        parameter.grad = None
    return scores.per_token_logps.detach(), found


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("recomputing", [False, True], ids=["kept", "recomputed"])
def test_it_computes_what_peft_computes(
    quantize: str,
    recomputing: bool,
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    speak: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = load_base("llama", quantize=quantize)
    base.add_role("policy", rank=4, alpha=6.0)
    speak(base, "policy")
    base.enable_checkpointing(recomputing)
    row = random_row(5, 7, 9)
    taken: list[str | None] = []
    plain = lora._plain

    def noted(*arguments: Any) -> str | None:
        taken.append(plain(*arguments))
        return taken[-1]

    monkeypatch.setattr(lora, "_plain", noted)
    logps, found = gradients(base, row)
    assert set(taken) == {"policy"} and len(taken) == len(base._lora_layers) * (1 + recomputing)
    monkeypatch.setattr(lora, "_plain", lambda *_: None)
    expected_logps, expected = gradients(base, row)
    base.enable_checkpointing(False)
    torch.testing.assert_close(logps, expected_logps, atol=1e-5, rtol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_dropout_and_gradients_through_what_is_not_trained_go_peft_s_way(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow]
) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4, dropout=0.5)
    base.add_role("frozen", rank=4, trainable=False)
    layer, x = base._lora_layers[0], torch.zeros(1, 1, 1)
    base.model.train()
    with base.role("policy"):
        assert lora._plain(layer, x) is None
        base.model.eval()
        assert lora._plain(layer, x) == "policy"  # nothing is dropped then
    with base.role("frozen"):
        assert lora._plain(layer, x) is None
        with torch.no_grad():
            assert lora._plain(layer, x) == "frozen"
    assert lora._plain(layer, x) is None  # the bare base
    base.add_role("policy", rank=4)
    with base.role("policy"):
        assert lora._plain(base._lora_layers[0], x) == base.roles["policy"].adapter
        assert lora._plain(base._lora_layers[0], x.to(torch.bfloat16)) is None


def test_gradients_in_double_precision() -> None:
    """torch's gradcheck of W x + b + scaling * B A x, for x, A and B."""
    torch.manual_seed(0)
    base = torch.nn.Linear(3, 4, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 5, 3), (2, 3), (4, 2)))
    assert torch.autograd.gradcheck(lambda *inputs: lora._Adapted.apply(inputs[0], base, *inputs[1:], 0.7), (x, a, b))
    expected = base(x) + 0.7 * (x @ a.T @ b.T)
    torch.testing.assert_close(lora._Adapted.apply(x, base, a, b, 0.7), expected)


def test_rollouts_unpack_nf4_once(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers as with weights unpacked for every token; nothing is left behind, and nothing done where the
    copies would be too large."""
    import bitsandbytes.functional as bnb

    from lowrank_align.rollout import generator_for, sample

    base = load_base("llama", quantize="nf4")
    base.add_role("policy", rank=4)
    unpacked: list[int] = []
    plain = bnb.dequantize_4bit

    def counted(*arguments: Any, **named: Any) -> torch.Tensor:
        unpacked.append(1)
        return plain(*arguments, **named)

    monkeypatch.setattr(bnb, "dequantize_4bit", counted)

    def draw() -> tuple[list[list[int]], int]:
        unpacked.clear()
        with base.role("policy"):
            generator = generator_for(base.device, 0, "draw")
            found = sample(base, [[5, 6, 7]], end_ids=[2], max_new_tokens=6, generator=generator)
        return [rollout.ids for rollout in found[0]], len(unpacked)

    answers, once = draw()
    assert once == len(base._lora_layers)
    assert not any("dense_copy" in vars(layer.get_base_layer()) for layer in base._lora_layers)
    monkeypatch.setattr(lora, "DENSE_COPIES_BYTES", 1)
    again, often = draw()
    assert again == answers and often == once * len(answers[0])
