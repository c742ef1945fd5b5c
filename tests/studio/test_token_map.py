"""The token map against log-probabilities computed the plain way."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.errors import UserError
from lowrank_align.studio.talk import Response
from lowrank_align.studio.token_map import token_map


@pytest.fixture
def sft(studio: Any, trained: Path) -> Any:
    """The studio with the run `sft`, shaken so that it is far from the base."""
    shutil.copytree(trained / "sft", studio.runs / "sft")
    studio.voices.refresh()
    return studio


def response(studio: Any, text: str, *, thought_open: bool = False, voice: str = "sft") -> Response:
    """An answer of these characters, ended, as if `voice` had drawn it."""
    ids = studio.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = studio.renderer.tokenizer("Say:<think>" if thought_open else "Say:")["input_ids"]
    digest = studio.speaker.call(lambda: studio.voices.voice(voice)).adapter_hash
    return Response(text, voice, adapter_hash=digest, prompt_ids=tuple(prompt), ids=(*ids, studio.renderer.end_ids[0]))


def plain_logps(studio: Any, role: str, answer: Response) -> list[float]:
    """log p of each answer token: the model's own logits of the whole row, without trees."""
    row = torch.tensor([[*answer.prompt_ids, *answer.ids]])
    with torch.no_grad(), studio.base.role(role):
        logps = studio.base.model(input_ids=row).logits[0].float().log_softmax(dim=-1)
    first = len(answer.prompt_ids)
    return [logps[first + i - 1, token].item() for i, token in enumerate(answer.ids)]


def test_the_values_are_the_differences_of_plain_log_probs(sft: Any) -> None:
    answer = response(sft, "a good word 1")
    found = token_map(sft, answer)
    role = sft.speaker.call(lambda: sft.voices.voice("sft").role)
    ours = sft.speaker.call(lambda: plain_logps(sft, role, answer))
    theirs = sft.speaker.call(lambda: plain_logps(sft, "base", answer))
    assert [mark.voice_logp for mark in found.marks] == pytest.approx(ours, abs=1e-4)
    assert [mark.log_ratio for mark in found.marks] == pytest.approx(
        [a - b for a, b in zip(ours, theirs, strict=True)], abs=1e-4
    )
    assert max(abs(mark.log_ratio) for mark in found.marks) > 0.01  # two steps of training did something
    assert found.log_ratio == pytest.approx(sum(ours) - sum(theirs), abs=1e-3)
    assert (found.tokens, found.voice, found.reference, found.retrained) == (len(answer.ids), "sft", "base", False)
    largest = max(found.marks, key=lambda mark: abs(mark.log_ratio))
    assert found.departures(1) == [largest]


def test_a_voice_against_itself_is_zero_everywhere(sft: Any) -> None:
    for voice in ("sft", "base"):
        found = token_map(sft, response(sft, "the word", voice=voice), voice)
        assert [mark.log_ratio for mark in found.marks] == [0.0] * len(found.marks)


def test_the_marks_spell_the_answer_and_its_end(studio: Any) -> None:
    found = token_map(studio, response(studio, "in a\nthe (er)", voice="base"))
    assert "".join(mark.text for mark in found.marks) == "in a\nthe (er)[end]"
    assert found.marks[0].text == "in"  # merged to one token
    assert not any(mark.thinking for mark in found.marks)


def test_thoughts_are_told_from_the_answer(studio: Any) -> None:
    found = token_map(studio, response(studio, "ab<think>c</think>d", voice="base"))
    assert "".join(mark.text for mark in found.marks if not mark.thinking).startswith("ab")
    assert "c" in "".join(mark.text for mark in found.marks if mark.thinking)
    assert [mark.text for mark in found.marks[-2:] if not mark.thinking] == ["d", "[end]"]
    opened = token_map(studio, response(studio, "hm</think>d", voice="base", thought_open=True))
    assert [mark.text for mark in opened.marks if not mark.thinking] == ["d", "[end]"]


def test_a_voice_that_was_trained_since_is_said(sft: Any) -> None:
    from dataclasses import replace

    answer = replace(response(sft, "word"), adapter_hash="0" * 64)
    assert token_map(sft, answer).retrained


def test_what_nobody_drew_has_no_map(studio: Any) -> None:
    with pytest.raises(UserError, match="no model drew this answer"):
        token_map(studio, Response("by hand", "written"))
