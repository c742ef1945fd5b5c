"""The chat behind the page: asking, stopping, taking back, choosing, and what stays."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_align.data.formats import parse_row
from lowrank_align.errors import UserError
from lowrank_align.studio.answers import Source
from lowrank_align.studio.asking import Wish, watch
from lowrank_align.studio.chatting import Chat, Chats
from lowrank_align.studio.talk import Talk, about

SHORT = Source("base", temperature=1.0, top_p=1.0, max_new_tokens=6)


def asked(chat: Chat, question: str, wish: Wish | None = None) -> Any:
    """The exchange, when its answers are there."""
    chat.send(question, wish or Wish(SHORT))
    assert chat.wait(60)
    return chat.talk.exchanges[-1]


@pytest.fixture
def chat(studio: Any) -> Chat:
    return Chats(studio).of("ann")


@pytest.fixture
def with_runs(studio: Any, trained: Path) -> Any:
    """The studio with the runs `sft` (a policy) and `reward`, of two steps each."""
    for name in ("sft", "reward"):
        shutil.copytree(trained / name, studio.runs / name)
    studio.voices.refresh()
    return studio


@pytest.fixture
def scripted(studio: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`scripted((text, thought), ...)` is what the next answers say; the list fills with the prompts they are for."""

    def script(*answers: tuple[str, str]) -> list[Any]:
        rest, prompts = list(answers), []

        def answer(prompt: Any, source: Source, *, seed: int | None = None, urgency: int = 0) -> Any:
            prompts.append(prompt)
            text, thought = rest.pop(0)
            return SimpleNamespace(
                source=source,
                seed=seed or 0,
                adapter_hash=None,
                text=text,
                thought=thought,
                ids=[5, 6],
                prompt_ids=[1],
                prefix_tokens=0,
                finished=True,
                stopped=False,
                error=None,
                seconds=0.5,
                left_out=0,
                wait=lambda timeout_seconds=None: True,
                stop=lambda: None,
            )

        monkeypatch.setattr(studio, "answer", answer)
        return prompts

    return script


def test_a_question_gets_its_answer_with_all_that_draws_it_again(chat: Chat, studio: Any) -> None:
    first = asked(chat, "  Say something. ", Wish(SHORT, seed=3)).answer
    assert chat.talk.exchanges[0].question == "Say something."
    assert (first.voice, first.adapter_hash, 1 <= len(first.ids) <= 6) == ("base", None, True)
    assert first.sampling == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6, "seed": 3}
    again = studio.answer([{"role": "user", "content": "Say something."}], SHORT, seed=3)
    assert again.wait(60)
    assert (list(first.ids), list(first.prompt_ids), first.text) == (again.ids, again.prompt_ids, again.text)


def test_later_turns_see_the_answers_without_their_thoughts(chat: Chat, scripted: Callable[..., list[Any]]) -> None:
    prompts = scripted(("four", "two and two"), ("yes", ""))
    chat.set_system("Be brief.")
    assert asked(chat, "2 + 2?").answer.thought == "two and two"
    asked(chat, "Sure?")
    assert prompts[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "Sure?"},
    ]


def test_stop_ends_the_drawing_and_keeps_what_there_is(chat: Chat, free_the_base: Callable[[], None]) -> None:
    pending = chat.send("Talk for long.", Wish(Source("base", 1.0, 1.0, 200), seed=1))  # one that does not end at once
    chat.stop()
    with pytest.raises(UserError, match="still on its way"):
        chat.send("And?", Wish(SHORT))
    free_the_base()
    assert chat.wait(60) and pending.over.is_set()
    answer = chat.talk.exchanges[0].answer
    assert (answer.stopped, answer.finished, len(answer.ids)) == (True, False, 1)
    assert "stopped" in about(answer)


def test_watching_only_looks_and_shows_the_end(chat: Chat, free_the_base: Callable[[], None]) -> None:
    chat.send("Hello.", Wish(SHORT))
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        free_the_base()
        assert chat.wait(60)

    seen = list(watch(chat, per_second=8, sleep=sleep))
    assert [pending is None for pending in seen] == [False, True]
    assert pauses == [0.125]
    assert list(watch(chat)) == [None]


def test_a_regenerated_answer_stands_beside_the_old_one(chat: Chat, scripted: Callable[..., list[Any]]) -> None:
    prompts = scripted(("one", ""), ("two", ""), ("three", ""))
    asked(chat, "Count.")
    chat.regenerate(Wish(SHORT))
    assert chat.wait(60)
    exchange = chat.talk.exchanges[0]
    assert ([r.text for r in exchange.responses], exchange.shown) == (["one", "two"], 1)
    assert prompts[0] == prompts[1]
    chat.pick(exchange.responses[0].id)
    asked(chat, "On.")
    assert prompts[2][1] == {"role": "assistant", "content": "one"}
    with pytest.raises(UserError, match="has gone on from another answer"):
        chat.pick(exchange.responses[1].id)


def test_regenerating_an_earlier_turn_drops_what_came_after_until_it_is_brought_back(
    chat: Chat, scripted: Callable[..., list[Any]]
) -> None:
    prompts = scripted(("one", ""), ("two", ""), ("other", ""))
    first = asked(chat, "A?")
    asked(chat, "B?")
    chat.regenerate(Wish(SHORT), first.id)
    assert chat.wait(60)
    assert prompts[2] == [{"role": "user", "content": "A?"}]
    assert [(e.question, len(e.responses)) for e in chat.talk.exchanges] == [("A?", 2)]
    chat.bring_back()
    assert [(e.question, e.answer.text) for e in chat.talk.exchanges] == [("A?", "one"), ("B?", "two")]
    with pytest.raises(UserError, match="nothing was taken away"):
        chat.bring_back()


def test_an_edited_question_goes_on_from_there(chat: Chat, scripted: Callable[..., list[Any]]) -> None:
    prompts = scripted(("one", ""), ("two", ""), ("three", ""))
    asked(chat, "A?")
    second = asked(chat, "B?")
    chat.edit(second.id, "C?", Wish(SHORT))
    assert chat.wait(60)
    assert [e.question for e in chat.talk.exchanges] == ["A?", "C?"]
    assert [m["content"] for m in prompts[2]] == ["A?", "one", "C?"]
    with pytest.raises(UserError, match="no longer part of the talk"):
        chat.edit(second.id, "D?", Wish(SHORT))
    with pytest.raises(UserError, match="type a question first"):
        chat.edit(chat.talk.exchanges[0].id, " \0 ", Wish(SHORT))
    assert [e.question for e in chat.talk.exchanges] == ["A?", "C?"]


def test_undo_takes_the_last_turn_and_clear_all_of_them(chat: Chat, scripted: Callable[..., list[Any]]) -> None:
    scripted(("one", ""), ("two", ""))
    with pytest.raises(UserError, match="nothing has been said yet"):
        chat.undo()
    chat.set_system("Be brief.")
    asked(chat, "A?")
    asked(chat, "B?")
    assert chat.undo() == "B?"
    assert [e.question for e in chat.talk.exchanges] == ["A?"]
    chat.clear()
    assert chat.talk == Talk("Be brief.")
    chat.bring_back()
    chat.bring_back()
    assert [e.question for e in chat.talk.exchanges] == ["A?", "B?"]


def test_two_voices_side_by_side_and_one_is_picked(chat: Chat, with_runs: Any) -> None:
    sft = Source("sft", 1.0, 1.0, 6)
    exchange = asked(chat, "Say: ", Wish(SHORT, against=sft, seed=1))
    assert ([r.voice for r in exchange.responses], exchange.answer) == (["base", "sft"], None)
    left, right = exchange.responses
    assert (left.adapter_hash, left.sampling["seed"], right.sampling["seed"]) == (None, 1, 1)
    assert right.adapter_hash == with_runs.voices.voice("sft").adapter_hash is not None
    with pytest.raises(UserError, match="say which one the talk goes on with"):
        chat.send("And?", Wish(SHORT))
    assert chat.pending is None and len(chat.talk.exchanges) == 1
    chat.pick(right.id)
    assert chat.talk.exchanges[0].answer == right
    assert asked(chat, "And?", Wish(sft)).answer.voice == "sft"


def test_of_several_answers_the_reward_run_picks_the_best(chat: Chat, with_runs: Any) -> None:
    exchange = asked(chat, "Say: ", Wish(SHORT, best_of=4, reward="reward", seed=10))
    assert [r.sampling["seed"] for r in exchange.responses] == [10, 11, 12, 13]
    scores = [r.scores["reward"] for r in exchange.responses if r.text]
    prompt = [{"role": "user", "content": "Say:"}]
    contents = [[{"role": "assistant", "content": r.text}] for r in exchange.responses if r.text]
    assert scores == pytest.approx(with_runs.scores("reward", prompt, contents))
    assert exchange.answer.scores["reward"] == max(scores) > min(scores)
    again = chat.score(exchange.answer.id, "reward")
    assert again == pytest.approx(max(scores), abs=1e-5)


def test_scores_leave_thoughts_out(
    chat: Chat, studio: Any, scripted: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(("bad", "hm"), ("good", "let me see"), ("", "only thought"))
    calls: list[Any] = []

    def scores(reward: str, prompt: Any, completions: Any) -> list[float]:
        calls.append((reward, prompt, completions))
        return [float(len(completion[0]["content"])) for completion in completions]

    monkeypatch.setattr(studio, "scores", scores)
    exchange = asked(chat, "Q?", Wish(SHORT, best_of=3, reward="r"))
    said = [[{"role": "assistant", "content": text}] for text in ("bad", "good")]
    assert calls == [("r", [{"role": "user", "content": "Q?"}], said)]
    assert exchange.answer.text == "good"
    assert [r.scores for r in exchange.responses] == [{"r": 3.0}, {"r": 4.0}, {}]
    with pytest.raises(UserError, match="empty answer has no score"):
        chat.score(exchange.responses[2].id, "r")


def test_answers_stay_where_the_reward_cannot_score_them(
    chat: Chat, studio: Any, scripted: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(("good", ""))

    def scores(*_: Any) -> list[float]:
        raise UserError("too long for the reward run")

    monkeypatch.setattr(studio, "scores", scores)
    assert asked(chat, "Q?", Wish(SHORT, reward="r")).answer.text == "good"
    assert chat.problem == "too long for the reward run"


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (Wish(best_of=0, reward="r"), "from 1 to 16"),
        (Wish(best_of=17, reward="r"), "from 1 to 16"),
        (Wish(best_of=2), "needs a reward run"),
        (Wish(best_of=2, reward="r", against=SHORT), "not both"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(chat: Chat, wish: Wish, told: str) -> None:
    with pytest.raises(UserError, match=told):
        chat.send("Q?", wish)
    assert chat.talk == Talk() and not chat.busy


def test_an_answer_that_cannot_come_is_told_and_the_question_can_be_asked_again(chat: Chat) -> None:
    exchange = asked(chat, "Q?", Wish(Source("nobody")))
    assert (exchange.responses, exchange.answer) == ((), None)
    assert chat.problem.startswith("nobody: no such adapter")
    with pytest.raises(UserError, match="question 1 has no answer"):
        chat.send("And?", Wish(SHORT))
    chat.regenerate(Wish(SHORT))
    assert chat.wait(60)
    assert chat.talk.exchanges[0].answer is not None and chat.problem == ""


def test_old_turns_that_no_longer_fit_are_left_out_and_that_is_said(chat: Chat, studio: Any) -> None:
    long = "x" * 120  # of 256 positions; a letter is a token
    asked(chat, long)
    exchange = asked(chat, "y" * 120)
    assert exchange.answer.left_out == 1
    assert "1 oldest turn left out" in about(exchange.answer)
    assert chat.talk.prompt_of(exchange.answer) == [{"role": "user", "content": "y" * 120}]


def test_the_talk_survives_a_reload_and_a_restart(studio: Any, scripted: Callable[..., list[Any]]) -> None:
    scripted(("one", "hm"), ("two", ""))
    chats = Chats(studio)
    chat = chats.of("ann")
    chat.set_system("Be brief.")
    asked(chat, "Grüße \U0001f600?")
    chat.prefer(voice="sft", temperature=0.3)
    assert chats.of("ann") is chat
    later = Chats(studio).of("ann")  # another process reads the same notes
    assert later is not chat
    assert later.talk == chat.talk and later.talk.exchanges[0].answer.thought == "hm"
    assert later.preferences == {"voice": "sft", "temperature": 0.3}
    assert Chats(studio).of("bob").talk == Talk()
    assert Talk.from_json(json.loads(json.dumps(chat.talk.as_json() | {"newer": 1}))) == chat.talk


def test_a_question_whose_answer_was_lost_with_the_process_is_still_there(
    studio: Any, chat: Chat, free_the_base: Callable[[], None]
) -> None:
    chat.send("Still there?", Wish(SHORT))
    later = Chat(studio, "ann")
    free_the_base()
    assert chat.wait(60)
    assert [(e.question, e.responses) for e in later.talk.exchanges] == [("Still there?", ())]


def test_closing_keeps_an_answer_as_far_as_it_came(studio: Any, free_the_base: Callable[[], None]) -> None:
    chats = Chats(studio)
    pending = chats.of("ann").send("Talk for long.", Wish(Source("base", 1.0, 1.0, 200), seed=1))
    closing = threading.Thread(target=chats.close)
    closing.start()
    assert pending.answers[0]._stop.wait(60)  # it was asked to stop before the base was free
    free_the_base()
    closing.join()
    (exchange,) = Chat(studio, "ann").talk.exchanges
    assert (exchange.answer.stopped, len(exchange.answer.ids)) == (True, 1)


def test_the_transcript_as_a_row_and_as_text(chat: Chat, scripted: Callable[..., list[Any]]) -> None:
    scripted(("one", "hm"), ("two", ""))
    with pytest.raises(UserError, match="nothing has been said yet"):
        chat.talk.row()
    chat.set_system("Be brief.")
    asked(chat, "A?")
    chat.regenerate(Wish(SHORT))
    assert chat.wait(60)
    row = chat.talk.row()
    assert row == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "two"},
        ]
    }
    assert parse_row(row, "here", 0).completions == [row["messages"]]
    assert chat.talk.markdown() == (
        "# Transcript\n\n**System**\n\nBe brief.\n\n**User**\n\nA?\n\n"
        "**base** (not gone on with)\n\none\n\n"
        "*base, 2 tokens at 4.0 a second · temperature 1 · top p 1 · max new tokens 6 · seed 0*\n\n"
        "**base**\n\ntwo\n\n"
        "*base, 2 tokens at 4.0 a second · temperature 1 · top p 1 · max new tokens 6 · seed 0*\n"
    )


def test_an_empty_answer_makes_no_row(chat: Chat, scripted: Callable[..., list[Any]]) -> None:
    scripted(("", "only thought"))
    asked(chat, "A?")
    with pytest.raises(UserError, match="answer 1 is empty"):
        chat.talk.row()
