"""What comes onto a desk next: drawn ahead from the queue, set aside, shown once more, or judged by somebody else."""

import random
from typing import TYPE_CHECKING

from lowrank_align.studio.pairs import Pair, Plan, drawn, from_store, repeated

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

REPEAT_EVERY = 10
FRESH = REPEAT_EVERY // 2  # newest decisions, which are not shown again yet
REPEATS_FROM = 500  # of the older ones
POOL = 4  # pairs that are drawn to find the most informative of them


class Upcoming:
    """The pairs behind the one on the desk. Not thread-safe: the desk's lock guards it."""

    def __init__(self, studio: "Studio", annotator: str, plan: Plan, rng: random.Random) -> None:
        self._studio, self._store, self._annotator, self._rng = studio, studio.store, annotator, rng
        self.plan = plan
        self.waiting: list[Pair] = []  # drawn ahead
        self.set_aside: list[Pair] = []  # that something pushed from the desk, to come back next
        self._since_repeat = 0

    def take(self, current: Pair | None) -> Pair | None:
        """The next pair; None where there is none."""
        if self.set_aside:
            return self.set_aside.pop()
        if self.plan.repeats and self._since_repeat >= REPEAT_EVERY - 1 and (old := self._old_pair()):
            return old
        if self.plan.second_opinions and (other := self._judged_by_others()):
            return other
        self.look_ahead(current)
        if not self.waiting:
            return None
        ready = [pair for pair in self.waiting if pair.gap is not None]
        pair = min(ready, key=lambda p: p.gap or 0.0) if self.plan.informative and ready else self.waiting[0]
        self.waiting.remove(pair)
        return pair

    def look_ahead(self, current: Pair | None) -> None:
        """Draw for the queue's next prompts, so that a decision is followed by a pair at once."""
        known = (current, *self.waiting, *self.set_aside)
        busy = {pair.queue_id for pair in known if pair is not None and pair.queue_id}
        missing = (POOL if self.plan.informative else 1) - len(self.waiting)
        for queued in self._store.queue(self._annotator, limit=missing, without=tuple(busy)) if missing > 0 else ():
            pair = drawn(self._studio, self.plan, queued.prompt, queue_id=queued.id, ahead=True, rng=self._rng)
            self.waiting.append(pair)

    def change_plan(self, plan: Plan, current: Pair | None) -> None:
        """Other sources, or another order: what was drawn ahead is drawn anew."""
        if plan == self.plan:
            return
        self.plan = plan
        for pair in self.waiting:
            pair.stop()
        self.waiting = []
        self.look_ahead(current)

    def count(self, pair: Pair) -> None:
        """A pair was decided."""
        self._since_repeat = 0 if pair.repeat_of else self._since_repeat + 1

    def _old_pair(self) -> Pair | None:
        decided = self._store.entries(
            annotator=self._annotator, kinds=("pair",), verdicts=("preferred", "tie"), limit=REPEATS_FROM
        )
        old = [entry.record for entry in decided if entry.record.repeat_of is None][FRESH:]
        return repeated(self._rng.choice(old), self._rng) if old else None

    def _judged_by_others(self) -> Pair | None:
        mine = {entry.record.id for entry in self._store.entries(annotator=self._annotator)}
        for entry in self._store.entries(kinds=("pair", "ranking"), newest_first=False):
            if entry.record.id not in mine and entry.record.repeat_of is None and entry.judgement.verdict != "skip":
                return from_store(entry.record)
        return None
