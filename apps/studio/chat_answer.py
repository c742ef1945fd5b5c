"""One answer of the talk, looked at closely: thumbs, score, token map, and the pairs it becomes part of."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from lowrank_align.errors import UserError
from lowrank_align.studio import chat_view
from lowrank_align.studio.chatting import Chat, Chats
from lowrank_align.studio.studio import Studio
from lowrank_align.studio.talk import about
from lowrank_align.studio.token_map import token_map
from lowrank_align.studio.verdicts import mend, prefer, rate
from lowrank_align.studio.voices import BASE

from .chat_parts import NEWEST, NO_REWARD, Parts
from .manners import told

HIDDEN = gr.update(visible=False)


class Closer:
    """What is done with the answer that `chat-which` names; without one, that is the newest."""

    def __init__(self, studio: Studio, chats: Chats, parts: Parts) -> None:
        self.studio, self.chats, self.parts = studio, chats, parts
        self.view_parts = [parts.which, parts.heat["reference"]]

    def wire(self, who: Any, view: list[Any], show: Callable[[Chat], list[Any]], at_once: dict[str, Any]) -> None:
        """`show` gives a page's whole view, for `view`."""
        p, pair, heat = self.parts, self.parts.pair, self.parts.heat

        def on(trigger: Any, act: Callable[..., None], *inputs: Any) -> None:
            def handler(who: str, which: str | None, *values: Any) -> list[Any]:
                chat = self.chats.of(who)
                act(chat, self._answer(chat, which), *values)
                return show(chat)

            trigger(told(handler), [who, p.which, *inputs], view, **at_once)

        on(p.thumbs["like"].click, lambda chat, key: self._rate(chat, key, True))
        on(p.thumbs["dislike"].click, lambda chat, key: self._rate(chat, key, False))
        on(p.thumbs["unrate"].click, lambda chat, key: self._rate(chat, key, None))
        on(p.thumbs["go-on"].click, lambda chat, key: chat.pick(key))
        on(p.thumbs["score"].click, self._score, p.controls.reward)
        on(pair["mend"].click, self._mend, pair["text"], pair["reason"])
        on(pair["better"].click, self._better, pair["other"], pair["reason"])
        on(pair["worse"].click, self._worse, pair["other"], pair["reason"])

        def like(event: gr.LikeData, who: str, keys: list[str]) -> list[Any]:
            chat = self.chats.of(who)
            place = event.index if isinstance(event.index, int) else event.index[0]
            liked = {"Like": True, "Dislike": False, True: True, False: False}.get(event.liked)
            rate(self.studio, chat, keys[place] if place < len(keys) else "", liked)
            return show(chat)

        p.log.like(told(like), [who, p.keys], view, **at_once)
        facts = [p.which, p.about, pair["text"], pair["other"], heat["panel"]]  # the map was of another answer
        p.which.input(told(self._chosen), [who, p.which], facts, **at_once)
        p.seen.change(told(self._changed), [who, p.which], facts, **at_once)
        pair["text"].focus(told(self._pinned), [who, p.which], p.which, **at_once)
        drawn = [heat["panel"], heat["words"], heat["map"], heat["most"], heat["token"], p.marks]
        heat["draw"].click(told(self.draw), [who, p.which, heat["reference"]], drawn, **at_once)
        heat["map"].select(told(self._token), [p.marks], heat["token"], **at_once)

    def view(self, chat: Chat) -> list[Any]:
        """What can be chosen, in the order of `view_parts`; what is chosen stays."""
        choices = [("the newest", NEWEST), *chat_view.choices(chat)]
        return [gr.update(choices=choices), gr.update(choices=self.studio.voices.names())]

    def draw(self, who: str, which: str | None, reference: str) -> list[Any]:
        """The token map of an answer, against a voice."""
        chat = self.chats.of(who)
        exchange, number = chat.talk.find(self._answer(chat, which))
        found = token_map(self.studio, exchange.responses[number], reference or BASE)
        marks = chat_view.marks_shown(found)
        return [
            gr.update(visible=True),
            chat_view.in_words(found),
            [(mark.text, chat_view.kind_of(mark)) for mark in marks],
            chat_view.departures(found),
            "",
            [chat_view.in_numbers(mark, found) for mark in marks],
        ]

    # ---- inside

    def _token(self, event: gr.SelectData, marks: list[str]) -> str:
        place = event.index if isinstance(event.index, int) else event.index[0]
        return marks[place].strip() if place < len(marks) else ""

    def _chosen(self, who: str, which: str) -> list[Any]:
        """Another answer was chosen: everything there is to know of it."""
        chat = self.chats.of(who)
        return [gr.skip(), *self._facts(chat, self._newest(chat) if which == NEWEST else which), HIDDEN]

    def _changed(self, who: str, which: str) -> list[Any]:
        """The talk has changed: what is typed about an older answer stays, unless that answer has gone."""
        chat = self.chats.of(who)
        ids = [key for _, key in chat_view.choices(chat)]
        if which in ids:
            about_it, _, other = self._facts(chat, which)
            return [gr.skip(), about_it, gr.skip(), other, gr.skip()]
        return [NEWEST, *self._facts(chat, self._newest(chat)), HIDDEN]

    def _pinned(self, who: str, which: str) -> Any:
        """Somebody begins to mend the newest answer: it stays the chosen one when the next one comes."""
        return (self._newest(self.chats.of(who)) if which == NEWEST else None) or gr.skip()

    def _facts(self, chat: Chat, which: str | None) -> list[Any]:
        if which is None:
            return ["Nothing said yet: this is where an answer is rated and taken apart.", "", _choice([])]
        exchange, number = chat.talk.find(which)
        response = exchange.responses[number]
        rated = {None: "", True: " · rated good", False: " · rated bad"}[response.liked]
        return [about(response) + rated, response.text, _choice(chat_view.others(chat, which))]

    def _newest(self, chat: Chat) -> str | None:
        """The answer that the talk goes on from, else the last one there is."""
        for exchange in reversed(chat.talk.exchanges):
            if exchange.responses:
                return (exchange.answer or exchange.responses[-1]).id
        return None

    def _answer(self, chat: Chat, which: str | None) -> str:
        key = self._newest(chat) if which in (None, NEWEST) else which
        if key is None:
            raise UserError("nothing has been said yet")
        return key

    def _rate(self, chat: Chat, key: str, liked: bool | None) -> None:
        rate(self.studio, chat, key, liked)

    def _score(self, chat: Chat, key: str, reward: str) -> None:
        if reward in (None, NO_REWARD):
            rewards = self.studio.voices.rewards()
            if not rewards:
                raise UserError("there is no reward run yet: train one under Train, method reward")
            reward = rewards[0]
        chat.score(key, reward)

    def _mend(self, chat: Chat, key: str, text: str, reason: str) -> None:
        mend(self.studio, chat, key, text, reason)
        gr.Info("Kept as a pair: your text over the answer.", title="")

    def _better(self, chat: Chat, key: str, other: str | None, reason: str) -> None:
        prefer(self.studio, chat, key, _other(other), reason)
        gr.Info("Kept as a pair.", title="")

    def _worse(self, chat: Chat, key: str, other: str | None, reason: str) -> None:
        prefer(self.studio, chat, _other(other), key, reason)
        gr.Info("Kept as a pair.", title="")


def _choice(others: list[tuple[str, str]]) -> Any:
    return gr.update(choices=others, value=others[-1][1] if others else None)


def _other(other: str | None) -> str:
    if other is None:
        raise UserError("there is no other answer to this question yet: press Regenerate, or mend this one")
    return other
