"""Streaming: token by token what `sample` draws at once, text without half characters, and nothing left behind."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from lowrank_align.data.stream import TextStream, Thoughts
from lowrank_align.rollout import sample, stream

LoadBase = Callable[..., Any]
NEVER = 128  # of a vocabulary of 128: no model says it
FAMILIES = ("llama", "mistral", "gemma3_text", "gpt2", "smollm3", "qwen3_moe", "falcon_h1", "qwen3_next", "gemma2")


@pytest.fixture
def prompt(random_row: Callable[..., Any]) -> list[int]:
    """Nine tokens: longer than the sliding windows, which are six."""
    return list(random_row(9).prompt_ids)


def streamed(base: Any, prompt: list[int], end: int = NEVER, seed: int = 0, **options: Any) -> list[int]:
    options = {"max_new_tokens": 16, "generator": torch.Generator().manual_seed(seed)} | options
    return list(stream(base, prompt, end_ids=[end], **options))


def sampled(base: Any, prompt: list[int], end: int = NEVER, seed: int = 0, **options: Any) -> list[int]:
    options = {"max_new_tokens": 16, "generator": torch.Generator().manual_seed(seed)} | options
    return list(sample(base, [prompt], end_ids=[end], **options)[0][0].ids)


# ---- which tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_own(load_base: LoadBase, prompt: list[int], family: str) -> None:
    """Plain `generate`, with the cache that the family has: full, sliding, recurrent, or some of each."""
    base = load_base(family)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=16, eos_token_id=NEVER, pad_token_id=0)
    ids = torch.tensor([prompt])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert streamed(base, prompt, temperature=0.0) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("falcon_h1", {}), *((family, {"temperature": 0.7, "top_p": 0.8}) for family in FAMILIES)],
)
def test_draws_what_sample_draws(
    load_base: LoadBase, prompt: list[int], family: str, options: dict[str, float]
) -> None:
    base = load_base(family)
    found = [streamed(base, prompt, seed=seed, **options) for seed in range(2)]
    assert found == [sampled(base, prompt, seed=seed, **options) for seed in range(2)]
    assert found[0] != found[1]


def test_it_ends_with_the_end_token(load_base: LoadBase, prompt: list[int]) -> None:
    """The end is the third token of the free answer, and comes out too; with room for two, it never comes."""
    base = load_base("llama")
    free = streamed(base, prompt, temperature=0.0)
    end = free[2]
    assert end not in free[:2]
    assert streamed(base, prompt, end, temperature=0.0) == free[:3]
    assert streamed(base, prompt, end, temperature=0.0, max_new_tokens=2) == free[:2]


def test_one_token_at_a_time(load_base: LoadBase, prompt: list[int]) -> None:
    """The model sees the prompt once, then each new token alone: and none before the one before was taken."""
    base = load_base("llama")
    widths: list[int] = []
    hook = base.model.get_decoder().register_forward_pre_hook(
        lambda _module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        tokens = stream(base, prompt, end_ids=[NEVER], max_new_tokens=3, generator=torch.Generator())
        assert widths == []
        seen = []
        for _ in tokens:
            seen.append(list(widths))
    finally:
        hook.remove()
    assert seen == [[9], [9, 1], [9, 1, 1]]


# ---- under which role, and what is left behind


def test_the_role_is_that_of_the_call(load_base: LoadBase, prompt: list[int], speak: Callable[..., None]) -> None:
    """The stream begins under the policy; that others speak between its tokens changes nothing for either."""
    base = load_base("llama", "nf4")
    base.add_role("policy", rank=4)
    speak(base, "policy")
    bare = streamed(base, prompt)
    with base.role("policy"):
        alone = streamed(base, prompt)
        mixed = stream(base, prompt, end_ids=[NEVER], max_new_tokens=16, generator=torch.Generator().manual_seed(0))
    assert alone != bare
    found = []
    for token in mixed:
        found.append(token)
        assert base.active_role.name == "base"
        if len(found) in (3, 7):
            assert streamed(base, prompt) == bare
    assert found == alone


def test_an_abandoned_stream_leaves_nothing_behind(
    load_base: LoadBase, prompt: list[int], speak: Callable[..., None]
) -> None:
    """In the midst of training: train mode, checkpointing, dropout, gradients on, the model's own settings in place."""
    base = load_base("llama")
    base.add_role("policy", rank=4, dropout=0.5)
    speak(base, "policy")
    with base.role("policy"):
        expected = streamed(base, prompt)
        base.enable_checkpointing(True)
        own, before = base.model.generation_config, torch.get_rng_state()
        tokens = stream(base, prompt, end_ids=[NEVER], max_new_tokens=16, generator=torch.Generator().manual_seed(0))
        for count in (1, 2):
            assert next(tokens) == expected[count - 1]
            assert all(module.training for module in base.model.modules())
            assert torch.is_grad_enabled()
            assert base.model.generation_config is own
        tokens.close()  # type: ignore[attr-defined]
        assert base.active_role.name == "policy"
        assert torch.equal(torch.get_rng_state(), before)
        assert streamed(base, prompt) == expected
    assert base.active_role.name == "base"
    assert [p.grad for p in base.trainable_parameters("policy").values()] == [None] * 28


def test_a_failing_step_leaves_nothing_behind(load_base: LoadBase, prompt: list[int]) -> None:
    base = load_base("llama")
    base.add_role("policy", rank=4)
    tokens = None
    with base.role("policy"):
        tokens = stream(base, prompt, end_ids=[NEVER], max_new_tokens=4, generator=torch.Generator())
    next(tokens)
    hook = base.model.get_decoder().register_forward_pre_hook(lambda module, args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            next(tokens)
    finally:
        hook.remove()
    assert base.active_role.name == "base"
    assert torch.is_grad_enabled()
    assert not base.model.training


# ---- text


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a token a byte, and a few merges, one of which ends within a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "ð"), ("Ġð", "Ł"), ("Ã", "©")]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(merge) for merge in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is part of the word behind it, unknown characters are bytes, a text's first space goes."""
    words = ["▁", "▁▁", "▁he", "he", "▁a", "a", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "he"), ("▁", "a"), ("▁", "▁"), ("h", "e")]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "h", "e", *words])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(strip)
    core.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZERS = {"bytes": byte_level(), "pieces": sentence_piece()}


def decode(name: str) -> Callable[[Sequence[int]], str]:
    return lambda ids: TOKENIZERS[name].decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(name: str, ids: Sequence[int]) -> list[str]:
    text = TextStream(decode(name))
    return [*(text.push(token) for token in ids), text.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.sampled_from("hea \né🙂🇩🇪漢"), max_size=12), specials=st.sets(st.integers(0, 12)))
def test_pieces_are_whole_characters_and_join_to_the_text(name: str, text: str, specials: set[int]) -> None:
    """Special tokens strewn in are not said. Every piece is text that UTF-8 can write, none holds half a character."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text).input_ids
    for place in sorted(specials, reverse=True):
        ids.insert(min(place, len(ids)), tokenizer.convert_tokens_to_ids("<end>"))
    found = pieces(name, ids)
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found)


@given(ids=st.lists(st.integers(0, 259), max_size=12))
def test_bytes_that_are_no_text_are_said_as_decoding_them_says(ids: list[int]) -> None:
    assert "".join(pieces("bytes", ids)) == decode("bytes")(ids)


def test_a_character_waits_for_its_bytes() -> None:
    """🙂 is four bytes, é two; here a token each, but for the space, which comes merged with 🙂's first two."""
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("he 🙂é").input_ids
    assert len(ids) == 5
    assert pieces("bytes", ids) == ["he", "", "", " 🙂", "é", ""]
    assert pieces("bytes", ids[:3]) == ["he", "", "", " \ufffd"]  # stopped there: what there is, at the end


def test_spaces_stay_between_pieces() -> None:
    """Decoded alone, each of these would lose its space."""
    ids = TOKENIZERS["pieces"](" he a  he").input_ids
    assert "".join(pieces("pieces", ids)) == " he a  he"
    assert "".join(decode("pieces")([token]) for token in ids) != " he a  he"


# ---- thoughts


def thoughts(*texts: str, thinking: bool = False) -> list[tuple[str, bool]]:
    split = Thoughts(thinking)
    return [(p.text, p.thinking) for text in texts for p in split.push(text)] + [tuple(p) for p in split.flush()]


def test_thoughts_are_told_from_the_answer() -> None:
    assert thoughts("<think>\nhm</think>yes") == [("<think>", True), ("\nhm</think>", True), ("yes", False)]
    assert thoughts("hm</think>yes", thinking=True) == [("hm</think>", True), ("yes", False)]
    assert thoughts("yes") == [("yes", False)]
    assert thoughts("<think>hm", thinking=True) == [("<think>hm", True)]  # opened already


def test_a_mark_that_was_none() -> None:
    """`<` may begin a mark, so it waits for what follows."""
    assert thoughts("a <", "b") == [("a ", False), ("<b", False)]
    assert thoughts("a <thi") == [("a ", False), ("<thi", False)]


@given(cuts=st.lists(st.integers(0, 40), max_size=8))
def test_marks_in_bits(cuts: list[int]) -> None:
    """However it is cut, the same characters are thought: those from the opening mark to the closing one."""
    text = "a<<think>b</thin</think>c<think>d</think>"
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = thoughts(*(text[a:b] for a, b in pairwise(places)))
    assert "".join(part for part, _ in found) == text
    marks = "".join("t" * len(part) if thought else "-" * len(part) for part, thought in found)
    assert marks == "--" + "t" * len("<think>b</thin</think>") + "-" + "t" * len("<think>d</think>")
