"""The same promises on a CUDA GPU: 4-bit base, bf16 arithmetic, fp32 adapters, paged optimiser. Skipped without one."""

from pathlib import Path

import pytest
import torch

from lowrank_align.base import Base
from lowrank_align.progress import Progress
from lowrank_align.train import train
from lowrank_align.trees import Completion, TreeRow, collate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(str(tiny_llama), quantize="nf4", device="cuda")


def test_lora_weights_stay_fp32_under_a_16_bit_base(base: Base) -> None:
    """TRL's bf16 adapters lose updates below 2^-8 of a weight; ours are fp32 whatever the base computes in."""
    base.add_role("policy", rank=4)
    assert base.compute_dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in base.trainable_parameters("policy").values()} == {torch.float32}


def test_policy_is_reference_at_step_0_in_16_bit(base: Base) -> None:
    """Both go through the same path and precision, so the first log-ratio is exactly 0."""
    base.add_role("policy", rank=4)
    for name, parameter in base.trainable_parameters("policy").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    base.add_role("reference", frozen_copy_of="policy")
    batch = base.collate([TreeRow([1, 5, 6], [Completion([7, 8, 9], [True] * 3), Completion([10, 2], [True] * 2)])])
    with torch.no_grad():
        with base.role("policy"):
            policy = base.token_scores(batch).logps
        with base.role("reference"):
            reference = base.token_scores(batch).logps
    assert torch.equal(policy, reference)


def test_tree_rows_equal_flat_rows_within_16_bit_rounding(base: Base) -> None:
    """bf16 keeps 8 bits: log-probs of a few nats agree within a tenth of a nat."""
    row = TreeRow([1, 5, 6, 7], [Completion([8, 9, 10], [True] * 3), Completion([11, 12], [True] * 2)])
    with torch.no_grad():
        tree = base.token_scores(collate([row], "tree").to(base.device)).per_token_logps
        flat = base.token_scores(collate([row], "flat").to(base.device)).per_token_logps
    assert (tree - flat).abs().max() < 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_dpo_starts_at_ln_2(base: Base, optimizer: str, tmp_path: Path) -> None:
    """-log s(0) = ln 2 = 0.6931, with each optimiser that the settings offer."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "w5 w6", "chosen": " w7 w8", "rejected": " w9"}\n' * 4, encoding="utf-8")
    summary = train(
        "dpo", base=base, progress=Progress(quiet=True), data=str(data), out=str(tmp_path / "run"),
        max_steps=1, batch_size=4, optimizer=optimizer, sample_steps=0,
    )  # fmt: skip
    assert summary.figures["loss"] == pytest.approx(0.6931, abs=1e-4)
