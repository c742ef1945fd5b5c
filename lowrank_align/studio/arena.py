"""The arena: blind battles between chosen players over prompts, one annotator's at a time; every vote is in the store.

A player is a voice with its sampling. Two that have met least meet next, sides random, the next battle drawn ahead.
Two answers that are the same are a tie without asking: drawing again until they differ would hide how alike two
players are. "Both bad" is a tie for the ratings, and two bad answers for the trainers.
"""

import logging
import random
import secrets
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lowrank_align.errors import UserError
from lowrank_align.store import Entry, Judgement, Stale
from lowrank_align.store.encoding import content_id
from lowrank_align.studio.answers import Source
from lowrank_align.studio.matchmaking import Match, Played, Prompt, Setup, key_for, next_match, prompts_for
from lowrank_align.studio.speaking import AHEAD, COLLECT
from lowrank_align.studio.standings import (
    IDENTICAL,
    Key,
    Standings,
    among,
    battle_entries,
    is_decided,
    key_of,
    labels,
    players_in,
    standings,
)

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

log = logging.getLogger(__name__)

CHOICES = ("a", "b", "tie", "bad", "skip")
ALIKE_IN_A_ROW = 5  # battles with identical answers, after which it makes no sense to go on like that
SECOND_OPINION_EVERY = 5  # battles: then one that somebody else has judged, so that agreement can be told
UNDO_UP_TO = 10


@dataclass(frozen=True)
class Revealed:
    """What a battle was, once it is decided: the players' names, left first."""

    names: tuple[str, str]
    verdict: str  # one of CHOICES, or "identical"


class Arena:
    """One annotator's battles. Safe to use from any thread and several tabs."""

    def __init__(self, studio: "Studio", annotator: str, seed: int | None = None) -> None:
        self._studio, self._store, self.annotator = studio, studio.store, annotator
        self._lock = threading.RLock()
        self._rng = random.Random(secrets.randbits(64) if seed is None else seed)
        self._prompts: list[Prompt] = []
        self._ahead: Match | None = None
        self._set_aside: list[Match] = []  # that an undo pushed away, to come back next
        self._alike = self._since_second = 0
        self._entries: tuple[int, list[Entry]] = (-1, [])
        self.current: Match | None = None
        self.version = 0  # of the judgement of the battle on the page
        self.began = time.monotonic()
        self.last: Revealed | None = None
        self.problem = ""  # why there is no battle, in one sentence
        self.setup = self._remembered()
        self._keys = self._keys_if_known()

    # ---- setting up

    def start(self, setup: Setup) -> Match:
        """Begin battles between these players; the first is being drawn when this returns.

        UserError for fewer than two, two that are the same, an unknown one, or no prompt to play over.
        """
        setup.check()
        keys = [key_for(self._studio, player) for player in setup.players]
        prompts = prompts_for(self._store, setup.typed, keys)
        if not prompts:
            raise UserError("no prompt to play over: type some here, or add a file of prompts to the queue in Data")
        with self._lock:
            self.finish()
            self.setup, self._keys, self._prompts = setup, keys, prompts
            self._alike, self.last, self.problem = 0, None, ""
            note = {"players": [asdict(player) for player in setup.players], "typed": list(setup.typed)}
            self._store.note(f"arena/{self.annotator}", note)
            return self._advance()

    def compare(self, new: str, old: str) -> None:
        """A new voice against an old one at the studio's own sampling, over the queue's prompts, begun at once.

        Where that cannot be, the two stay chosen and `problem` says what is missing.
        """
        chosen = self._studio.settings
        source = Source(temperature=chosen.temperature, max_new_tokens=chosen.max_new_tokens)
        self._studio.voices.refresh()
        with self._lock:
            self.finish()
            self.setup = Setup((replace(source, voice=new), replace(source, voice=old)))
            self._keys = self._keys_if_known()
            try:
                self.start(self.setup)
            except UserError as error:
                self.problem = str(error)

    def finish(self) -> None:
        """Put the battle away; the players stay chosen, the results stay in the store."""
        with self._lock:
            for match in (self.current, self._ahead, *self._set_aside):
                if match is not None:
                    match.stop()
            self.current, self._ahead, self._set_aside = None, None, []

    # ---- deciding

    def look(self) -> Revealed | None:
        """To be called while answers stream: a battle whose answers came out the same is a tie, and the next comes."""
        with self._lock:
            match = self.current
            if match is None or match.record is not None or not match.done or match.error or not match.same():
                return None
            if any(answer.stopped or not answer.text for answer in match.answers):
                return None  # nothing said on both sides is no tie
            self._keep(match, Judgement("tie", ranks=(1.0, 1.0), tags=(IDENTICAL,)))
            self.last = Revealed(self._names(match), IDENTICAL)
            self._alike += 1
            if self._alike < ALIKE_IN_A_ROW:
                self._advance()
            else:
                self.finish()
                self.problem = (
                    f"the last {self._alike} battles gave the same answer on both sides, each counted as a tie: "
                    "raise a temperature, or choose other players"
                )
            return self.last

    def vote(self, battle_id: str, choice: str, *, event_id: str | None = None) -> Revealed:
        """Decide: "a" or "b" (left or right is better), "tie", "bad" or "skip"; it is in the store when this returns.

        The next battle is on the page then. Stale where another tab has decided; UserError where nothing can be.
        """
        with self._lock:
            match = self._on_page(battle_id)
            if choice not in CHOICES:
                raise UserError(f"{choice}: no such vote ({', '.join(CHOICES)})")
            if match.error and choice != "skip":
                raise UserError(f"{match.error}; skip this battle (S)")
            if not match.done and choice != "skip" and not (match.text(0) and match.text(1)):
                raise UserError("an answer has not begun yet: wait for its first words, or skip (S)")
            streaming = not match.done
            match.stop()
            seconds = round(time.monotonic() - self.began, 2)
            self._keep(match, _judgement(choice, match.shown, seconds, streaming), event_id)
            self.last = Revealed(self._names(match), choice)
            self._alike = 0
            self._advance()
            return self.last

    def undo(self, event_id: str | None = None) -> Match:
        """Take the last vote back: the battle is on the page again. Ties by identical answers are passed over.

        UserError where there is nothing (of the last ten votes) to take back.
        """
        with self._lock:
            if not self._prompts:
                raise UserError("press Start first, then undo brings the last battle back")
            recent = [e for e in self._store.recent(self.annotator, 10 * UNDO_UP_TO) if e.record.kind == "battle"]
            voted = [entry for entry in recent if IDENTICAL not in entry.judgement.tags]
            if not voted:
                raise UserError("no vote in the arena to undo")
            record, version = voted[0].record, voted[0].version
            self._store.undo(record.id, self.annotator, expected_version=version, event_id=event_id)
            if self.current is not None and self.current.id != record.id:
                self._set_aside.append(self.current)
            after = self._store.entry(record.id, self.annotator)
            self.last = None
            return self._show(Match.of(record), after.version if after else version + 1)

    # ---- results

    def standings(self, everyone: bool = False) -> Standings:
        """Of the chosen players, or of everyone who ever played; from the store, whoever voted."""
        entries = self.decided()
        everybody = list(dict.fromkeys([*self._keys, *players_in(entries)]))
        return standings(entries, everybody if everyone else self._keys)

    def decided(self) -> list[Entry]:
        """Every decided battle in the store, oldest first."""
        return [entry for entry in self._battles() if is_decided(entry)]

    def in_question(self, everyone: bool = False) -> list[Entry]:
        """The decided battles that `standings` counts."""
        return self.decided() if everyone else among(self.decided(), self._keys)

    # ---- inside

    def _battles(self) -> list[Entry]:
        """Also the skipped ones; read again only when something has changed."""
        with self._lock:
            pulse = self._store.pulse()
            if pulse != self._entries[0]:
                self._entries = (pulse, battle_entries(self._store))
            return self._entries[1]

    def _keys_if_known(self) -> list[Key]:
        """Of the chosen players; none where one of them is gone."""
        try:
            return [key_for(self._studio, player) for player in self.setup.players]
        except UserError as error:
            log.info("the arena's players are not all there: %s", error)
            return []

    def _advance(self) -> Match:
        self.current = None
        match = self._set_aside.pop() if self._set_aside else self._second_opinion()
        if match is None:
            match, self._ahead = self._ahead or self._draw(COLLECT), None
        self._show(match, 0)
        if self._ahead is None:
            self._ahead = self._draw(AHEAD)
        return match

    def _show(self, match: Match, version: int) -> Match:
        for answer in match.answers:
            answer.hurry(COLLECT)
        self.current, self.version, self.began, self.problem = match, version, time.monotonic(), ""
        return match

    def _draw(self, urgency: int) -> Match:
        known = set(self._keys)
        played = []
        for entry in self._battles():
            two = frozenset(key_of(completion) for completion in entry.record.completions)
            if two <= known:
                played.append(Played(two, content_id(entry.record.prompt), not is_decided(entry)))
        waiting = [match for match in (self.current, self._ahead, *self._set_aside) if match is not None]
        played += [Played(frozenset(match.keys), content_id(match.prompt)) for match in waiting]
        i, j, prompt = next_match(self._keys, self._prompts, played, self._rng)
        shown = (0, 1) if self._rng.random() < 0.5 else (1, 0)
        match = Match(prompt.text, queue_id=prompt.queue_id, shown=shown)
        match.keys = (self._keys[i], self._keys[j])
        for player in (self.setup.players[i], self.setup.players[j]):
            seed = self._rng.randrange(2**31)
            match.answers.append(self._studio.answer(prompt.text, player, seed=seed, urgency=urgency))
        return match

    def _second_opinion(self) -> Match | None:
        self._since_second += 1
        if self._since_second < SECOND_OPINION_EVERY:
            return None
        mine = {entry.record.id for entry in self._battles() if entry.annotator == self.annotator}
        others = [e.record for e in self.in_question() if e.record.id not in mine and IDENTICAL not in e.judgement.tags]
        if not others:
            return None
        self._since_second = 0
        return Match.of(self._rng.choice(others))

    def _on_page(self, battle_id: str) -> Match:
        if self.current is None:
            raise Stale("no battle is on the page: press Start")
        if self.current.id != battle_id:
            raise Stale("this battle was decided in another tab; the one on the page now is shown")
        return self.current

    def _names(self, match: Match) -> tuple[str, str]:
        named = labels([*self._keys, *match.keys])
        return named[match.keys[match.shown[0]]], named[match.keys[match.shown[1]]]

    def _keep(self, match: Match, judgement: Judgement, event_id: str | None = None) -> None:
        record = match.to_record(self._studio)
        with self._store.batch():
            self._store.add(record)
            self._store.judge(record.id, self.annotator, judgement, expected_version=self.version, event_id=event_id)
        match.record = record

    def _remembered(self) -> Setup:
        note: dict[str, Any] = self._store.noted(f"arena/{self.annotator}", {}) or {}
        try:
            return Setup(tuple(Source(**player) for player in note["players"]), tuple(note["typed"]))
        except (KeyError, TypeError):  # none yet, or written by another version
            return Setup()


def _judgement(choice: str, shown: tuple[int, ...], seconds: float, streaming: bool) -> Judgement:
    """Ranks go by completion, votes by side."""
    if choice in ("bad", "skip"):
        return Judgement("bad" if choice == "bad" else "skip", seconds=seconds, streaming=streaming)
    if choice == "tie":
        return Judgement("tie", ranks=(1.0, 1.0), seconds=seconds, streaming=streaming)
    better = shown[0] if choice == "a" else shown[1]
    ranks = (1.0, 2.0) if better == 0 else (2.0, 1.0)
    return Judgement("preferred", ranks=ranks, seconds=seconds, streaming=streaming)
