"""Where an answer departs from a reference: per token, log p(voice) - log p(reference), in nats."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowrank_align.conversation import thought_is_open
from lowrank_align.data.stream import TextStream, Thoughts
from lowrank_align.errors import UserError
from lowrank_align.studio.talk import Response
from lowrank_align.studio.voices import BASE
from lowrank_align.trees import Completion, TreeRow

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

END = "[end]"  # how the token that ends an answer is shown


@dataclass(frozen=True)
class Mark:
    """A token, or the few that make up one character, with log-probabilities in nats at temperature 1."""

    text: str
    voice_logp: float
    reference_logp: float
    thinking: bool = False

    @property
    def log_ratio(self) -> float:
        """Above 0: likelier for the voice than for the reference."""
        return self.voice_logp - self.reference_logp


@dataclass(frozen=True)
class TokenMap:
    """The marks of an answer, its thoughts among them, in order."""

    voice: str
    reference: str
    marks: tuple[Mark, ...]
    tokens: int
    retrained: bool = False  # the voice has other weights now than when it gave the answer

    @property
    def log_ratio(self) -> float:
        """Of the whole answer, in nats."""
        return sum(mark.log_ratio for mark in self.marks)

    def departures(self, count: int) -> list[Mark]:
        """The marks that differ most, the largest first."""
        return sorted(self.marks, key=lambda mark: -abs(mark.log_ratio))[:count]


def token_map(studio: "Studio", response: Response, reference: str = BASE) -> TokenMap:
    """How much likelier each token of an answer is for the voice that gave it than for `reference`.

    One pass for each of the two, each behind its own answer prefix. UserError where the answer has no tokens, or where
    a voice cannot be loaded.
    """
    if not response.ids:
        raise UserError("no model drew this answer, so there is nothing to compare token by token")
    asked = list(response.prompt_ids)
    without = asked[: len(asked) - response.prefix_tokens]
    answer = [Completion(list(response.ids), [True] * len(response.ids))]

    def compare() -> tuple[list[float], list[float], bool]:
        voice, other = studio.voices.voice(response.voice), studio.voices.voice(reference)
        own_prefix = studio.renderer.with_prefix(other.answer_prefix).prefix_ids
        same = (other.role, other.answer_prefix) == (voice.role, voice.answer_prefix)
        logps = []
        for role, prompt in ((voice.role, asked), (other.role, asked if same else [*without, *own_prefix])):
            batch = studio.base.collate([TreeRow(prompt, answer)])
            with torch.no_grad(), studio.base.role(role):
                logps.append(studio.base.token_scores(batch).per_token_logps[0].tolist())
        return logps[0], logps[1], voice.adapter_hash != response.adapter_hash

    ours, theirs, retrained = studio.speaker.call(compare)
    marks = _marks(studio, response, ours, theirs)
    return TokenMap(response.voice, reference, tuple(marks), len(response.ids), retrained)


def _marks(studio: "Studio", response: Response, ours: list[float], theirs: list[float]) -> list[Mark]:
    """Tokens that are no text of their own (a character's first bytes) count with the one that completes it."""
    renderer = studio.renderer
    text = TextStream(renderer.decode)
    thoughts = Thoughts(thought_is_open(renderer, response.prompt_ids, response.prefix_tokens))
    marks: list[Mark] = []
    our_sum = their_sum = 0.0
    for number, token in enumerate(response.ids):
        our_sum, their_sum = our_sum + ours[number], their_sum + theirs[number]
        is_end = token in renderer.end_ids
        last = number == len(response.ids) - 1
        piece = END if is_end else text.push(token) or (text.flush() if last else "")
        if not piece:
            continue
        thinking = thoughts.thinking
        if not is_end:
            list(thoughts.push(piece))  # only where it stands afterwards matters
        marks.append(Mark(piece, our_sum, their_sum, not is_end and (thinking or thoughts.thinking)))
        our_sum = their_sum = 0.0
    return marks
