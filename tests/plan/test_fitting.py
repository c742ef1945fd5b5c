"""What is suggested where a workload does not fit, and how it is said."""

from dataclasses import replace

import pytest

from lowrank_align.architecture import Architecture
from lowrank_align.errors import UserError
from lowrank_align.plan import GIB, Workload, as_flags, cards, fit, gib, in_one_line, predict, size_bytes
from lowrank_align.plan.fitting import shortened

SMALL = Architecture(
    model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip
PPO = Workload(
    "ppo", micro_batch_size=4, prompt_tokens=768, completion_tokens=256, max_new_tokens=256, rollout_batch_size=64,
    adapters=4, trained_adapters=2,
)  # fmt: skip


def test_what_fits_is_left_alone() -> None:
    found = fit(SMALL, PPO, 48 * GIB)
    assert (found.fits, found.chosen, found.changes) == (True, PPO, {})


def test_what_does_not_fit_is_changed_until_it_does() -> None:
    """Whatever is chosen is predicted to fit; smaller budgets never get larger workloads."""
    before = 48 * GIB
    for size in (12, 8, 6, 5, 4):
        found = fit(SMALL, PPO, size * GIB)
        assert found.chosen is not None and found.chosen_prediction is not None
        assert found.chosen_prediction.total_bytes <= size * GIB
        assert found.chosen_prediction == predict(SMALL, found.chosen)
        assert found.chosen_prediction.total_bytes <= before
        before = found.chosen_prediction.total_bytes


def test_rows_at_once_are_given_up_before_recomputation_and_length_last() -> None:
    """SFT rows of 1,024 tokens, eight at once: a budget just under each candidate's peak leads to the next one."""
    work = Workload("sft", micro_batch_size=2)
    order = [
        {},
        {"micro_batch_size": 1},
        {"gradient_checkpointing": True},
        {"micro_batch_size": 1, "gradient_checkpointing": True},
    ]
    budget = 48 * GIB
    for changes in order:
        found = fit(SMALL, work, budget)
        assert found.changes == changes
        assert found.chosen_prediction is not None
        budget = found.chosen_prediction.total_bytes - 1
    assert fit(SMALL, work, budget).changes["gradient_checkpointing"] is True
    assert "max_length" not in {key for changes in order for key in changes}


def test_nothing_fits_a_card_smaller_than_the_weights() -> None:
    found = fit(SMALL, PPO, GIB)
    assert (found.fits, found.chosen, found.chosen_prediction) == (False, None, None)
    assert GIB < found.least_bytes < found.prediction.total_bytes


def test_a_shorter_row_is_cut_in_both_halves() -> None:
    """768 + 256 at half the length: 384 + 128, and rollouts of 128."""
    half = shortened(PPO, 512)
    assert (half.prompt_tokens, half.completion_tokens, half.max_new_tokens) == (384, 128, 128)
    assert shortened(PPO, 2048) == PPO


def test_8_bit_states_are_for_gpus() -> None:
    on_cpu = fit(SMALL, replace(PPO, device="cpu", dtype="fp32"), 9 * GIB)
    assert "optimizer" not in on_cpu.changes


def test_cards() -> None:
    found = cards(SMALL, PPO)
    assert list(found) == [6, 8, 12, 16, 24, 48]
    assert [plan.budget_bytes for plan in found.values()] == [size * GIB for size in found]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30), ("12 gib", 12 * 2**30), ("12", 12 * 2**30), ("12G", 12 * 2**30), ("12GB", 12 * 10**9),
        ("0.5GiB", 2**29), ("900MiB", 900 * 2**20), ("900MB", 900 * 10**6),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "twelve", "12GiBs", "12 GiB free", "-4GiB", "1e3", "NaN", "12TB of it"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is no size of memory"):
        size_bytes(text)


def test_a_misspelt_unit_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean gib\?"):
        size_bytes("12gibs")


def test_words() -> None:
    assert (
        as_flags({"micro_batch_size": 1, "gradient_checkpointing": True})
        == "--micro-batch-size 1 --gradient-checkpointing"
    )
    assert (gib(3 * GIB // 2), gib(GIB // 4)) == ("1.5 GiB", "256 MiB")
    line = in_one_line(fit(SMALL, PPO, 48 * GIB))
    assert line.startswith("plan: needs 10.") and ", 48.0 GiB there (training on gpu: " in line
    assert len(line.splitlines()) == 1


def test_no_memory_at_all() -> None:
    with pytest.raises(UserError, match="'0GiB' is no memory at all"):
        size_bytes("0GiB")


def test_less_than_a_twentieth_to_spare_is_tight() -> None:
    needed = predict(SMALL, PPO).total_bytes
    assert [fit(SMALL, PPO, int(needed * share)).is_tight for share in (1.0, 1.04, 1.06)] == [True, True, False]


def test_a_shorter_length_is_what_the_rows_make_of_it() -> None:
    """`at_length` is asked for halves; where it knows of no rows that are left, nothing shorter is tried."""
    asked: list[int] = []

    def at_length(work: Workload, max_length: int) -> Workload | None:
        asked.append(max_length)
        return replace(work, prompt_tokens=1, completion_tokens=9) if max_length > 300 else None

    found = fit(SMALL, PPO, GIB, at_length)
    assert (asked, found.chosen) == ([512, 256], None)
