"""What the store keeps: records of shown answers, what people said of them, and prompts that wait.

A record never changes. What one annotator says of it is a `Judgement`, whole at every version; versions count from 1.
Ids are 32 hexadecimal characters, made by whoever writes, so that a repeated write is seen to be one.
"""

import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from lowrank_align.errors import UserError

Text = str | list[dict[str, Any]]  # plain text, or messages; a completion of messages stands behind the prompt's
Kind = Literal["pair", "ranking", "battle", "rating", "demonstration", "scored"]
Verdict = Literal["preferred", "tie", "bad", "skip", "ranked", "liked", "disliked", "demonstration", "scored"]

KINDS: tuple[str, ...] = get_args(Kind)
VERDICTS: tuple[str, ...] = get_args(Verdict)
TRAINERS_OWN = ("tools", "chat_template_kwargs")  # columns that change how a prompt is rendered
_ID = re.compile(r"[0-9a-f]{32}")


class Stale(UserError):
    """Somebody else, such as another tab, has changed it since it was read."""


def new_id() -> str:
    """32 hexadecimal characters."""
    return uuid.uuid4().hex


def is_id(value: str) -> bool:
    """Whether it is one that `new_id` could have made."""
    return bool(_ID.fullmatch(value))


def now() -> str:
    """ISO 8601 in UTC, to the microsecond, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True)
class Completion:
    """One answer as it was shown, and how it was drawn."""

    content: Text
    source: str = ""  # what people call it: "base", "dpo", "written", "imported"
    adapter_hash: str | None = None  # SHA-256 of the adapter's weights; None: the bare base, or unknown
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, top_p, max_new_tokens, seed
    finished: bool = True  # False: stopped or cut, no end token follows
    tokens: int | None = None
    seconds: float | None = None
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Record:
    """A prompt and its answers. `battle` is the arena's pair, `rating` a thumb on one answer."""

    kind: Kind
    prompt: Text
    completions: tuple[Completion, ...]
    shown: tuple[int, ...] = ()  # which completion stood 1st (left), 2nd, ... on the page; () is as they are
    origin: str = "collect"  # collect, chat, arena, data or import
    queue_id: str | None = None  # the queue's prompt that it answers
    repeat_of: str | None = None  # an older record shown again to measure consistency; left out of exports
    versions: dict[str, Any] = field(default_factory=dict)  # base, base_hash, template_hash, quantize, lowrank_align
    extra: dict[str, Any] = field(default_factory=dict)  # imported columns without a place of their own
    created: str = field(default_factory=now)
    id: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        """ValueError for what no page and no file may produce."""
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r}, must be one of {', '.join(KINDS)}")
        if not self.completions:
            raise ValueError("completions: none")
        if self.shown and sorted(self.shown) != list(range(len(self.completions))):
            raise ValueError(f"shown: {self.shown}, must be an order of {len(self.completions)} completions")
        for name, value in (("id", self.id), ("queue_id", self.queue_id), ("repeat_of", self.repeat_of)):
            if value is not None and not is_id(value):
                raise ValueError(f"{name}: {value!r}, must be 32 hexadecimal characters")

    @property
    def order(self) -> tuple[int, ...]:
        """Completion indices from left to right."""
        return self.shown or tuple(range(len(self.completions)))


@dataclass(frozen=True)
class Judgement:
    """The whole state that one annotator has given one record."""

    verdict: Verdict
    ranks: tuple[float, ...] | None = None  # by completion, not by side: 1 is best, equal is a tie
    preference: float | None = None  # an imported soft label of a pair: that completions[0] is better
    score: float | None = None
    strength: int | None = None  # 1 slightly, 2 clearly, 3 by far
    reason: str = ""
    tags: tuple[str, ...] = ()
    edits: dict[int, str] = field(default_factory=dict)  # completion index to the mended text
    written: str | None = None  # an answer written by hand, better than all
    seconds: float | None = None  # time to decide
    streaming: bool = False  # decided while text still streamed
    deleted: bool = False

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict: {self.verdict!r}, must be one of {', '.join(VERDICTS)}")
        if self.verdict in ("preferred", "ranked") and self.ranks is None:
            raise ValueError(f"ranks: missing for the verdict {self.verdict}")
        if self.verdict == "scored" and self.score is None:
            raise ValueError("score: missing for the verdict scored")

    def fits(self, record: Record) -> None:
        """ValueError where it speaks of completions that the record does not have."""
        count = len(record.completions)
        if self.ranks is not None and len(self.ranks) != count:
            raise ValueError(f"ranks: {len(self.ranks)} for {count} completions")
        for index in self.edits:
            if not 0 <= index < count:
                raise ValueError(f"edits: completion {index} of {count}")


@dataclass(frozen=True)
class Entry:
    """A record with what one annotator says of it now."""

    record: Record
    annotator: str
    judgement: Judgement
    version: int
    updated: str


@dataclass(frozen=True)
class Event:
    """One step in the history of a record under one annotator; `judgement` is the state after it, None: none stands."""

    seq: int
    id: str
    record_id: str
    annotator: str
    version: int
    kind: str  # vote, edit, undo, delete, restore or import
    judgement: Judgement | None
    at: str


@dataclass(frozen=True)
class QueuedPrompt:
    """A prompt that waits to be answered; `position` orders the queue."""

    id: str
    prompt: Text
    position: int
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Enqueued:
    """How many prompts were new, and how many the queue had already."""

    added: int
    duplicates: int
