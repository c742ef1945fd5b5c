"""Pairs of a role's own answers stand under their own prompt, also where two conversations end alike."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lowrank_align import pairs
from lowrank_align.annotators import Annotator
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, parse_row
from lowrank_align.pairs import draw_pairs
from lowrank_align.rollout import Rollout

PERFECT = Annotator("perfect", flipped=0.0)


def asked_of(animal: str) -> list[dict[str, str]]:
    """A conversation about an animal; all of them end alike."""
    return [
        {"role": "user", "content": f"Tell me of {animal}s."},
        {"role": "assistant", "content": "Where to begin?"},
        {"role": "user", "content": "Go on."},
    ]


def by_length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def drawn(tiny_base: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pairs.Drawn]:
    """`drawn(rows, answers)`: pairs of these answers, two to each row, as if the base had given them."""

    def draw(rows: Sequence[Row], answers: Sequence[tuple[str, str]], score: Any = by_length) -> pairs.Drawn:
        ids = [[tiny_base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in two] for two in answers]
        groups = [[Rollout([1], one, True) for one in two] for two in ids]
        monkeypatch.setattr(pairs, "sample", lambda *_, **__: groups)
        renderer = Renderer(tiny_base.tokenizer, max_length=256)
        return draw_pairs(tiny_base, "base", renderer, rows, [PERFECT], score, seed=0, max_new_tokens=16)

    return draw


def test_answers_stand_under_their_own_prompt(drawn: Callable[..., pairs.Drawn]) -> None:
    """Both conversations end with "Go on."; the identical pair between them gives no row. What a template
    puts around an answer is no part of it."""
    rows = [parse_row({"prompt": asked_of(animal)}, "f:1", i) for i, animal in enumerate(["cat", "hen", "dog"])]
    found = drawn(rows, [("cats", "cats purr"), ("hens", "hens"), ("\n dogs bark ", "dogs")])
    assert found.labels.rows == [
        {
            "prompt": asked_of(animal),
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": f"{animal}s"}],
            "annotator": "perfect",
        }
        for animal, chosen in (("cat", "cats purr"), ("dog", "dogs bark"))
    ]
    assert found.labels.identical == 1
