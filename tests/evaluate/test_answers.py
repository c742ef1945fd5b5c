"""Whose answers are compared: sampled ones, behind a prefix where a run was trained with one, and the data's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import UserError
from lowrank_align.evaluate.answers import (
    Asked,
    Side,
    conversation_text,
    draw,
    reference_of,
    references,
    summed_logps,
)
from lowrank_align.evaluate.comparing import kl
from lowrank_align.evaluate.policy import kl_to
from lowrank_align.rewards import seen_prompt
from lowrank_align.rollout import Rollout

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"messages": [USER, said("a"), USER, said("b"), said("c")]}, [USER, said("a"), USER], [said("b"), said("c")]),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "preference": 0.2}, "p", "r"),
        ({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]}, "p", "b"),
    ],
)
def test_the_datas_own_answer(row: dict[str, Any], prompt: Any, answer: Any) -> None:
    found, reference = reference_of(parse_row(row, "f:1", 0))
    assert (found.prompt, found.completions, reference) == (prompt, [], answer)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": "all of it"}, "f:1: text: a text without a prompt has nothing to answer"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "preference": 0.5},
            "f:1: preference: a tie has no better answer to compare with",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]},
            "f:1: ranks: several first, so no one answer to compare with",
        ),
    ],
)
def test_rows_without_a_best_answer(row: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError) as raised:
        reference_of(parse_row(row, "f:1", 0))
    assert str(raised.value) == error


def test_prompts_as_text() -> None:
    assert seen_prompt(parse_row({"prompt": [SYSTEM, USER]}, "f:1", 0)) == "Hi"
    assert conversation_text([USER]) == "Hi"  # type: ignore[list-item]
    assert conversation_text([SYSTEM, USER]) == "system: Be kind.\n\nuser: Hi"  # type: ignore[list-item]
    assert conversation_text("p") == seen_prompt(parse_row({"prompt": "p"}, "f:1", 0)) == "p"


@pytest.fixture
def voice(tiny_base: Any, speak: Callable[..., None]) -> Iterator[Any]:
    """The tiny base with a role `adapter` that is no longer the bare base."""
    tiny_base.add_role("adapter", rank=2)
    speak(tiny_base, "adapter")
    yield tiny_base
    tiny_base.remove_role("adapter")


@pytest.fixture
def renderer(tiny_base: Any) -> Renderer:
    return Renderer(tiny_base.tokenizer, max_length=256)


def ask(renderer: Renderer, *prompts: str) -> list[Asked]:
    rows = [parse_row({"prompt": prompt}, "f:1", i) for i, prompt in enumerate(prompts)]
    return [Asked(row, renderer.prompt_ids(row), str(row.prompt)) for row in rows]


def drawn(base: Any, renderer: Renderer, asked: list[Asked], role: str = "adapter") -> Side:
    return draw(base, role, role, renderer, asked, max_new_tokens=6)


def test_answers_do_not_depend_on_who_was_asked_before(voice: Any, renderer: Renderer) -> None:
    asked = ask(renderer, "Say: ", "What? ")
    alone = drawn(voice, renderer, asked)
    drawn(voice, renderer, asked, "base")
    assert drawn(voice, renderer, asked) == alone
    assert alone.tokens == [len(rollout.ids) for rollout in alone.rollouts or []]


def test_a_prefix_is_asked_behind_but_not_judged(voice: Any, renderer: Renderer) -> None:
    (one,) = asked = ask(renderer, "Say: ")
    side = drawn(voice, renderer.with_prefix("good: "), asked)
    assert side.rollouts is not None
    prefix = renderer.with_prefix("good: ").prefix_ids
    assert side.rollouts[0].prompt_ids == [*one.prompt_ids, *prefix]
    assert side.trees[0].prompt_ids == one.prompt_ids
    assert (side.prefix, side.trees[0].completions[0].ids) == ("good: ", side.rollouts[0].ids)


def test_references_are_read_as_rows_are(renderer: Renderer) -> None:
    (one,) = ask(renderer, "Say: ")
    side = references(renderer, [Asked(one.row, one.prompt_ids, one.text, "yes")])
    expected = renderer.tree_row(parse_row({"prompt": "Say: ", "completion": "yes"}, "f:1", 0)).tree
    assert (side.texts, side.trees[0].completions) == (["yes"], expected and expected.completions)
    assert side.finished is None


def logp(base: Any, role: str, rollout: Rollout) -> float:
    """Of an answer in nats, from the model's logits alone."""
    ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.ids]]), len(rollout.prompt_ids)
    with base.role(role), torch.no_grad():
        logps = base.model(ids).logits[0].double().log_softmax(-1)
    return sum(logps[start + i - 1, token].item() for i, token in enumerate(rollout.ids))


def test_kl_is_that_of_the_logits_and_zero_to_itself(voice: Any, renderer: Renderer) -> None:
    asked = ask(renderer, "Say: ", "A longer question? ", "x")
    side = drawn(voice, renderer, asked)
    assert side.rollouts is not None
    by_hand = sum(sign * logp(voice, role, r) for role, sign in (("adapter", 1), ("base", -1)) for r in side.rollouts)
    found = kl(voice, "adapter", "base", asked, side, [], 2)
    assert found.nats.value == pytest.approx(by_hand / 3, abs=1e-4)
    assert kl_to(voice, "adapter", "base", side.rollouts) == pytest.approx(by_hand / 3, abs=1e-4)
    assert found.nats_per_token == pytest.approx(found.nats.value * 3 / sum(side.tokens), abs=1e-6)
    assert abs(found.nats.value) > 0.1
    assert kl(voice, "adapter", "adapter", asked, side, [], 2).nats.value == 0


def test_kl_counts_each_roles_own_prefix(voice: Any, renderer: Renderer) -> None:
    """The same role without the prefix that it answered behind is another distribution."""
    asked = ask(renderer, "Say: ")
    prefixed = renderer.with_prefix("good: ")
    side = drawn(voice, prefixed, asked)
    assert kl(voice, "adapter", "adapter", asked, side, prefixed.prefix_ids, 2).nats.value == 0
    assert kl(voice, "adapter", "adapter", asked, side, [], 2).nats.value != 0


def test_summed_logps_of_rows_with_several_answers(voice: Any, renderer: Renderer) -> None:
    """A pair's row counts both answers together: as two rows of one each."""
    pair = renderer.tree_row(parse_row({"prompt": "p", "chosen": "ab", "rejected": "cde"}, "f:1", 0)).tree
    both = [renderer.tree_row(parse_row({"prompt": "p", "completion": t}, "f:1", 0)).tree for t in ("ab", "cde")]
    assert pair and all(both)
    logps, tokens = summed_logps(voice, "adapter", [pair], 2)
    apart, counts = summed_logps(voice, "adapter", [row for row in both if row], 1)
    assert (logps[0], tokens[0]) == (pytest.approx(sum(apart), abs=1e-4), sum(counts))
    assert counts == [3, 4]  # with the end token
