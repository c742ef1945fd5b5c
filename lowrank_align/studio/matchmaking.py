"""Who meets whom next in the arena, and over which prompt."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from lowrank_align import adapters
from lowrank_align.errors import UserError
from lowrank_align.store import Record, Store, Text
from lowrank_align.store.encoding import content_id
from lowrank_align.studio.answers import Source
from lowrank_align.studio.pairs import Pair
from lowrank_align.studio.standings import Key, key_of
from lowrank_align.studio.voices import BASE, LIVE

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

MOST_PLAYERS = 8
Two = frozenset[Key]


@dataclass(frozen=True)
class Setup:
    """Who plays, over what. Without `typed` prompts, over those of the queue."""

    players: tuple[Source, ...] = ()
    typed: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError for fewer than two players, too many, two that are the same, or sampling that is none."""
        if len(self.players) < 2:
            raise UserError(
                "two players are needed: train an adapter in Train, or choose base twice at different temperatures"
            )
        if len(self.players) > MOST_PLAYERS:
            raise UserError(f"{len(self.players)} players: at most {MOST_PLAYERS}, or their battles never end")
        for player in self.players:
            if player.voice == LIVE:
                raise UserError(f"{LIVE!r} changes with every step: choose it again when its run has ended")
            if not 0 <= player.temperature <= 5 or not 0 < player.top_p <= 1 or player.max_new_tokens < 1:
                raise UserError(f"{player.voice}: temperature 0 to 5, top p above 0 and up to 1, at least 1 token")
        for a, b in combinations(self.players, 2):
            if a == b:
                raise UserError(f"two players are both {a.voice} at temperature {a.temperature:g}: change one of them")


@dataclass(frozen=True)
class Prompt:
    """What a battle may be about. `unseen`: nothing was collected on it when the arena was set up."""

    text: Text
    queue_id: str | None
    unseen: bool
    digest: str


class Match(Pair):
    """A battle: a pair of answers, by known players. Kept as a record of its kind."""

    keys: tuple[Key, Key]  # by completion, not by side

    @classmethod
    def of(cls, record: Record) -> "Match":
        """One that is in the store."""
        match = cls(record.prompt, queue_id=record.queue_id, record_id=record.id, shown=record.order, record=record)
        first, second = (key_of(completion) for completion in record.completions)
        match.keys = (first, second)
        return match

    def to_record(self, studio: "Studio", origin: str = "arena") -> Record:
        if self.record is not None:
            return self.record
        return Record(
            kind="battle",
            prompt=self.prompt,
            completions=self.completions(),
            shown=self.shown,
            origin=origin,
            queue_id=self.queue_id,
            versions=studio.versions(),
            id=self.id,
        )


def key_for(studio: "Studio", player: Source) -> Key:
    """Of a player who has not played yet. UserError where there is no such voice."""
    known = [name for name in studio.voices.names() if name != LIVE]
    if player.voice not in known:
        raise UserError(f"there is no adapter {player.voice!r} (there are: {', '.join(known)})")
    run = None if player.voice == BASE else studio.voices.run_of(player.voice)
    digest = None if run is None else adapters.weights_sha256(run)
    return Key(player.voice, digest, player.temperature, player.top_p, player.max_new_tokens)


def prompts_for(store: Store, typed: Sequence[str], keys: Iterable[Key]) -> list[Prompt]:
    """The typed ones, or the queue's, in order. Seen is what anything was collected on but for battles among `keys`."""
    known = set(keys)
    seen = {
        content_id(entry.record.prompt)
        for entry in store.entries()
        if entry.record.kind != "battle" or not known.issuperset(key_of(c) for c in entry.record.completions)
    }
    messages = [[{"role": "user", "content": line.strip()}] for line in typed if line.strip()]
    found: list[tuple[Text, str | None]]
    found = [(text, None) for text in messages] if messages else [(item.prompt, item.id) for item in store.queued()]
    digests = [content_id(text) for text, _ in found]
    return [Prompt(*item, digest not in seen, digest) for item, digest in zip(found, digests, strict=True)]


@dataclass(frozen=True)
class Played:
    """A battle that was, or is about to be; a skipped one used its prompt, but the two have not met."""

    two: Two
    digest: str
    skipped: bool = False


def next_match(
    keys: Sequence[Key], prompts: Sequence[Prompt], played: Iterable[Played], rng: random.Random
) -> tuple[int, int, Prompt]:
    """The two players (by place) that have met least, by lot where several have, and the prompt they meet on.

    Rather one that these two have not met on, then an unseen one, then one that was used least, then the queue's first.
    """
    met: Counter[Two] = Counter()
    on: Counter[tuple[Two, str]] = Counter()
    used: Counter[str] = Counter()
    for one in played:
        met[one.two] += not one.skipped
        on[one.two, one.digest] += 1
        used[one.digest] += 1
    pairs = list(combinations(range(len(keys)), 2))
    rng.shuffle(pairs)
    i, j = min(pairs, key=lambda pair: met[frozenset((keys[pair[0]], keys[pair[1]]))])
    two = frozenset((keys[i], keys[j]))
    return i, j, min(prompts, key=lambda p: (on[two, p.digest], not p.unseen, used[p.digest]))
