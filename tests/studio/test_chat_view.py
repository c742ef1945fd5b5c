"""What the page shows of a chat: its lines, its words, and that text stays text."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from lowrank_align.studio import chat_view
from lowrank_align.studio.answers import Source
from lowrank_align.studio.asking import Wish
from lowrank_align.studio.chatting import Chat
from lowrank_align.studio.talk import Exchange, Response, Talk
from lowrank_align.studio.token_map import Mark, TokenMap

ONE = Response("one", "base", thought="let me\nsee", ids=(5, 6), seconds=0.5, liked=True)
TWO = Response("two", "sft", ids=(5,), seconds=0.5, scores={"judge": -1.5})


@pytest.fixture
def chat(studio: Any) -> Chat:
    """A talk with a thought, and a turn of two answers that nobody has picked from."""
    chat = Chat(studio, "ann")
    chat._set(Talk("", (Exchange("A?", (ONE,), 0, id="a"), Exchange("B?", (ONE, TWO), None, id="b"))))
    return chat


def test_thoughts_stand_folded_before_their_answer(chat: Chat) -> None:
    question, thought, answer, *_ = chat_view.lines(chat)
    assert (question.role, question.text, question.id) == ("user", "A?", "a")
    assert (thought.text, thought.title, thought.open) == ("let me\nsee", "Thought (3 words)", False)
    assert (answer.text, answer.title, answer.id, answer.liked) == ("one", "", ONE.id, True)


def test_two_answers_are_shown_beside_each_other_until_one_is_picked(chat: Chat) -> None:
    assert chat_view.lines(chat)[-1].text == chat_view.TWO_BELOW
    assert chat_view.sides(chat) == [
        ("one", "base, 2 tokens at 4.0 a second"),
        ("two", "sft, 1 tokens at 2.0 a second · score by judge -1.50"),
    ]
    assert chat_view.standing(chat) == ""
    chat.pick(TWO.id)
    assert chat_view.sides(chat) == []
    assert chat_view.lines(chat)[-1].text == "two"
    assert chat_view.standing(chat) == "sft, 1 tokens at 2.0 a second · score by judge -1.50"


def test_every_answer_can_be_chosen_the_newest_first(chat: Chat) -> None:
    chat.pick(TWO.id)
    assert chat_view.choices(chat) == [
        ("2b · sft [judge -1.50] (shown): two", TWO.id),
        ("2a · base: one", ONE.id),
        ("1 · base: one", ONE.id),
    ]
    assert [key for _, key in chat_view.others(chat, TWO.id)] == [ONE.id]


def test_a_question_without_an_answer_says_what_to_do(chat: Chat) -> None:
    chat._set(Talk("", (Exchange("A?"),)))
    assert chat_view.lines(chat)[-1].text == chat_view.NO_ANSWER
    chat.problem = "too long"
    assert chat_view.standing(chat) == "too long"


def test_what_is_on_its_way_is_shown_as_far_as_it_came(chat: Chat, free_the_base: Callable[[], None]) -> None:
    chat._set(Talk())
    chat.send("A?", Wish(Source("base", max_new_tokens=4)))
    assert [line.text for line in chat_view.lines(chat)] == ["A?", "…"]
    assert chat_view.standing(chat) == "base: waiting for the model"
    free_the_base()
    assert chat.wait(60)
    assert chat_view.lines(chat)[-1].id == chat.talk.exchanges[0].responses[0].id


HOSTILE = "<img src=http://x/y.png> &lt;b&gt; a < b & c </script> **x** <think>"


def test_an_answer_is_escaped_and_a_question_keeps_its_letters() -> None:
    answer = chat_view.as_text(chat_view.Line("assistant", HOSTILE))
    assert answer == (
        "&lt;img src=http://x/y.png&gt; &amp;lt;b&amp;gt; a &lt; b &amp; c &lt;/script&gt; **x** &lt;think&gt;"
    )
    question = chat_view.as_text(chat_view.Line("user", HOSTILE))
    assert "<img" not in question and "</" not in question and "&lt;" not in question
    assert chat_view.as_typed(question) == HOSTILE


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [
        (2.01, chat_view.MUCH_MORE),
        (2.0, chat_view.MORE),
        (0.5, chat_view.MORE),
        (0.49, None),
        (0.0, None),
        (-0.49, None),
        (-0.5, chat_view.LESS),
        (-2.0, chat_view.LESS),
        (-2.01, chat_view.MUCH_LESS),
    ],
)
def test_the_classes_of_a_log_ratio(ratio: float, kind: str | None) -> None:
    assert chat_view.kind_of(Mark("x", ratio, 0.0)) == kind


def test_a_token_map_in_words_and_numbers() -> None:
    marks = (
        Mark("hm", -1.0, -1.0, thinking=True),
        Mark(" a\n", math.log(0.5), math.log(0.25)),
        Mark("[end]", -3.0, 0.0),
    )
    found = TokenMap("sft", "base", marks, tokens=4, retrained=True)
    assert chat_view.in_numbers(marks[1], found) == " +0.69  “ a\\n”  (sft -0.69, base -1.39)"
    assert chat_view.in_numbers(marks[0], found).endswith("thought")
    assert chat_view.in_words(found) == (
        "log p(sft) - log p(base): -2.31 nats in all, -0.577 a token, 4 tokens; at temperature 1, thoughts and the end "
        "among them. sft was trained on since it gave this answer: the map is of its weights now."
    )
    assert chat_view.departures(found, 2).splitlines() == [
        " -3.00  “[end]”  (sft -3.00, base 0.00)",
        " +0.69  “ a\\n”  (sft -0.69, base -1.39)",
    ]
    assert [mark.text for mark in chat_view.marks_shown(found)] == [" a\n", "[end]"]
