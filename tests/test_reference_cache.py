"""The reference's log-probs from disk: the same numbers, computed once, whatever the batch, the round or the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.reference_cache import ReferenceCache

PAIRS = [
    {"prompt": f"{i}. Say: ", "chosen": f"a good word{' and more' * (i % 3)}", "rejected": f"bad {i}"} for i in range(6)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(load_base: Any, speak: Callable[..., None], own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(own_cache))  # `load_base` has one for all tests
    base = load_base("llama")
    base.add_role("policy", rank=2)
    speak(base, "policy")
    base.add_role("reference", frozen_copy_of="policy")
    return base


def test_what_it_gives_is_what_the_role_says(base: Any, random_row: Any) -> None:
    """Rows of different lengths and numbers of completions, in a batch or alone, in another order, read again."""
    rows = [random_row(5, 3, 4), random_row(7, 2, seed=1), random_row(3, 1, 2, 5, seed=2)]
    cache = ReferenceCache(base, "reference")
    with base.role("reference"):
        expected = base.token_logps(base.collate(rows))
        alone = base.token_logps(base.collate(rows[1:2]))
    assert torch.allclose(cache.token_logps(rows), expected, atol=1e-5)
    assert torch.equal(cache.token_logps(rows[1:2])[:, :2], alone)
    cache.save()
    again = ReferenceCache(base, "reference")
    assert torch.equal(again.token_logps(rows), cache.token_logps(rows))
    assert not again.unsaved


def test_another_row_or_another_role_is_not_found(
    base: Any, random_row: Any, speak: Callable[..., None], own_cache: Path
) -> None:
    cache = ReferenceCache(base, "reference")
    cache.token_logps([random_row(5, 3)])
    cache.save()
    other = random_row(5, 3)
    other.completions[0].mask[1] = False
    again = ReferenceCache(base, "reference")
    again.token_logps([other])
    assert len(again.unsaved) == 1
    speak(base, "reference", seed=5)
    assert ReferenceCache(base, "reference").known == {}
    assert ReferenceCache(base, "base").known == {}
    assert len(list(own_cache.glob("reference/*"))) == 1


def test_a_damaged_file_is_left_out_and_made_again(
    base: Any, random_row: Any, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = random_row(5, 3)
    cache = ReferenceCache(base, "reference")
    first = cache.token_logps([row])
    cache.save()
    (file,) = own_cache.glob("reference/*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    again = ReferenceCache(base, "reference")
    assert "left out, it cannot be read" in caplog.text
    assert torch.equal(again.token_logps([row]), first)


def test_a_run_asks_the_reference_once_for_a_row(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Three rounds through six rows, then another run from the same start; losses as without it."""
    asked: list[int] = []
    compute = ReferenceCache._compute

    def counted(cache: Any, row: Any, name: str) -> None:
        asked.append(row.index)
        compute(cache, row, name)

    monkeypatch.setattr(ReferenceCache, "_compute", counted)
    knobs = {"max_steps": 3, "batch_size": 6, "micro_batch_size": 1, "learning_rate": 5e-3}
    plain = run("dpo", PAIRS, "plain", **knobs)
    assert not asked and not own_cache.is_dir()
    cached = run("dpo", PAIRS, "cached", cache_reference=True, **knobs)
    assert sorted(asked) == list(range(6))
    run("dpo", PAIRS, "other", cache_reference=True, **{**knobs, "beta": 0.3})
    assert len(asked) == 6
    one, other = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (plain, cached))
    assert one == other
