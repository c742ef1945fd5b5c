"""Pairs of a role's own answers: what is labelled, in the form of the prompt, and what is left out."""

from typing import Any

import pytest

from lowrank_align import pairs
from lowrank_align.annotators import Annotator
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.pairs import draw_pairs
from lowrank_align.rollout import Rollout

FAIR = [Annotator("fair", flipped=0.0)]


def length(prompts: Any, completions: Any) -> list[float]:
    """A point a character."""
    return [float(len(text)) for text in completions]


def test_labelled_in_the_form_of_the_prompt(tiny_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts; the answers to the second are the same, one to the third has a NUL character, which no file may
    hold. The longer answer is chosen. Tokens: 8 answers, of 2 + 1, 1 + 1, 2 + 1 and 1 + 3 ids, 12 in all."""
    renderer = Renderer(tiny_base.tokenizer, max_length=64)
    a, b, nul = (renderer.tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "<pad>"))
    drawn = [[[a, a], [b]], [[a], [a]], [[a, nul], [b]], [[a], [b, b, b]]]
    groups = [[Rollout([1], ids, True) for ids in group] for group in drawn]
    monkeypatch.setattr(pairs, "sample", lambda *given, **named: groups)
    texts = {(a, nul): "a\0"}
    decode = renderer.decode
    monkeypatch.setattr(renderer, "decode", lambda ids: texts.get(tuple(ids)) or decode(ids))
    chat = [{"role": "user", "content": "four"}]
    rows = [parse_row({"prompt": prompt}, "", i) for i, prompt in enumerate(["one", "two", "three", chat])]
    found = draw_pairs(tiny_base, "base", renderer, rows, FAIR, length, seed=0, max_new_tokens=4)
    assert found.labels.rows == [
        {"prompt": "one", "chosen": "aa", "rejected": "b", "annotator": "fair"},
        {
            "prompt": chat,
            "chosen": [{"role": "assistant", "content": "bbb"}],
            "rejected": [{"role": "assistant", "content": "a"}],
            "annotator": "fair",
        },
    ]
    assert (found.labels.identical, found.labels.refused) == (1, 1)
    assert "1 left out: both answers the same, 1 left out: no text that a file may hold" in found.labels.told()
    assert (found.answers, found.tokens, found.mean_tokens) == (8, 12, 1.5)
