"""The Chat tab's handlers, called as the page calls them."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

from lowrank_align.apps.studio.chat import Handlers, exchange_at, message, thumbs, wish_of  # noqa: E402

from lowrank_align.errors import UserError  # noqa: E402
from lowrank_align.studio.answers import Source  # noqa: E402
from lowrank_align.studio.asking import Wish  # noqa: E402
from lowrank_align.studio.chat_view import Line  # noqa: E402

CONTROLS = ("base", "nobody", 1.0, 1.0, 6, "7", 1, "no reward")


@pytest.fixture
def tab(studio: Any) -> Iterator[Handlers]:
    """The tab on a page of its own, wired."""

    def watch(look: Any, *inputs: Any) -> Any:
        return gr.Textbox("", visible="hidden")

    with gr.Blocks(analytics_enabled=False) as demo:
        page = SimpleNamespace(annotator=gr.Textbox("ann"), watch=watch, tab=lambda name: shown)
        page.on_load = lambda function, inputs, outputs: demo.load(function, inputs, outputs)
        with gr.Tab("Chat") as shown:
            made = Handlers(studio, page)
            made.wire()
    yield made
    assert made.chats.of("ann").wait(60)


def sent(tab: Handlers, question: str, system: str = "", controls: tuple[Any, ...] = CONTROLS) -> list[Any]:
    """What the page gets at the end."""
    *_, last = tab.send("ann", question, system, *controls)
    return last


def test_the_ids_that_scripts_use_are_there(tab: Handlers) -> None:
    p = tab.parts
    ids = [p.question, p.send, p.stop, p.controls.voice, p.controls.against]
    assert [part.elem_id for part in ids] == ["chat-input", "chat-send", "chat-stop", "chat-adapter", "chat-compare"]


def test_sending_streams_empties_the_field_once_and_ends_ready_for_the_next(tab: Handlers) -> None:
    first, *rest = list(tab.send("ann", "Hello.", "Be brief.", *CONTROLS))
    assert first[0] == "" and first[-len(tab.closer.view_parts) - 1] is True  # this page watches the answer
    assert all(values[0] == gr.skip() for values in rest)  # the next question may be typed already
    assert all(len(values) == 1 + len(tab.whole_view) for values in (first, *rest))
    last = dict(zip(tab.whole_view, rest[-1][1:], strict=True))
    assert last[tab.parts.send]["interactive"] and not last[tab.parts.stop]["interactive"]
    assert last[tab.parts.following] is False
    talk = tab.chats.of("ann").talk
    assert (talk.system, talk.exchanges[0].answer.sampling["seed"]) == ("Be brief.", 7)
    assert last[tab.parts.keys] == [talk.exchanges[0].id, talk.exchanges[0].answer.id]


def test_a_page_that_is_opened_finds_the_talk_and_the_controls(tab: Handlers) -> None:
    sent(tab, "Hello.", "Be brief.", ("gone", "nobody", 0.3, 0.9, 6, "", 1, "no reward"))
    values = dict(zip([*tab.kept, *tab.whole_view], tab.open("ann"), strict=True))
    controls = tab.parts.controls
    assert values[tab.parts.system] == "Be brief."
    assert (values[controls.temperature], values[controls.top_p], values[controls.seed]) == (0.3, 0.9, "")
    assert values[controls.voice]["value"] == "base"  # the run has gone since
    assert [m["content"] for m in values[tab.parts.log]["value"]][0] == "Hello."
    assert values[tab.parts.standing].startswith("gone: no such adapter")


def test_the_clock_only_shows_what_the_page_has_not_seen(tab: Handlers) -> None:
    sent(tab, "Hello.")
    revision = tab.chats.of("ann").revision
    assert all(value == gr.skip() for value in tab.beat("ann", revision, False))
    assert dict(zip(tab.whole_view, tab.beat("ann", revision - 1, False), strict=True))[tab.parts.seen] == revision


def test_messages_are_found_by_what_the_page_showed(tab: Handlers) -> None:
    sent(tab, "A?")
    sent(tab, "B?")
    chat = tab.chats.of("ann")
    a, b = chat.talk.exchanges
    keys = [a.id, a.answer.id, b.id, b.answer.id]
    assert [exchange_at(chat, keys, index) for index in range(4)] == [a.id, a.id, b.id, b.id]
    assert exchange_at(chat, keys, (3, 0)) == b.id
    chat.undo()
    chat.undo()
    with pytest.raises(UserError, match="no longer part of the talk"):
        exchange_at(chat, keys, 3)


def test_editing_and_retrying_a_message_of_the_log(tab: Handlers) -> None:
    sent(tab, "A?")
    chat = tab.chats.of("ann")
    keys = [chat.talk.exchanges[0].id, chat.talk.exchanges[0].answer.id]
    retry = gr.RetryData(None, {"index": 1, "value": ""})
    list(tab.retry(retry, "ann", keys, "", *CONTROLS))
    assert len(chat.talk.exchanges[0].responses) == 2
    edit = gr.EditData(None, {"index": 0, "value": "a <\u200bb", "previous_value": "A?"})
    list(tab.edit(edit, "ann", keys, "", *CONTROLS))
    assert [e.question for e in chat.talk.exchanges] == ["a <b"]


def test_undo_gives_the_question_back_unless_something_was_typed(tab: Handlers) -> None:
    sent(tab, "A?")
    sent(tab, "B?")
    assert tab.undo("ann", "")[0] == "B?"
    assert tab.undo("ann", "typed")[0] == "typed"


def test_the_export_is_a_text_and_a_row(tab: Handlers) -> None:
    with pytest.raises(UserError, match="nothing has been said yet"):
        tab.export("ann")
    sent(tab, "A?")
    answer = tab.chats.of("ann").talk.exchanges[0].answer
    assert answer.text
    text, row = (Path(update["value"]) for update in tab.export("ann"))
    assert text.read_text(encoding="utf-8").startswith("# Transcript")
    assert json.loads(row.read_text(encoding="utf-8"))["messages"][-1] == {"role": "assistant", "content": answer.text}


def test_the_token_map_of_the_newest_answer(tab: Handlers) -> None:
    sent(tab, "A?")
    panel, words, marks, most, token, numbers = tab.closer.draw("ann", "newest", "base")
    assert panel["visible"] and token == ""
    assert "+0.00 nats in all" in words and "the same voice" in words
    assert len(marks) == len(numbers) and {kind for _, kind in marks} == {None}
    assert len(most.splitlines()) == min(10, len(marks))


def test_what_the_controls_ask_for() -> None:
    assert wish_of(CONTROLS) == Wish(Source("base", 1.0, 1.0, 6), seed=7)
    wish = wish_of(("base", "sft", 0.5, 0.9, 8, "", 3, "judge"))
    assert wish == Wish(Source("base", 0.5, 0.9, 8), Source("sft", 0.5, 0.9, 8), 3, "judge", None)
    with pytest.raises(UserError, match="seed: 'x'"):
        wish_of(("base", "nobody", 1.0, 1.0, 6, "x", 1, "no reward"))


def test_a_message_for_the_log() -> None:
    assert message(Line("assistant", "<b>")) == {"role": "assistant", "content": "&lt;b&gt;"}
    thought = message(Line("assistant", "hm", title="Thought (1 word)"))
    assert thought["metadata"] == {"title": "Thought (1 word)", "status": "done"}
    assert message(Line("assistant", "hm", title="Thinking", open=True))["metadata"]["status"] == "pending"


def test_one_thumb_a_bubble() -> None:
    lines = [
        Line("user", "A?"),
        Line("assistant", "hm", title="Thought"),
        Line("assistant", "one", liked=False),
        Line("user", "B?"),
        Line("assistant", "two", liked=True),
        Line("user", "C?"),
        Line("assistant", "three"),
    ]
    assert thumbs(lines) == ["Dislike", "Like", None]
