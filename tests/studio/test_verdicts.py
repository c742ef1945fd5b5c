"""Thumbs and pairs out of a talk: what the store gets, and that the trainers take it."""

from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store.export import export_lines
from lowrank_align.studio.answers import Source
from lowrank_align.studio.asking import Wish
from lowrank_align.studio.chatting import Chat, Chats
from lowrank_align.studio.verdicts import mend, prefer, rate

SAMPLING = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 256, "seed": 4}


@pytest.fixture
def chat(studio: Any, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A talk of two turns: "A?" with the answer "one", "B?" with "two" and "three", of which the second goes on."""
    texts = iter(("one", "two", "three"))

    def answer(prompt: Any, source: Source, *, seed: int | None = None, urgency: int = 0) -> Any:
        text = next(texts)
        return SimpleNamespace(
            source=source,
            seed=4,
            adapter_hash="a" * 64,
            text=text,
            thought="hm",
            ids=[5, 6],
            prompt_ids=[1],
            prefix_tokens=0,
            finished=text != "three",
            stopped=False,
            error=None,
            seconds=0.5,
            left_out=0,
            wait=lambda timeout_seconds=None: True,
            stop=lambda: None,
        )

    monkeypatch.setattr(studio, "answer", answer)
    made = Chats(studio).of("ann")
    made.set_system("Be brief.")
    for question in ("A?", "B?"):
        made.send(question, Wish(Source("base")))
        assert made.wait(60)
    made.regenerate(Wish(Source("base")))
    assert made.wait(60)
    return made


PROMPT_A = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}]
PROMPT_B = [*PROMPT_A, {"role": "assistant", "content": "one"}, {"role": "user", "content": "B?"}]


def test_a_thumb_is_a_rating_that_can_be_changed_and_taken_back(studio: Any, chat: Chat) -> None:
    first = chat.talk.exchanges[0].responses[0]
    rate(studio, chat, first.id, True)
    rate(studio, chat, first.id, True)  # a second press of the same thumb
    (entry,) = studio.store.entries()
    assert (entry.record.kind, entry.record.origin, entry.annotator) == ("rating", "chat", "ann")
    assert (entry.judgement.verdict, entry.version, entry.record.prompt) == ("liked", 1, PROMPT_A)
    (completion,) = entry.record.completions
    assert completion.content == [{"role": "assistant", "content": "one"}]
    assert (completion.source, completion.adapter_hash, completion.sampling) == ("base", "a" * 64, SAMPLING)
    assert entry.record.versions["base_hash"] == studio.base.weights_hash
    rate(studio, chat, first.id, False)
    assert [e.judgement.verdict for e in studio.store.entries()] == ["disliked"]
    assert chat.talk.exchanges[0].responses[0].liked is False
    rate(studio, chat, first.id, None)
    assert studio.store.entries() == [] and chat.talk.exchanges[0].responses[0].liked is None
    rate(studio, chat, first.id, True)
    assert [e.judgement.verdict for e in studio.store.entries()] == ["liked"]


def test_two_answers_make_a_pair_in_the_order_in_which_they_came(studio: Any, chat: Chat) -> None:
    two, three = chat.talk.exchanges[1].responses
    prefer(studio, chat, three.id, two.id, reason="longer")
    (entry,) = studio.store.entries()
    assert [c.content[0]["content"] for c in entry.record.completions] == ["two", "three"]
    assert [c.finished for c in entry.record.completions] == [True, False]
    assert (entry.judgement.ranks, entry.judgement.reason, entry.record.prompt) == ((2.0, 1.0), "longer", PROMPT_B)
    prefer(studio, chat, two.id, three.id)  # said otherwise later: the same pair
    (entry,) = studio.store.entries()
    assert (entry.judgement.ranks, entry.version) == ((1.0, 2.0), 2)


def test_a_mended_answer_is_chosen_over_the_one_it_was_made_from(studio: Any, chat: Chat) -> None:
    two, three = chat.talk.exchanges[1].responses
    mend(studio, chat, three.id, " better ")
    mend(studio, chat, three.id, "better")  # pressed twice
    (line,) = export_lines(studio.store, "pairs").lines
    assert line["prompt"] == PROMPT_B
    assert line["chosen"] == [{"role": "assistant", "content": "better"}]
    assert line["rejected"] == [{"role": "assistant", "content": "three"}]
    last = chat.talk.exchanges[1]
    assert [r.text for r in last.responses] == ["two", "three", "better"]
    assert (last.answer.text, last.answer.voice) == ("better", "written")


def test_mending_an_earlier_answer_leaves_the_talk_as_it_went(studio: Any, chat: Chat) -> None:
    mend(studio, chat, chat.talk.exchanges[0].responses[0].id, "uno")
    assert chat.talk.exchanges[0].answer.text == "one"
    (entry,) = studio.store.entries()
    assert entry.record.prompt == PROMPT_A


def test_the_prompt_of_a_pair_is_the_one_the_answers_saw(studio: Any, chat: Chat) -> None:
    two, three = chat.talk.exchanges[1].responses
    chat.set_system("Be long.")
    assert prefer(studio, chat, two.id, three.id).prompt == PROMPT_B
    chat.update(three.id, system="Be long.")
    with pytest.raises(UserError, match="the system prompt was another one"):
        prefer(studio, chat, two.id, three.id)
    chat.update(three.id, system="Be brief.", left_out=1)  # one turn less than the other saw
    chat.update(two.id, text="deux")
    assert chat.talk.prompt_of(*chat.talk.exchanges[1].responses) == [PROMPT_A[0], PROMPT_B[-1]]


def test_what_no_trainer_takes_is_refused_and_not_kept(studio: Any, chat: Chat) -> None:
    one = chat.talk.exchanges[0].responses[0]
    two, three = chat.talk.exchanges[1].responses
    with pytest.raises(UserError, match="different questions"):
        prefer(studio, chat, one.id, two.id)
    with pytest.raises(UserError, match="change it first"):
        mend(studio, chat, one.id, " one ")
    with pytest.raises(UserError, match="empty"):
        mend(studio, chat, one.id, " ")
    chat.update(three.id, text="two")
    with pytest.raises(UserError, match="the same"):
        prefer(studio, chat, two.id, three.id)
    chat.update(three.id, text="")
    with pytest.raises(UserError, match="empty"):
        rate(studio, chat, three.id, True)
    with pytest.raises(UserError, match="no longer part of the talk"):
        rate(studio, chat, "0" * 32, True)
    assert studio.store.entries() == []
