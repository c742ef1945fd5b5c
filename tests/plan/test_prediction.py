"""The arithmetic of the plan against numbers derived by hand, and against the tensors that are really there."""

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_align import lora, memory, scoring
from lowrank_align.architecture import Architecture
from lowrank_align.plan import GIB, Workload, adapter_parameters, cache_bytes, predict
from lowrank_align.plan import prediction as module
from lowrank_align.presets import read_preset
from lowrank_align.rollout import generator_for, sample
from lowrank_align.skeleton import measure
from lowrank_align.trees import Completion, TreeRow

# Llama 3.1 8B: figures that anybody can look up, so that the numbers below can be checked with a pocket calculator.
LLAMA_8B = Architecture(
    model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072,
)  # fmt: skip


# ---- by hand


def test_weights_of_an_8b_model() -> None:
    """A layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336 = 218,103,808; x 32 = 6,979,321,856.

    NF4: 0.5 bytes, a byte per 64, four per 16,384: 3,600,265,216 (less what rounds down). Norms: 65 x 4096 x 2 bytes.
    Embeddings and head: 2 x 128256 x 4096 x 2 bytes.
    """
    parts = predict(LLAMA_8B, Workload("sft")).phases["training"]
    assert parts.weights == int(6_979_321_856 * (0.5 + 1 / 64 + 1 / 4096)) + 65 * 4096 * 2
    assert parts.embeddings_and_head == 2 * 128256 * 4096 * 2
    assert LLAMA_8B.parameters == 8_030_261_248  # as its card has it


@pytest.mark.parametrize(("quantize", "bytes_per_weight"), [("int8", 1.0), ("none", 2.0)])
def test_other_precisions_of_the_weights(quantize: str, bytes_per_weight: float) -> None:
    parts = predict(LLAMA_8B, Workload("sft", quantize=quantize)).phases["training"]
    assert parts.weights == int(6_979_321_856 * bytes_per_weight) + 65 * 4096 * 2


def test_adapters_and_what_trains_them() -> None:
    """r x (in + out): q, o 8192, k, v 5120, gate, up, down 18432 = 81,920 a layer; r 16, 32 layers: 41,943,040.

    PPO with four adapters, two of them trained: 4 bytes a weight, 4 a gradient, 8 an Adam state.
    """
    work = Workload("ppo", adapters=4, trained_adapters=2, max_new_tokens=64, completion_tokens=64)
    assert adapter_parameters(LLAMA_8B, work) == 41_943_040
    parts = predict(LLAMA_8B, work).phases["training"]
    assert parts.adapters == 4 * 4 * 41_943_040
    assert parts.gradients == 2 * 4 * 41_943_040
    assert parts.optimizer == 2 * 8 * 41_943_040
    only_two = replace(work, target_modules=("q_proj", "v_proj"))
    assert adapter_parameters(LLAMA_8B, only_two) == 32 * 16 * (8192 + 5120)


def test_8_bit_states_take_a_quarter_and_paged_ones_nothing() -> None:
    """Two bytes a weight for the two states, and for each an fp32 scale per 256."""
    work, weights = Workload("sft"), 41_943_040
    found = [
        predict(LLAMA_8B, replace(work, optimizer=name)).phases["training"].optimizer
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    ]
    assert found == [8 * weights, 2 * weights + 2 * weights // 64, 0]


def test_the_cache_of_rollouts() -> None:
    """Two tensors of 8 x 128 in 32 layers, 2 bytes: 131,072 a token; 32 rollouts of 640 tokens: 2.5 GiB."""
    assert cache_bytes(LLAMA_8B, 1, 1, 2) == 131_072
    work = Workload("ppo", prompt_tokens=512, completion_tokens=128, max_new_tokens=128, rollout_batch_size=32)
    rollouts = predict(LLAMA_8B, work).phases["rollouts"]
    assert cache_bytes(LLAMA_8B, 32, 640, 2) == int(2.5 * GIB)
    assert rollouts.kv_cache in (int(2.5 * GIB), 2 * GIB)  # at the last step, or at the prefill of 512 tokens


def test_layers_with_a_window_hold_no_more_than_it() -> None:
    """One full layer of 100 tokens, three of at most 16: 148 x 2 x 2 heads x 8 x 4 bytes."""
    figures = {"num_hidden_layers": 4, "sliding_layers": 3, "sliding_window": 16, "num_key_value_heads": 2}
    mixed = LLAMA_8B.model_copy(update={**figures, "head_dim": 8})
    assert cache_bytes(mixed, 1, 100, 4) == 148 * 2 * 16 * 4
    recurrent = mixed.model_copy(update={"recurrent_layers": 1, "sliding_layers": 2})
    assert cache_bytes(recurrent, 1, 100, 4) == (100 + 32) * 2 * 16 * 4


def test_a_chunk_of_logits_is_64_mib_whatever_the_length() -> None:
    """130 rows of 128,256 fp32 logits; three such tensors at the peak."""
    work = Workload("sft", gradient_checkpointing=True, micro_batch_size=1, prompt_tokens=1, completion_tokens=131)
    chunk = 64 * 2**20 // (4 * 128256) * 4 * 128256
    assert predict(LLAMA_8B, work).phases["training"].scoring_chunk == 3 * chunk
    short = replace(work, completion_tokens=10)
    assert module._chunk_bytes(LLAMA_8B, short) == 10 * 4 * 128256
    assert predict(LLAMA_8B, replace(work, method="reward")).phases["training"].scoring_chunk == 0


def test_constants_are_those_of_the_code() -> None:
    assert module.CHUNK_BYTES == scoring.CHUNK_BYTES
    assert module.DENSE_COPIES_BYTES == lora.DENSE_COPIES_BYTES
    assert module.OWN_PAGES_FROM_BYTES == memory.OWN_PAGES_FROM_BYTES


def test_a_tree_row_holds_its_prompt_once() -> None:
    """Prompt 100 and two answers of 50: 200 tokens as a tree, 300 flat; two rows of them."""
    pair = Workload("dpo", prompt_tokens=100, completion_tokens=50, completions=2, micro_batch_size=2)
    assert (pair.tokens, pair.row_tokens, pair.scored_tokens) == (400, 200, 200)
    flat = replace(pair, layout="flat")
    assert (flat.tokens, flat.row_tokens, flat.scored_tokens) == (600, 150, 200)


def test_phases() -> None:
    assert set(predict(LLAMA_8B, Workload("sft")).phases) == {"training"}
    assert set(predict(LLAMA_8B, Workload("ppo", max_new_tokens=8)).phases) == {"training", "rollouts"}
    chat = predict(LLAMA_8B, Workload("chat", trained_adapters=0, max_new_tokens=8))
    assert set(chat.phases) == {"answering"}
    assert (chat.phases["answering"].gradients, chat.phases["answering"].optimizer) == (0, 0)


def test_experts_are_kept_in_16_bits() -> None:
    """Qwen3 30B-A3B: 48 layers x 128 experts x 3 matrices of 2048 x 768 are 29 of its 30.5 billion weights."""
    architecture = read_preset("qwen3-30b-a3b").architecture
    assert architecture is not None
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    weights = predict(architecture, Workload("sft")).phases["training"].weights
    assert experts < weights < 1.03 * experts


# ---- against the tensors that are there


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made while it is on, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known[key] = tensor.untyped_storage().nbytes()
                self.now += self.known[key]
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


CASES: dict[str, Any] = {  # family, precision, figures, adapted layers, checkpointing
    "fp32": ("llama", torch.float32, {}, (), False),
    "bf16": ("llama", torch.bfloat16, {}, (), False),
    "fp32, checkpointed": ("llama", torch.float32, {}, (), True),
    "bf16, checkpointed": ("llama", torch.bfloat16, {}, (), True),
    "query norms": ("qwen3", torch.bfloat16, {}, (), False),
    "four norms, windows": ("gemma3_text", torch.float32, {"sliding_window": 16}, (), False),
    "fused layers": ("phi3", torch.float32, {"pad_token_id": 0}, (), False),
    "two layers adapted": ("llama", torch.float32, {}, ("q_proj", "v_proj"), False),
    "large vocabulary": ("llama", torch.float32, {"vocab_size": 9000}, (), False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_pass_keeps_what_the_plan_says(case: str, random_base: Callable[..., Any]) -> None:
    """The most bytes alive during forward and backward, beside weights and adapters: within 12 % of the plan's.

    Nothing is accumulated, so of the gradients only those of the layers already passed are there.
    """
    family, dtype, figures, names, checkpointing = CASES[case]
    base = random_base(family, dtype, **figures)
    base.add_role("policy", rank=8, target_modules=list(names) or None)
    base.enable_checkpointing(checkpointing)
    rng = random.Random(0)
    answers = [[rng.randrange(3, 60) for _ in range(40)] for _ in range(2)]
    row = TreeRow([rng.randrange(3, 60) for _ in range(80)], [Completion(ids, [True] * 40) for ids in answers])
    gc.collect()
    seen = Alive()
    seen.known = {p.untyped_storage()._cdata: 0 for p in base.model.parameters()}
    with seen, base.role("policy"):
        batch = base.collate([row, row])
        base.token_scores(batch).logps.sum().backward()
    precision = "fp32" if dtype is torch.float32 else "bf16"
    work = Workload("dpo", "none", precision, "cpu", 8, names, 2, 80, 40, 2, gradient_checkpointing=checkpointing)
    parts = predict(measure(base.model.config, family), work).phases["training"]
    planned = parts.activations + parts.scoring_chunk
    assert planned == pytest.approx(seen.most - parts.gradients / 2, rel=0.12)


@pytest.mark.parametrize(("new_tokens", "dtype"), [(16, torch.float32), (16, torch.bfloat16), (200, torch.float32)])
def test_rollouts_hold_what_the_plan_says(new_tokens: int, dtype: torch.dtype, random_base: Callable[..., Any]) -> None:
    """Eight prompts of 64 tokens: the prefill is the peak, or with many new tokens the full cache; within 15 %."""
    base = random_base("llama", dtype)
    base.add_role("policy", rank=8)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 60) for _ in range(64)] for _ in range(8)]
    gc.collect()
    seen = Alive()
    seen.known = {p.untyped_storage()._cdata: 0 for p in base.model.parameters()}
    with seen, base.role("policy"):
        sample(
            base, prompts, end_ids=[1], max_new_tokens=new_tokens, generator=generator_for(base.device, 0), batch_size=8
        )
    precision = "fp32" if dtype is torch.float32 else "bf16"
    work = Workload(
        "chat", "none", precision, "cpu", 8, prompt_tokens=64, completion_tokens=new_tokens,
        max_new_tokens=new_tokens, rollout_batch_size=8,
    )  # fmt: skip
    parts = predict(measure(base.model.config, "llama"), work).phases["answering"]
    assert parts.kv_cache + parts.activations == pytest.approx(seen.most, rel=0.15)


@pytest.fixture
def random_base() -> Callable[..., Any]:
    """A random model of a family, three layers of width 128."""
    from pathlib import Path

    from transformers import AutoConfig, AutoModelForCausalLM

    from lowrank_align.base import Base
    from lowrank_align.loading import Loaded

    class NoTokenizer:
        pad_token_id = 0

    def build(family: str, dtype: torch.dtype, **figures: Any) -> Base:
        sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512, "eos_token_id": 2}
        sizes |= {"bos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": True}
        sizes |= {"head_dim": 32} if family != "phi3" else {}
        config = AutoConfig.for_model(family, **(sizes | figures))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
        return Base(Loaded(model, NoTokenizer(), family, Path("."), "", dtype))

    return build
