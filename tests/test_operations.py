"""What a step computes, counted: FLOPs, passes through the base, dequantisations, the largest tensor. Nothing is timed.

The expected figures are derived by hand from the model's sizes, so that what makes a step dearer shows here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    addmm_flop,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from lowrank_align import lora
from lowrank_align.rollout import generator_for, sample
from lowrank_align.trees import TreeRow

H, INNER, LAYERS, V, RANK = 64, 128, 2, 128, 4  # conftest.SIZES
HEADS, KV_HEADS, WIDTH = 4, 2, 16
LINEARS = {
    "q": (H, H),
    "k": (H, 32),
    "v": (H, 32),
    "o": (H, H),
    "gate": (H, INNER),
    "up": (H, INNER),
    "down": (INNER, H),
}
WEIGHTS = LAYERS * sum(i * o for i, o in LINEARS.values())
ENDS = LAYERS * sum(i + o for i, o in LINEARS.values())  # an adapter's weights, over its rank
UNUSED = 3  # the first layer's queries, keys and values come from the embeddings, which want no gradient
UNUSED_WEIGHTS = sum(i * o for i, o in (LINEARS[name] for name in "qkv"))
UNUSED_ENDS = sum(LINEARS[name][0] for name in "qkv")
PROMPT, CHOSEN, REJECTED = 11, 7, 5
TOKENS, SCORED = PROMPT + CHOSEN + REJECTED, CHOSEN + REJECTED


@register_flop_formula(torch.ops.aten.addmm_)
def addmm_in_place(out: Any, a: Any, b: Any, **_: Any) -> int:
    """torch counts the product that makes a new tensor alone."""
    return int(addmm_flop(out, a, b))


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def attended(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def attended_back(above: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(above, query, key, value))


class Operations(TorchDispatchMode):
    """FLOPs by torch's formulas, and the bytes of the largest tensor that any operation made.

    torch's own `FlopCounterMode` follows modules too, with hooks that refuse a gradient taken in a forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = operation(*args, **kwargs)
        if formula := flop_registry.get(operation._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=found)
        for made in found if isinstance(found, list | tuple) else [found]:
            if isinstance(made, torch.Tensor) and not operation.is_view:
                self.largest = max(self.largest, made.numel() * made.element_size())
        return found


@contextmanager
def counted(base: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """flops, passes, tokens through the base, dequantisations and the largest tensor of what happens inside."""
    found: Counter[str] = Counter()

    def seen(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        found["passes"] += 1
        found["tokens"] += kwargs["input_ids"].numel()

    import bitsandbytes.functional as bnb

    plain = bnb.dequantize_4bit

    def dequantised(*args: Any, **kwargs: Any) -> torch.Tensor:
        found["dequantisations"] += 1
        return plain(*args, **kwargs)

    hook = base._backbone.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with monkeypatch.context() as patch, Operations() as operations:
            patch.setattr(bnb, "dequantize_4bit", dequantised)
            yield found
    finally:
        hook.remove()
    found["flops"], found["largest"] = operations.flops, operations.largest


def linear(passes: int, backward: int) -> int:
    """Frozen layers and head-free: 2 FLOPs a weight and token for each pass and each gradient of an input."""
    return 2 * TOKENS * (WEIGHTS * (passes + backward) - UNUSED_WEIGHTS * backward)


def adapter() -> int:
    """Forward, the gradients of both matrices, and of the input, where that is wanted."""
    return 2 * TOKENS * RANK * (3 * ENDS - UNUSED_ENDS)


def attention(passes: int, backward: int) -> int:
    """Scores of the prompt on itself and of each completion on both: 2 products forward, 5 back (scores again)."""
    scores = PROMPT**2 + sum(n * (PROMPT + n) for n in (CHOSEN, REJECTED))
    return LAYERS * HEADS * 2 * scores * WIDTH * (2 * passes + 5 * backward)


def head(passes: int, backward: int) -> int:
    """Completion tokens alone."""
    return 2 * SCORED * V * H * (passes + backward)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_pair_under_policy_and_reference(
    quantize: str, load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPO: one pass of the reference, one of the policy and its gradient; the prompt once in each.

    Of an NF4 base every linear layer is dequantised once in the policy's pass and once on the way back; what the bare
    base computes is bitsandbytes' own and not counted. No tensor is larger than a
    dequantised layer or a chunk of activations: nothing of tokens x vocabulary for the whole row.
    """
    base = load_base("llama", quantize=quantize)
    base.add_role("policy", rank=RANK)
    base.add_role("reference")
    batch = base.collate([random_row(PROMPT, CHOSEN, REJECTED)])
    with counted(base, monkeypatch) as found:
        with base.role("reference"):
            ref_logps = base.token_logps(batch).sum(1)
        with base.role("policy"):
            logps = base.token_scores(batch).logps
            torch.nn.functional.softplus(ref_logps - logps).sum().backward()
    assert (found["passes"], found["tokens"]) == (2, 2 * TOKENS)
    own = 2 if quantize == "none" else 1
    assert found["flops"] == linear(own, 1) + adapter() + attention(2, 1) + head(2, 1)
    layers = LAYERS * len(LINEARS)
    assert found["dequantisations"] == (2 * layers - UNUSED if quantize == "nf4" else 0)
    assert found["largest"] <= max(4 * H * INNER, 4 * TOKENS * INNER, 4 * SCORED * V)


def test_a_reward(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass and its gradient, and of the head two numbers a pair: no vocabulary at all."""
    base = load_base("llama")
    base.add_role("reward", rank=RANK, head=True)
    batch = base.collate([random_row(PROMPT, CHOSEN, REJECTED)])
    with counted(base, monkeypatch) as found, base.role("reward"):
        scores = base.scores(batch)
        torch.nn.functional.softplus(scores[1] - scores[0]).backward()
    scalar = 2 * 2 * H * 3  # two scores, their gradients towards states and head
    assert (found["passes"], found["tokens"]) == (1, TOKENS)
    assert found["flops"] == linear(1, 1) + adapter() + attention(1, 1) + scalar


def test_a_recomputed_pass_costs_one_more(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpointing the layers run again, adapters too; the head does not."""
    base = load_base("llama")
    base.add_role("policy", rank=RANK)
    batch = base.collate([random_row(PROMPT, CHOSEN, REJECTED)])
    base.enable_checkpointing(True)
    try:
        with counted(base, monkeypatch) as found, base.role("policy"):
            base.token_scores(batch).logps.sum().backward()
    finally:
        base.enable_checkpointing(False)
    again = 2 * TOKENS * RANK * ENDS
    assert found["flops"] == linear(2, 1) + adapter() + again + attention(2, 1) + head(1, 1)


def test_roles_share_what_lies_below_their_adapters(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPO on the top one of two layers: below, one pass for both roles; above, a pass each and the gradient.

    The adapted layer's inputs want no gradient, and so neither do its queries, keys and values.
    """
    base = load_base("llama")
    base.add_role("policy", rank=RANK, lora_layers=1)
    base.add_role("reference")
    batch = base.collate([random_row(PROMPT, CHOSEN, REJECTED)])
    with counted(base, monkeypatch) as found:
        with base.role("reference"):
            base.token_logps(batch)
        with base.role("policy"):
            base.token_scores(batch).logps.sum().backward()
    layers = 2 * TOKENS * (WEIGHTS // 2 * (1 + 2 + 1) - UNUSED_WEIGHTS)
    adapted = 2 * TOKENS * RANK * (3 * ENDS // 2 - UNUSED_ENDS)
    attended = (attention(1, 0) + attention(2, 1)) // 2
    assert found["flops"] == layers + adapted + attended + head(2, 1)


def test_answers_of_one_prompt_share_its_pass(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four answers of six tokens: the prompt but for its last token once, then six tokens of four rows each."""
    base = load_base("llama")
    with counted(base, monkeypatch) as found:
        sample(
            base, [random_row(PROMPT, 1).prompt_ids], end_ids=[V + 1], max_new_tokens=6,
            generator=generator_for(base.device, 0), completions_per_prompt=4,
        )  # fmt: skip
    assert (found["passes"], found["tokens"]) == (1 + 6, PROMPT - 1 + 4 * 6)


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("sft", 1),
        ("reward", 1),
        ("dpo", 2),  # reference, policy
        ("kto", 2),
    ],
)
def test_passes_of_a_step(
    method: str, passes: int, make_method: Callable[..., Any], tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step goes through the base once for each role that it asks, however many completions the rows have."""
    from lowrank_align.methods.metrics import Metrics

    row = {
        "sft": {"prompt": "Say: ", "completion": "this"},
        "kto": {"prompt": "Say: ", "completion": "this", "label": True},
    }.get(method, {"prompt": "Say: ", "chosen": "this", "rejected": "that one"})
    made, items = make_method(method, [row, row])
    made.backward = lambda loss: loss.backward()
    with counted(tiny_base, monkeypatch) as found:
        made.step(items, made.weight(items), Metrics())
    assert found["passes"] == passes


def test_the_short_way_is_taken_without_gradients_too(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a frozen adapter, in scoring and in sampling: PEFT's forward is not called."""
    base = load_base("llama")
    base.add_role("policy", rank=RANK)
    taken: list[str | None] = []
    plain = lora._plain
    monkeypatch.setattr(lora, "_plain", lambda *args: taken.append(plain(*args)) or taken[-1])
    with base.role("policy"):
        base.token_logps(base.collate([random_row(PROMPT, CHOSEN)]))
    assert taken == ["policy"] * (LAYERS * len(LINEARS))
