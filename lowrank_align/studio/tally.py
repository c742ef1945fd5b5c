"""How collecting goes, in a line or two: how many, how fast, and what a trainer would learn by mistake."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank_align.ratings import WinRate
from lowrank_align.store import Entry, Store
from lowrank_align.studio.deciding import best_answer
from lowrank_align.studio.pairs import said

KINDS = ("pair", "battle", "ranking")
LATELY = 300  # decisions, over which the shares are taken
ENOUGH_TO_SAY = 10  # decisions, before shares are told
ONE_SIDED = 0.5  # the interval of a share that does not reach this tells of a habit
MUCH_LONGER = 0.7


@dataclass(frozen=True)
class Tally:
    """What one annotator has decided. Shares are of two answers side by side."""

    pairs: int  # that train something: a better one, or a tie
    ties: int
    both_bad: int
    skipped: int
    left: WinRate  # of decided pairs, how often the left side won
    longer: WinRate  # of decided pairs, how often the longer answer won

    @classmethod
    def of_annotator(cls, store: Store, annotator: str) -> "Tally":
        """Of everything that the annotator has decided; the shares of the last decisions, so that it stays quick."""
        chosen: dict[str, Any] = {"annotator": annotator, "kinds": KINDS, "repeats": False}
        lately = cls.of(store.entries(**chosen, limit=LATELY))
        bad = store.entries(**chosen, verdicts=("bad",))
        return replace(
            lately,
            pairs=store.count(**chosen, verdicts=("preferred", "tie", "ranked")) + sum(map(_mended, bad)),
            ties=store.count(**chosen, verdicts=("tie",)),
            both_bad=len(bad),
            skipped=store.count(**chosen, verdicts=("skip",)),
        )

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Tally":
        """Over what stands; pairs shown again to measure consistency count for nothing here."""
        fresh = [e for e in entries if e.record.kind in KINDS and e.record.repeat_of is None]
        verdicts = [entry.judgement.verdict for entry in fresh]
        decided = [e for e in fresh if e.judgement.verdict == "preferred" and len(e.record.completions) == 2]
        left, longer, same_length = 0, 0, 0
        for entry in decided:
            ranks = entry.judgement.ranks or (1.0, 2.0)
            best = 0 if ranks[0] < ranks[1] else 1
            left += (entry.record.shown or (0, 1))[0] == best
            lengths = [len(said(c.content)) for c in entry.record.completions]
            longer += lengths[best] > lengths[1 - best]
            same_length += lengths[0] == lengths[1]
        return cls(
            pairs=sum(v in ("preferred", "tie", "ranked") for v in verdicts)
            + sum(e.judgement.verdict == "bad" and _mended(e) for e in fresh),
            ties=verdicts.count("tie"),
            both_bad=verdicts.count("bad"),
            skipped=verdicts.count("skip"),
            left=WinRate.of(left, 0, len(decided) - left),
            longer=WinRate.of(longer, same_length, len(decided) - longer - same_length),
        )

    def in_words(self, pace: float | None) -> str:
        """`52 pairs · 6.2 a minute · 4 ties · left side 55 % (40-69 %)`."""
        parts = [f"{self.pairs} pair{'s' * (self.pairs != 1)}"]
        if pace is not None:
            parts.append(f"{pace:.1f} a minute")
        if self.pairs + self.both_bad >= ENOUGH_TO_SAY:
            parts += [f"{self.ties} tie{'s' * (self.ties != 1)}", f"{self.both_bad} both bad"]
            if self.left.total:
                parts.append(f"left side {share(self.left)}")
        return " · ".join(parts)

    def warnings(self) -> list[str]:
        """Habits that the pairs would teach."""
        found = []
        if self.left.total >= ENOUGH_TO_SAY and not self.left.low <= ONE_SIDED <= self.left.high:
            side = "left" if self.left.rate > ONE_SIDED else "right"
            found.append(f"The {side} side wins too often to be chance: read both before you press a key.")
        if self.longer.total >= ENOUGH_TO_SAY and self.longer.low > ONE_SIDED and self.longer.rate >= MUCH_LONGER:
            wins = share(self.longer)
            found.append(f"The longer answer wins {wins} of the time: a model will learn to write longer.")
        return found


def _mended(entry: Entry) -> bool:
    """Both were bad, and a better answer was written: a pair all the same."""
    return best_answer(entry) is not None


def share(rate: WinRate) -> str:
    """`70 % (48-86 %)`."""
    return f"{100 * rate.rate:.0f} % ({100 * rate.low:.0f}-{100 * rate.high:.0f} %)"
