"""Sampling: greedy as transformers has it, draws from softmax(logits / T) by a generator of our own, one prefill."""

import hashlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lowrank_align import rollout
from lowrank_align.base import Base
from lowrank_align.rollout import generator_for, inference, sample, seed_of
from lowrank_align.trees import TreeRow

LoadBase = Callable[..., Any]
NEVER = 128  # of a vocabulary of 128: no model says it
RECURRENT = ("falcon_h1", "qwen3_next")


@pytest.fixture
def prompts(random_row: Callable[..., TreeRow]) -> list[list[int]]:
    """Of 9, 4, 1, 9 and 6 tokens: longer and shorter than a sliding window of 6."""
    return [random_row(length, seed=seed).prompt_ids for seed, length in enumerate((9, 4, 1, 9, 6))]


def greedy(base: Base, prompts: list[list[int]], end: int = NEVER, **options: Any) -> list[list[Any]]:
    options = {"max_new_tokens": 7, "generator": torch.Generator(), "temperature": 0.0} | options
    return sample(base, prompts, end_ids=[end], **options)


def plain_greedy(base: Base, prompts: list[list[int]]) -> list[list[int]]:
    """transformers alone, a prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=7, eos_token_id=NEVER, pad_token_id=0)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


# ---- greedy


def check_greedy(base: Base, prompts: list[list[int]]) -> None:
    """Left-padded together, in batches of two, and three of each from one prefill: always what each alone gives."""
    expected = plain_greedy(base, prompts)
    assert len(set(map(tuple, expected))) == len(prompts)
    together = greedy(base, prompts)
    assert [[r.ids for r in group] for group in together] == [[ids] for ids in expected]
    assert [group[0].prompt_ids for group in together] == prompts
    assert [group[0].ids for group in greedy(base, prompts, batch_size=2)] == expected
    for batch_size in (32, 6):
        groups = greedy(base, prompts, completions_per_prompt=3, batch_size=batch_size)
        assert [[r.ids for r in group] for group in groups] == [[ids] * 3 for ids in expected]


def test_greedy_is_transformers_own(load_base: LoadBase, prompts: list[list[int]], family: str) -> None:
    check_greedy(load_base(family), prompts)


@pytest.mark.parametrize("hybrid", RECURRENT)
def test_recurrent_models_batch_equal_lengths(
    load_base: LoadBase, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, hybrid: str
) -> None:
    """Their state would run over left padding. Of lengths 9, 4, 1, 9 and 6, only first and fourth go together."""
    base = load_base(hybrid)
    check_greedy(base, prompts)
    batches: list[list[int]] = []
    original = rollout._generate

    def spying(base: Base, prompts: list[list[int]], *rest: Any) -> torch.Tensor:
        batches.append([len(prompt) for prompt in prompts])
        return original(base, prompts, *rest)

    monkeypatch.setattr(rollout, "_generate", spying)
    greedy(base, prompts)
    assert batches == [[1], [4], [6], [9, 9]]


def test_one_prefill_serves_all_completions(load_base: LoadBase, prompts: list[list[int]]) -> None:
    """The widths of the model's passes: the prompt but for its last token, once for the two prompts; then one token
    at a time for all six completions."""
    base = load_base("llama")
    shapes: list[tuple[int, ...]] = []
    hook = base.model.get_decoder().register_forward_pre_hook(
        lambda _module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        greedy(base, prompts[:2], completions_per_prompt=3, max_new_tokens=4)
    finally:
        hook.remove()
    assert shapes == [(2, 8), (6, 1), (6, 1), (6, 1), (6, 1)]


def test_the_active_role_speaks(load_base: LoadBase, prompts: list[list[int]], speak: Callable[..., None]) -> None:
    base = load_base("llama", "nf4")
    bare = greedy(base, prompts)
    base.add_role("policy", rank=4)
    with base.role("policy"):
        assert greedy(base, prompts) == bare
    speak(base, "policy")
    with base.role("policy"):
        assert greedy(base, prompts) != bare
    assert greedy(base, prompts) == bare


# ---- where a completion ends


def test_ends_after_the_end_token(load_base: LoadBase, prompts: list[list[int]]) -> None:
    """The end token is taken from the midst of one prompt's own answer: that one stops there, and keeps it."""
    base = load_base("llama")
    free = [group[0].ids for group in greedy(base, prompts)]
    end = next(token for place, token in enumerate(free[1]) if place > 1 and token not in free[1][:place])
    for copies in (1, 2):
        for ids, group in zip(free, greedy(base, prompts, end=end, completions_per_prompt=copies), strict=True):
            stop = ids.index(end) + 1 if end in ids else len(ids)
            assert [r.ids for r in group] == [ids[:stop]] * copies
            assert [r.finished for r in group] == [end in ids] * copies
    assert [r.finished for r in greedy(base, prompts, end=end)[1]] == [True]


def test_several_end_tokens_or_none(load_base: LoadBase, prompts: list[list[int]]) -> None:
    base = load_base("llama")
    free = greedy(base, prompts[:1])[0][0].ids
    assert len(set(free[:4])) == 4
    (group,) = sample(
        base,
        prompts[:1],
        end_ids=[free[3], free[1]],
        max_new_tokens=7,
        generator=torch.Generator(),
        temperature=0.0,
    )
    assert group[0].ids == free[:2]
    (group,) = sample(base, prompts[:1], end_ids=[], max_new_tokens=7, generator=torch.Generator(), temperature=0.0)
    assert (group[0].ids, group[0].finished) == (free, False)


def test_pad_is_not_the_end(load_base: LoadBase, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may well say its pad token; that is a token like any other."""
    base = load_base("llama")
    expected = greedy(base, prompts)
    monkeypatch.setattr(base, "tokenizer", SimpleNamespace(pad_token_id=expected[1][0].ids[2]))
    assert greedy(base, prompts) == expected
    assert greedy(base, prompts, completions_per_prompt=2) == [group * 2 for group in expected]


# ---- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@torch.no_grad()
def test_draws_follow_softmax_of_logits_over_temperature(
    load_base: LoadBase, prompts: list[list[int]], temperature: float
) -> None:
    """Of independent exponential times E_i / p_i, token i's is the first with probability p_i (a race of exponentials).

    So with the same E, each draw must be the arg-min of E / softmax(logits / T), the logits coming from a plain forward
    pass over the whole text. Each completion has a generator of its own, seeded by a number from the one that is given.
    """
    base = load_base("llama")
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    options = {"max_new_tokens": 6, "temperature": temperature}
    found = greedy(base, prompts[:3], generator=torch.Generator().manual_seed(7), **options)
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(7)).tolist()
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = [list(prompt) for prompt in prompts[:3]]
    unlikely = 0
    for _ in range(6):
        for text, noise in zip(texts, noises, strict=True):
            time = torch.empty(128).exponential_(generator=noise)
            p = (plain(torch.tensor([text])).logits[0, -1] / temperature).softmax(-1)
            text.append(int((time / p).argmin()))
            unlikely += text[-1] != int(p.argmax())
    assert [group[0].ids for group in found] == [text[len(p) :] for text, p in zip(texts, prompts, strict=False)]
    assert unlikely > 3


@torch.no_grad()
def test_top_p_keeps_the_likeliest_tokens(load_base: LoadBase, prompts: list[list[int]]) -> None:
    """Kept are the likeliest tokens up to and with the one that brings their sum to p; 60 draws of a first token."""
    base = load_base("llama")
    p, order = base.model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((p.cumsum(0) < 0.6).sum()) + 1
    assert 1 < kept < 100
    draw = {"max_new_tokens": 1, "completions_per_prompt": 60, "batch_size": 60, "temperature": 1.0}
    drawn = {r.ids[0] for r in greedy(base, prompts[:1], top_p=0.6, generator=torch.Generator(), **draw)[0]}
    assert len(drawn) > 1
    assert drawn <= set(order[:kept].tolist())
    free = {r.ids[0] for r in greedy(base, prompts[:1], generator=torch.Generator(), **draw)[0]}
    assert not free <= set(order[:kept].tolist())


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it(load_base: LoadBase, prompts: list[list[int]]) -> None:
    """Whatever is in memory at once, and whichever prompts another process answers."""
    base = load_base("llama")
    options: dict[str, Any] = {"temperature": 1.0, "completions_per_prompt": 3}
    found = greedy(base, prompts, generator=torch.Generator().manual_seed(3), **options)
    for size in (1, 2, 6):
        assert greedy(base, prompts, generator=torch.Generator().manual_seed(3), batch_size=size, **options) == found
    some = [greedy(base, prompts, generator=torch.Generator().manual_seed(3), only=o, **options) for o in ([0, 1], [4])]
    assert [*some[0], *some[1]] == [found[0], found[1], found[4]]


def test_draws_belong_to_their_generator(load_base: LoadBase, prompts: list[list[int]]) -> None:
    base = load_base("llama")
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    first = greedy(base, prompts, temperature=1.0, completions_per_prompt=2, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    same = torch.Generator().manual_seed(3)
    assert greedy(base, prompts, temperature=1.0, completions_per_prompt=2, generator=same) == first
    again = greedy(base, prompts, temperature=1.0, completions_per_prompt=2, generator=generator)
    assert again != first
    assert any(group[0].ids != group[1].ids for group in first)


@pytest.fixture
def opinionated(load_base: LoadBase) -> Iterator[Base]:
    """A base whose `generation_config.json` asks for what would change every draw."""
    base = load_base("llama")
    own = base.model.generation_config
    base.model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        typical_p=0.1,
        epsilon_cutoff=0.5,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        bad_words_ids=[[i] for i in range(4, 60)],
        suppress_tokens=list(range(60, 80)),
        begin_suppress_tokens=list(range(4, 60)),
        sequence_bias=[[[90], 50.0]],
        forced_eos_token_id=2,
        min_new_tokens=3,
        max_length=5,
        num_beams=2,
        guidance_scale=3.0,
    )
    yield base
    base.model.generation_config = own


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_settings_change_nothing(
    opinionated: Base, prompts: list[list[int]], temperature: float
) -> None:
    own = opinionated.model.generation_config
    draw: dict[str, Any] = {"temperature": temperature, "completions_per_prompt": 2}
    with_own = greedy(opinionated, prompts, generator=torch.Generator().manual_seed(1), **draw)
    assert opinionated.model.generation_config is own
    opinionated.model.generation_config = GenerationConfig()
    assert greedy(opinionated, prompts, generator=torch.Generator().manual_seed(1), **draw) == with_own


# ---- what sampling leaves alone


def test_train_mode_is_restored(load_base: LoadBase, prompts: list[list[int]], speak: Callable[..., None]) -> None:
    """In the midst of training: checkpointing is on, and LoRA has dropout, which is off while sampling."""
    base = load_base("llama")
    base.add_role("policy", rank=4, dropout=0.5)
    speak(base, "policy")
    with base.role("policy"):
        expected = greedy(base, prompts)
        base.enable_checkpointing(True)
        base.model.train()
        before = torch.get_rng_state()
        assert greedy(base, prompts) == expected
        assert torch.equal(torch.get_rng_state(), before)
        assert all(module.training for module in base.model.modules())
        assert torch.is_grad_enabled()
        with pytest.raises(ZeroDivisionError), inference(base):
            assert not any(module.training for module in base.model.modules())
            raise ZeroDivisionError
        assert all(module.training for module in base.model.modules())


def test_seeds_have_a_purpose() -> None:
    """The first 8 bytes of the SHA-256 of what it is for, as a big-endian number without its last bit."""
    digest = hashlib.sha256(b"5/2/rollouts").hexdigest()
    assert seed_of(5, 2, "rollouts") == int(digest[:16], 16) // 2
    others = [seed_of(5, 2, "samples"), seed_of(52, "rollouts"), seed_of(5, 3, "rollouts")]
    assert len({seed_of(5, 2, "rollouts"), *others}) == 4
    cpu = torch.device("cpu")
    assert torch.equal(
        torch.rand(3, generator=generator_for(cpu, 5, 2, "rollouts")),
        torch.rand(3, generator=torch.Generator().manual_seed(seed_of(5, 2, "rollouts"))),
    )
