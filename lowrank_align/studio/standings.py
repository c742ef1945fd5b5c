"""What the arena's votes say, computed from the store alone: ratings, winners, win rates, agreement."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lowrank_align import adapters
from lowrank_align.errors import UserError
from lowrank_align.ratings import (
    Agreement,
    Battle,
    Rating,
    Winners,
    WinRate,
    agreement,
    agreement_with_scores,
    bradley_terry,
    left_side,
    win_rate_of,
    winners,
)
from lowrank_align.store import Completion, Entry, Store
from lowrank_align.store.encoding import content_id

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

DECIDED = ("preferred", "tie", "bad")
IDENTICAL = "identical"  # the tag of a tie that nobody was asked about


class Key(NamedTuple):
    """What makes a player one: the same adapter at the same sampling, under the name that people see."""

    voice: str
    adapter_hash: str | None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Standings:
    """Of the battles among `names`; all by the names that `labels` gives."""

    names: tuple[str, ...]
    ratings: list[Rating]
    winners: Winners
    win_rates: dict[str, WinRate]
    left: WinRate  # of the votes that people gave
    agreement: Agreement  # between annotators, on the same battles
    battles: int
    identical: int  # of them, ties because the answers were the same


def key_of(completion: Completion) -> Key:
    """Who drew the answer, from its row."""
    sampling = completion.sampling
    return Key(
        completion.source,
        completion.adapter_hash,
        sampling.get("temperature"),
        sampling.get("top_p"),
        sampling.get("max_new_tokens"),
    )


def labels(keys: Iterable[Key]) -> dict[Key, str]:
    """A name for every player: the voice's, with what tells it from others of that voice."""
    found: dict[Key, str] = {}
    by_voice: dict[str, list[Key]] = {}
    for key in dict.fromkeys(keys):
        by_voice.setdefault(key.voice, []).append(key)
    for voice, same in by_voice.items():
        differ = [i for i in range(1, len(Key._fields)) if len({key[i] for key in same}) > 1]
        for key in same:
            found[key] = " · ".join([voice, *(_SAID[i](key[i]) for i in differ)])
    return found


_SAID: dict[int, Callable[[Any], str]] = {
    1: lambda digest: digest[:6] if digest else "without adapter",
    2: lambda temperature: f"temperature {temperature:g}" if temperature is not None else "temperature unknown",
    3: lambda top_p: f"top p {top_p:g}" if top_p is not None else "top p unknown",
    4: lambda count: f"{count} tokens" if count is not None else "length unknown",
}


def battle_entries(store: Store) -> list[Entry]:
    """Every battle between two that was voted on or skipped, oldest first; an entry for each who has judged it."""
    found = store.entries(kinds=("battle",), newest_first=False)
    return [entry for entry in found if len(entry.record.completions) == 2]


def is_decided(entry: Entry) -> bool:
    """Not skipped."""
    return entry.judgement.verdict in DECIDED


def players_in(entries: Iterable[Entry]) -> list[Key]:
    """Everybody who has played, in the order of appearance."""
    return list(dict.fromkeys(key_of(c) for entry in entries for c in entry.record.completions))


def among(entries: Iterable[Entry], keys: Iterable[Key]) -> list[Entry]:
    """The battles in which both sides are of `keys`."""
    known = set(keys)
    return [entry for entry in entries if known.issuperset(key_of(c) for c in entry.record.completions)]


def score_of(entry: Entry) -> float:
    """1 where the left answer won, 0 where the right one did, 0.5 for a tie; both bad is a tie here."""
    ranks = entry.judgement.ranks
    if entry.judgement.verdict != "preferred" or ranks is None:
        return 0.5
    left, right = (ranks[i] for i in entry.record.order)
    return 0.5 if left == right else float(left < right)


def as_battle(entry: Entry, named: dict[Key, str]) -> Battle:
    left, right = (named[key_of(entry.record.completions[i])] for i in entry.record.order)
    return Battle(left, right, score_of(entry), content_id(entry.record.prompt), entry.annotator)


def standings(entries: Sequence[Entry], keys: Sequence[Key]) -> Standings:
    """Ratings and the rest over the decided battles among `keys`."""
    named = labels(keys)
    names = [named[key] for key in keys]
    chosen = [entry for entry in among(entries, keys) if len({key_of(c) for c in entry.record.completions}) == 2]
    battles = [as_battle(entry, named) for entry in chosen]
    by_people = [b for b, entry in zip(battles, chosen, strict=True) if IDENTICAL not in entry.judgement.tags]
    return Standings(
        names=tuple(names),
        ratings=bradley_terry(battles, names),
        winners=winners(battles, names) if battles else Winners((), (), ()),
        win_rates={name: win_rate_of(battles, name) for name in names},
        left=left_side(by_people),
        agreement=agreement(_said_of_each(chosen)),
        battles=len(battles),
        identical=len(battles) - len(by_people),
    )


def _said_of_each(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """By battle, what every annotator said: left, right, tie or bad. Of identical answers nobody said anything."""
    said: dict[str, dict[str, str]] = {}
    for entry in entries:
        if IDENTICAL in entry.judgement.tags:
            continue
        words = {1.0: "left", 0.0: "right", 0.5: "bad" if entry.judgement.verdict == "bad" else "tie"}
        said.setdefault(entry.record.id, {})[entry.annotator] = words[score_of(entry)]
    return list(said.values())


# ---- votes beside a reward run


@dataclass(frozen=True)
class Judged:
    """How far a reward run's scores agree with the votes, so far: `done` of `total` scored."""

    done: int
    total: int
    agreement: WinRate
    left_out: int  # could not be scored


def judged_by(studio: "Studio", reward: str, entries: Sequence[Entry]) -> Iterator[Judged]:
    """Score the answers of every vote for a side, a step at a time; what was scored before is in the store's notes.

    UserError where there is no such reward run, or no such vote yet.
    """
    wanted = [e for e in entries if score_of(e) != 0.5]
    if not wanted:
        raise UserError("no vote for one side yet: vote in some battles first")
    run = studio.voices.run_of(reward)
    if run is None or reward not in studio.voices.rewards():
        raise UserError(f"{reward}: no such reward run; train one in Train (method: reward)")
    note = f"arena-margins/{adapters.weights_sha256(run)}"
    margins: dict[str, float | None] = studio.store.noted(note, {})
    new = 0
    for number, entry in enumerate(wanted, start=1):
        if entry.record.id not in margins:
            margins[entry.record.id] = _margin(studio, reward, entry)
            new += 1
        if number == len(wanted) or number % 10 == 0:
            if new:
                studio.store.note(note, margins)
            scored = [(score_of(e), m) for e in wanted[:number] if (m := margins[e.record.id]) is not None]
            found = agreement_with_scores([vote for vote, _ in scored], [margin for _, margin in scored])
            yield Judged(number, len(wanted), found, number - len(scored))


def _margin(studio: "Studio", reward: str, entry: Entry) -> float | None:
    """The left answer's score less the right one's; None where they cannot be scored."""
    answers = [entry.record.completions[i].content for i in entry.record.order]
    try:
        left, right = studio.scores(reward, entry.record.prompt, answers)
    except UserError:
        return None
    return left - right
