"""How far people agree, and judges with them, from entries of a store."""

from typing import Any

import pytest

from lowrank_align.evaluate.people import people, siding, standing, votes
from lowrank_align.store import Completion, Judgement, Record, Store


def pair(prompt: str, *texts: str, kind: Any = "pair") -> Record:
    return Record(kind=kind, prompt=prompt, completions=tuple(Completion(text) for text in texts))


def preferred(*ranks: float, tags: tuple[str, ...] = ()) -> Judgement:
    return Judgement("preferred" if len(ranks) == 2 else "ranked", ranks=ranks, tags=tags)


@pytest.fixture
def path(tmp_path: Any) -> str:
    """p: ann and ben prefer the same text, though ben's record has it second; q: they differ; r: ann alone ties; s: a
    ranking of three by ben, two of them equal."""
    file = str(tmp_path / "votes.db")
    with Store(file) as store:
        for record, who, judgement in (
            (pair("p", "x", "y"), "ann", preferred(1, 2, tags=("short",))),
            (pair("p", "y", "x"), "ben", preferred(2, 1)),
            (pair("q", "x", "y"), "ann", preferred(1, 2)),
            (pair("q", "x", "y"), "ben", preferred(2, 1, tags=("short", "kind"))),
            (pair("r", "x", "y"), "ann", Judgement("tie")),
            (pair("s", "x", "y", "z", kind="ranking"), "ben", preferred(1, 2, 2)),
        ):
            store.add(record)
            store.judge(record.id, who, judgement, expected_version=0)
    return file


def test_agreement_on_the_same_answers(path: str) -> None:
    """Of the two prompts that both judged, they agree on one; p is two records, which are the same answers."""
    found = people(standing(path))
    assert (found.together.share, found.together.comparisons) == (0.5, 2)
    assert found.by_two["ann, ben"].share == 0.5
    assert found.judgements == {"ann": 3, "ben": 3}


def test_votes_are_the_decided_comparisons(path: str) -> None:
    """The tie of r took no side; of s, x over y and x over z, while y and z are equal."""
    found, left_out = votes(standing(path))
    assert [(v.annotator, v.row.prompt, *v.row.completions) for v in found] == [
        ("ann", "p", "x", "y"),
        ("ben", "p", "x", "y"),
        ("ann", "q", "x", "y"),
        ("ben", "q", "y", "x"),
        ("ben", "s", "x", "y"),
        ("ben", "s", "x", "z"),
    ]
    assert dict(left_out) == {"no side was taken": 1, "a tie": 1}


def test_siding_by_annotator_and_tag(path: str) -> None:
    """Margins for the six votes above: a judge that likes x always is right on all but ben's q; level on the last."""
    found = siding(votes(standing(path))[0], [1.0, 1.0, 2.0, -1.0, 1.0, 0.0])
    assert found.together[3:] == (4, 1, 1)
    assert {name: rate[3:] for name, rate in found.by_annotator.items()} == {"ann": (2, 0, 0), "ben": (2, 1, 1)}
    assert {name: rate[3:] for name, rate in found.by_tag.items()} == {"kind": (0, 0, 1), "short": (1, 0, 1)}
