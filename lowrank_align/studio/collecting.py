"""A desk: one annotator, one pair at a time, the next one drawn ahead; everything decided is in the store at once."""

import contextlib
import logging
import random
import secrets
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowrank_align.errors import UserError
from lowrank_align.store import Entry, Stale, Text
from lowrank_align.studio.answers import Source
from lowrank_align.studio.deciding import Draft, as_before, best_answer, judgement_of
from lowrank_align.studio.pairs import Pair, Plan, drawn, drawn_again, from_store
from lowrank_align.studio.speaking import COLLECT
from lowrank_align.studio.upcoming import Upcoming

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

log = logging.getLogger(__name__)

UNDO_UP_TO = 10
WRITTEN = ("written",)  # in place of the sources, where a better answer was written
PACE_OVER = 20  # votes
STOP_SECONDS = 1.0  # longer than a token takes, unless a run has the base
BREAK_SECONDS = 300.0  # a longer pause is none of the pace
NOTHING_TO_SHOW = "no prompt: type one, or add a file of prompts to the queue"


@dataclass(frozen=True)
class Voted:
    """What a vote did."""

    entry: Entry
    sources: tuple[str, ...]  # of the answers as they stood, left first


class Desk:
    """What one annotator has before them. Safe to use from any thread and several tabs."""

    def __init__(self, studio: "Studio", annotator: str) -> None:
        self._studio, self._store, self.annotator = studio, studio.store, annotator
        self._lock = threading.RLock()
        self._rng = random.Random(secrets.randbits(64))
        self._votes: list[float] = []  # when, for the pace
        self.current: Pair | None = None
        self.version = 0  # of the judgement of the pair on the desk: above 0 once it was judged
        self.held = False  # both were bad, and a better answer may be written
        self.draft = Draft()
        self._handed_out: dict[int, str] = {}  # by completion: the text that E gave out to be mended
        self.began = time.monotonic()
        source = Source(temperature=studio.settings.temperature, max_new_tokens=studio.settings.max_new_tokens)
        self.upcoming = Upcoming(studio, annotator, Plan(sources=(source, source)), self._rng)
        self._take_up()

    # ---- what comes next

    def ask(self, prompt: str, system: str | None = None) -> Pair:
        """Put a prompt that was typed on the desk. UserError where it is empty."""
        if not prompt.strip():
            raise UserError("the prompt is empty: type one, or take the next from the queue")
        system = (system or "").strip()
        messages = [{"role": "system", "content": system}] if system else []
        return self._begin([*messages, {"role": "user", "content": prompt.strip()}])

    def go_on(self, question: str, pair_id: str) -> Pair:
        """Go on from the answer that was chosen in the last decided pair, with another question.

        UserError where nothing was chosen yet, or where the prompt is plain text.
        """
        if not question.strip():
            raise UserError("the next question is empty")
        entry = self._store.entry(pair_id, self.annotator)
        best = None if entry is None else best_answer(entry)
        if entry is None or best is None:
            raise UserError("go on from which answer? Decide the pair first: the better answer becomes the next turn")
        if isinstance(entry.record.prompt, str):
            raise UserError("a prompt of plain text has no next turn; type a new prompt")
        said = best if isinstance(best, list) else [{"role": "assistant", "content": best}]
        return self._begin([*entry.record.prompt, *said, {"role": "user", "content": question.strip()}])

    def next(self) -> Pair:
        """The next pair: one that an undo set aside, an old one again, a second opinion, or the queue's next.

        UserError where there is none. What was on the desk undecided is dropped.
        """
        with self._lock:
            pair = self.upcoming.take(self.current)
            if pair is None:
                self._clear()
                raise UserError(NOTHING_TO_SHOW)
            self._put_down(pair)
            return pair

    @property
    def plan(self) -> Plan:
        """Where answers come from, and which pair is shown next."""
        return self.upcoming.plan

    def bring_next(self) -> None:
        """The next pair where there is one; otherwise an empty desk."""
        with self._lock, contextlib.suppress(UserError):
            self.next()

    def draw_again(self) -> Pair:
        """Other answers to the same prompt."""
        with self._lock:
            if self.current is None:
                raise UserError(NOTHING_TO_SHOW)
            pair = self.current
            pair.stop()
            again = drawn(self._studio, self.plan, pair.prompt, queue_id=pair.queue_id, rng=self._rng)
            self._put_down(again)
            return again

    def open_side(self, pair_id: str, side: int) -> str:
        """Somebody writes in this answer: it grows no further. What stands there, to begin with.

        UserError where there is no such answer.
        """
        with self._lock:
            pair = self._on_desk(pair_id)
            sides = pair.shown or tuple(range(pair.count))
            if side >= len(sides):
                raise UserError(f"there is no answer {side + 1}")
            index = sides[side]
            if pair.record is None:
                pair.answers[index].stop()
        if pair.record is None:
            pair.answers[index].wait(STOP_SECONDS)  # the token under way is drawn to its end
        with self._lock:
            self._handed_out.setdefault(index, pair.text(index))
            return self.draft.edits.get(index) or self._handed_out[index]

    def locked(self) -> AbstractContextManager[Any]:
        """Nothing on the desk changes within."""
        return self._lock

    def change_plan(self, plan: Plan) -> None:
        """Other sources, or another order: what was drawn ahead is drawn anew. UserError for a source that is none."""
        known = [*self._studio.voices.names()]
        for source in plan.sources:
            if source.voice not in known:
                raise UserError(f"{source.voice}: no such adapter (there are: {', '.join(known)})")
        if not 2 <= plan.count <= 6:
            raise UserError(f"{plan.count} answers: must be 2 to 6")
        with self._lock:
            self.upcoming.change_plan(plan, self.current)

    # ---- decisions

    def vote(
        self,
        pair_id: str,
        choice: str,
        *,
        draft: Draft | None = None,
        ranks: tuple[float, ...] | None = None,
        event_id: str | None = None,
    ) -> Voted:
        """Decide the pair: "a" or "b" (left or right is better), "tie", "bad", "skip", or "rank" with `ranks`.

        `ranks` are by side, left first. It is in the store when this returns. All but "bad" clear the desk; "bad" holds
        the pair, so that a better answer may be written. Stale where another tab has decided; UserError where there is
        nothing to decide.
        """
        with self._lock:
            pair = self._on_desk(pair_id)
            if self.held:
                raise UserError("this pair is decided: E writes a better answer, G goes on, U takes it back")
            self._keep(draft)
            if pair.error and choice != "skip":
                raise UserError(f"{pair.error}; skip this prompt (S) or try again (G)")
            if choice != "skip" and any(not pair.text(i) for i in range(pair.count)):
                raise UserError("an answer says nothing (yet): wait for its first words, draw again (G), or skip (S)")
            judgement = judgement_of(
                pair, choice, ranks, self.draft, self._handed_out, time.monotonic() - self.began, not pair.done
            )
            pair.stop()
            record = pair.to_record(self._studio)
            with self._store.batch():
                self._store.add(record)
                version = self._store.judge(
                    record.id, self.annotator, judgement, expected_version=self.version, event_id=event_id
                )
            self.version = version
            pair.record = record
            self._count_vote(pair)
            entry = self._store.entry(record.id, self.annotator)
            assert entry is not None
            if choice == "bad":
                self.held = True
            else:
                self._clear()
            return Voted(entry, tuple(record.completions[i].source for i in pair.shown or range(pair.count)))

    def write(self, pair_id: str, text: str, *, event_id: str | None = None) -> Voted:
        """A better answer than both, to a pair that is held: kept, and the pair leaves the desk."""
        with self._lock:
            pair = self._on_desk(pair_id)
            if not self.held or pair.record is None:
                raise UserError("first say that both are bad (X); then a better answer can be written")
            if not text.strip():
                raise UserError("the better answer is empty: write it, or go on with G")
            entry = self._store.entry(pair.id, self.annotator)
            assert entry is not None
            judgement = replace(entry.judgement, written=as_before(pair.record.completions[0].content, text))
            self._store.judge(pair.id, self.annotator, judgement, expected_version=self.version, event_id=event_id)
            entry = self._store.entry(pair.id, self.annotator)
            assert entry is not None
            self._clear()
            return Voted(entry, WRITTEN)

    def undo(self, pair_id: str | None = None, event_id: str | None = None) -> Pair:
        """Take the last decision back: the pair is on the desk again as it was, with what was said of it.

        `pair_id`: what the page shows on the desk, "" for nothing; Stale where that is something else by now. UserError
        where there is nothing (of the last ten) to take back. What was changed in other tabs' lists stays.
        """
        with self._lock:
            if pair_id is not None and pair_id != (self.current.id if self.current else ""):
                raise Stale("the desk has changed in another tab; it is shown now as it is, press undo again")
            recent = self.decisions()
            if not recent:
                raise UserError("nothing to undo")
            entry = recent[0]
            self._store.undo(entry.record.id, self.annotator, expected_version=entry.version, event_id=event_id)
            if self.current is not None and self.current.id != entry.record.id:
                self.upcoming.set_aside.append(self.current)
            said = entry.judgement
            draft = Draft(said.strength, said.reason, said.tags, dict(said.edits))
            self._put_down(from_store(entry.record), draft)
            after = self._store.entry(entry.record.id, self.annotator)
            self.version = after.version if after else entry.version + 1
            self.held = after is not None and after.judgement.verdict == "bad"
            if self._votes:
                self._votes.pop()
            return from_store(entry.record)

    def decisions(self) -> list[Entry]:
        """The last ten of this desk, newest first: what undo would take back."""
        return self._store.recent(
            self.annotator, UNDO_UP_TO, kinds=("pair", "ranking"), origins=("collect", "import"), events=("vote",)
        )

    def keep_draft(self, pair_id: str, draft: Draft) -> None:
        """What is said of the pair so far, for a reload or another tab."""
        with self._lock:
            if self.current is not None and self.current.id == pair_id:
                self._keep(draft)

    def pace(self) -> float | None:
        """Decisions a minute over the last ones, long pauses aside; None before the third."""
        gaps = [b - a for a, b in zip(self._votes, self._votes[1:], strict=False) if b - a < BREAK_SECONDS]
        return 60 * len(gaps) / sum(gaps) if len(gaps) >= 2 and sum(gaps) > 0 else None

    # ---- inside: what is on the desk

    def _begin(self, prompt: Text) -> Pair:
        with self._lock:
            if self.current is not None and self.current.queue_id and self.current.record is None:
                self.upcoming.set_aside.append(self.current)  # it waits for its decision
            elif self.current is not None:
                self.current.stop()
            pair = drawn(self._studio, self.plan, prompt, rng=self._rng)
            self._put_down(pair)
            return pair

    def _on_desk(self, pair_id: str) -> Pair:
        if self.current is None:
            raise Stale("nothing is on the desk: G brings the next pair")
        if self.current.id != pair_id:
            raise Stale("this pair was decided or changed in another tab; the one on the desk now is shown")
        return self.current

    def _put_down(self, pair: Pair, draft: Draft | None = None) -> None:
        pair.hurry(COLLECT)
        self._studio.speaker.wake()
        self.current, self.version, self.held, self.draft = pair, 0, False, draft or Draft()
        self._handed_out = {}
        self.began = time.monotonic()
        self._remember()
        self.upcoming.look_ahead(self.current)

    def _clear(self) -> None:
        """Nothing on the desk. What is remembered of it stays until the next pair; once decided, it is passed over."""
        self.current, self.version, self.held, self.draft = None, 0, False, Draft()

    def _keep(self, draft: Draft | None) -> None:
        if draft is not None and draft != self.draft:
            self.draft = draft
            self._remember()

    def _count_vote(self, pair: Pair) -> None:
        self._votes = [*self._votes[-PACE_OVER:], time.monotonic()]
        self.upcoming.count(pair)

    # ---- inside: what survives a restart

    def _remember(self) -> None:
        pair = self.current
        note: dict[str, Any] | None = None
        if pair is not None and pair.answers and pair.record is None:
            note = {"pair": pair.to_note(), "draft": vars(self.draft) | {"tags": list(self.draft.tags)}}
        self._store.note(f"desk/{self.annotator}", note)

    def _take_up(self) -> None:
        """What was on the desk when the studio last ended: the same pair again, with what was said of it."""
        note = self._store.noted(f"desk/{self.annotator}", None)
        if not note:
            return
        try:
            said = note["draft"]
            edits = {int(k): str(v) for k, v in said["edits"].items()}
            draft = Draft(said["strength"], said["reason"], tuple(said["tags"]), edits)
            if self._store.find(str(note["pair"]["id"])) is not None:
                return  # it was decided after it was put down
            pair = drawn_again(self._studio, note["pair"])
        except (KeyError, TypeError, ValueError):  # written by an older version
            log.info("what was on %s's desk cannot be taken up; the queue goes on", self.annotator)
            return
        self._put_down(pair, draft)
