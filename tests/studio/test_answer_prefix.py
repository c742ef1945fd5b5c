"""Each voice of the studio is asked behind the text that it was trained with, in answers and in the token map."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.studio.answers import Source
from lowrank_align.studio.asking import response_of
from lowrank_align.studio.token_map import token_map
from lowrank_align.studio.voices import LIVE


@pytest.fixture
def conditioned(studio: Any, run: Callable[..., Path]) -> Any:
    """The studio with a run `good` that answers behind `+ `."""
    rows = [{"prompt": "Q: ", "chosen": "fed", "rejected": "bug"}]
    folder = run("condition", rows, "made", max_steps=2, learning_rate=1e-2, good_text="+ ")
    shutil.copytree(folder, studio.runs / "good")
    studio.voices.refresh()
    return studio


def answer_of(studio: Any, voice: str) -> Any:
    found = studio.answer([{"role": "user", "content": "hi"}], Source(voice, 1.0, 1.0, 6), seed=5)
    assert found.wait(60) and found.error is None
    return found


def test_answers_and_the_token_map(conditioned: Any) -> None:
    """In the map the voice is read behind its text and the base without it: each as it would be asked."""
    studio, prefix = conditioned, conditioned.renderer.tokenizer.encode("+ ", add_special_tokens=False)
    good, plain = answer_of(studio, "good"), answer_of(studio, "base")
    assert good.prompt_ids == [*plain.prompt_ids, *prefix]
    response = response_of(good, "")
    found = token_map(studio, response)

    def logps(role: str, prompt: list[int]) -> list[float]:
        with torch.no_grad(), studio.base.role(role):
            said = studio.base.model(input_ids=torch.tensor([[*prompt, *good.ids]])).logits[0].log_softmax(-1)
        return [said[len(prompt) + i - 1, token].item() for i, token in enumerate(good.ids)]

    role = studio.speaker.call(lambda: studio.voices.voice("good").role)
    ours = studio.speaker.call(lambda: logps(role, good.prompt_ids))
    theirs = studio.speaker.call(lambda: logps("base", plain.prompt_ids))
    assert sum(mark.voice_logp for mark in found.marks) == pytest.approx(sum(ours), abs=1e-3)
    assert sum(mark.reference_logp for mark in found.marks) == pytest.approx(sum(theirs), abs=1e-3)
    assert [mark.log_ratio for mark in token_map(studio, response, "good").marks] == [0.0] * len(found.marks)


def test_the_run_that_trains_now_has_its_text(conditioned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    voices = conditioned.voices
    monkeypatch.setattr(voices, "live", "training:now")
    monkeypatch.setattr(voices, "live_prefix", "* ")
    monkeypatch.setitem(conditioned.base.roles, "policy", conditioned.base.roles["base"])
    assert conditioned.speaker.call(lambda: voices.voice(LIVE)).answer_prefix == "* "
