"""Talking with the studio's voices: answers on their way, the talk they end in, and that it is kept.

A `Chat` belongs to one annotator and lives on the server: a page that is loaded again finds the talk, and the answer
that is on its way, where they were. Each answer ends in a thread of the chat's own; whoever watches only looks.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowrank_align.errors import UserError
from lowrank_align.studio.answers import Answer
from lowrank_align.studio.asking import Pending, Wish, cleaned, is_told, response_of, typed
from lowrank_align.studio.speaking import CHAT
from lowrank_align.studio.talk import Exchange, Response, Talk

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

log = logging.getLogger(__name__)

STEPS_BACK = 10
MOST_NAME = 60  # characters
SECONDS_TO_END = 5.0


class Chat:
    """One annotator's talk. Every method is safe from any thread."""

    def __init__(self, studio: "Studio", annotator: str) -> None:
        self._studio, self.annotator = studio, annotator
        self.lock = threading.RLock()  # hold it to do several things at once
        kept = studio.store.noted(self._key, {}) or {}
        self._talk = Talk.from_json(kept.get("talk"))
        self._past: list[Talk] = []
        self.preferences: dict[str, Any] = kept.get("preferences") or {}  # what the page's controls were set to
        self.pending: Pending | None = None
        self.problem = ""  # why the last answer did not come, in one sentence
        self.revision = 0  # grows with every change

    @property
    def _key(self) -> str:
        return f"chat/{self.annotator}"

    @property
    def talk(self) -> Talk:
        return self._talk

    @property
    def busy(self) -> bool:
        return self.pending is not None

    # ---- asking

    def send(self, question: str, wish: Wish) -> Pending:
        """Ask the next question. UserError where it is empty, or where the turn before has no answer to go on from."""
        with self.lock:
            return self._ask(self._idle(), Exchange(typed(question)), wish)

    def regenerate(self, wish: Wish, exchange_id: str | None = None) -> Pending:
        """Another answer to a question (the last one); the earlier ones stay beside it, the turns after it go."""
        with self.lock:
            talk = self._idle()
            exchange = self._exchange(exchange_id)
            kept = talk.before(exchange.id).put(exchange)
            if kept != talk:
                self._remember(talk)
            return self._ask(kept.before(exchange.id), exchange, wish)

    def edit(self, exchange_id: str, question: str, wish: Wish) -> Pending:
        """Ask a question of the talk in other words; the talk goes on from there."""
        with self.lock:
            talk = self._idle()
            kept = talk.before(exchange_id)
            pending = self._ask(kept, Exchange(typed(question)), wish)
            self._remember(talk)
            return pending

    def stop(self) -> None:
        """Stop what is being drawn; what there is of it stays."""
        pending = self.pending
        for answer in pending.answers if pending is not None else ():
            answer.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing is on its way; False where that took longer than `timeout` seconds."""
        pending = self.pending
        return pending is None or pending.over.wait(timeout)

    # ---- the talk

    def undo(self) -> str:
        """Take the last turn back; its question, for the input field."""
        with self.lock:
            talk, last = self._idle(), self._exchange(None)
            self._remember(talk)
            self._set(talk.before(last.id))
            return last.question

    def clear(self) -> None:
        """Begin anew under the same system prompt."""
        with self.lock:
            talk = self._idle()
            if talk.exchanges:
                self._remember(talk)
                self._set(Talk(talk.system))

    def bring_back(self) -> None:
        """The talk as it was before the last undo, edit or new beginning."""
        with self.lock:
            self._idle()
            if not self._past:
                raise UserError("nothing was taken away since the studio started")
            self._set(self._past.pop())

    def set_system(self, text: str) -> None:
        """The system prompt of everything asked from now on."""
        with self.lock:
            text = cleaned(text)
            if text != self._talk.system:
                self._set(replace(self._talk, system=text))

    def pick(self, response_id: str) -> None:
        """Go on with this answer of the last turn."""
        with self.lock:
            talk = self._idle()
            exchange, number = talk.find(response_id)
            if exchange.id != talk.exchanges[-1].id:
                raise UserError("the talk has gone on from another answer: undo the turns after it first")
            self._set(talk.put(replace(exchange, shown=number)))

    def score(self, response_id: str, reward: str) -> float:
        """What a reward run gives an answer, without its thoughts; kept with it."""
        talk = self._talk
        exchange, number = talk.find(response_id)
        response = exchange.responses[number]
        if not response.text.strip():
            raise UserError("an empty answer has no score")
        (score,) = self._studio.scores(reward, talk.prompt_of(response), [response.content])
        self.update(response_id, scores=response.scores | {reward: score})
        return score

    def update(self, response_id: str, **changes: Any) -> None:
        """Change what is kept beside an answer."""
        with self.lock:
            self._set(self._talk.change(response_id, **changes))

    def add(self, exchange_id: str, response: Response) -> None:
        """Put another answer beside those of a turn; of the last turn, it is the one that goes on."""
        with self.lock:
            talk = self._idle()
            exchange = talk.exchanges[talk.place(exchange_id)]
            responses = (*exchange.responses, response)
            last = exchange.id == talk.exchanges[-1].id
            self._set(talk.put(exchange.having(responses, len(responses) - 1 if last else exchange.shown)))

    def prefer(self, **preferences: Any) -> None:
        """Keep what the page's controls are set to."""
        with self.lock:
            if preferences != self.preferences:
                self.preferences = preferences
                self._save()

    # ---- inside

    def _idle(self) -> Talk:
        if self.pending is not None:
            raise UserError("an answer is still on its way: stop it first, or wait")
        return self._talk

    def _exchange(self, exchange_id: str | None) -> Exchange:
        if not self._talk.exchanges:
            raise UserError("nothing has been said yet")
        return self._talk.exchanges[-1 if exchange_id is None else self._talk.place(exchange_id)]

    def _ask(self, before: Talk, exchange: Exchange, wish: Wish) -> Pending:
        """Start the answers to a question behind `before`. Where one cannot be started, nothing has changed."""
        wish.check()
        talk = before.put(exchange)
        prompt = [dict(message) for message in talk.prompt(exchange.id)]
        answers: list[Answer] = []
        try:
            for source, seed in zip(wish.sources(), wish.seeds(), strict=True):
                answers.append(self._studio.answer(prompt, source, seed=seed, urgency=CHAT))
        except UserError:
            for answer in answers:
                answer.stop()
            raise
        self.problem = ""
        self.pending = pending = Pending(exchange.id, wish, answers, talk.system)
        self._set(talk)
        threading.Thread(target=self._finish, args=(pending,), name=f"chat of {self.annotator}", daemon=True).start()
        return pending

    def _finish(self, pending: Pending) -> None:
        """Wait for the answers, put them into the talk, and score them."""
        problem = ""
        try:
            for answer in pending.answers:
                answer.wait()
            drawn = [response_of(answer, pending.system) for answer in pending.answers if is_told(answer)]
            problem = next((answer.error for answer in pending.answers if answer.error), "")
            with self.lock:
                exchange = self._exchange(pending.exchange_id)
                first = len(exchange.responses)
                shown = None if pending.wish.against is not None and len(drawn) > 1 else first + len(drawn) - 1
                if drawn:
                    self._set(self._talk.put(exchange.having((*exchange.responses, *drawn), shown)))
            self._score_all(pending, drawn, first)
        except UserError as error:
            problem = str(error)
        except Exception:
            log.exception("an answer of the chat did not end well")
            problem = "the answer did not end well; the terminal says why"
        with self.lock:
            self.problem, self.pending = problem, None
            self.revision += 1
        pending.over.set()

    def _score_all(self, pending: Pending, drawn: Sequence[Response], first: int) -> None:
        """Score what was drawn; of several, the best is the one that goes on."""
        reward, told = pending.wish.reward, [response for response in drawn if response.text.strip()]
        if reward is None or not told:
            return
        pending.scoring = True
        scores = self._studio.scores(reward, self._talk.prompt_of(*told), [response.content for response in told])
        with self.lock:
            for response, score in zip(told, scores, strict=True):
                self.update(response.id, scores={reward: score})
            if pending.wish.best_of > 1:
                best = told[scores.index(max(scores))]
                self._set(self._talk.put(replace(self._exchange(pending.exchange_id), shown=first + drawn.index(best))))

    def _remember(self, talk: Talk) -> None:
        self._past = [*self._past, talk][-STEPS_BACK:]

    def _set(self, talk: Talk) -> None:
        self._talk = talk
        self._save()

    def _save(self) -> None:
        self.revision += 1
        self._studio.store.note(self._key, {"talk": self._talk.as_json(), "preferences": self.preferences})


class Chats:
    """The chats of all annotators."""

    def __init__(self, studio: "Studio") -> None:
        self._studio = studio
        self._lock = threading.Lock()
        self._chats: dict[str, Chat] = {}

    def of(self, annotator: str) -> Chat:
        """The annotator's chat, as it was left; a blank name is the studio's own."""
        annotator = " ".join(annotator.split())[:MOST_NAME] or self._studio.settings.annotator
        with self._lock:
            if annotator not in self._chats:
                self._chats[annotator] = Chat(self._studio, annotator)
            return self._chats[annotator]

    def close(self) -> None:
        """Stop what is on its way, so that it is kept as far as it came."""
        with self._lock:
            chats = list(self._chats.values())
        for chat in chats:
            chat.stop()
        for chat in chats:
            chat.wait(SECONDS_TO_END)
