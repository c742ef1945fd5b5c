"""How near an exported model is to what was trained: on fixed prompts, distribution by distribution.

The yardstick is rounding itself. The exported model is also run with every weight moved at random by up to half a unit
in its last place: a model of which nobody could say that it is not the same one rounded otherwise. An export departs
where it is several times farther from base + adapter than that.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_align.base import Base
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Message, Row, Shape
from lowrank_align.errors import UserError
from lowrank_align.rollout import generator_for, sample
from lowrank_align.trees import Completion, TreeRow

# Questions with two answers each: the policy answers them itself, a reward model scores the answers.
QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris.", "It is a big city."),
    ("Write a short poem about the sea.", "Grey waves come in,\ngrey waves go out.", "No."),
    ("What is 17 + 25?", "17 + 25 = 42.", "It is 32."),
    ("Wie geht es dir heute?", "Danke, gut. Und dir?", "???"),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b", "print('add')"),
    ("Tell me a story about a dog.", "Once upon a time there was a dog named Tim.", "Dogs are animals."),
)
SYSTEM = "You are a helpful assistant."
NEW_TOKENS = 24
RUN_PROMPTS = 4  # of the run's own
# How many times farther than another rounding the export may be; KL grows with the square of a distance.
TIMES = 4.0
# What fp32 arithmetic adds where weights are not rounded at all (the order of a sum).
ARITHMETIC_NATS, ARITHMETIC_KL_NATS = 1e-3, 1e-5


@dataclass(frozen=True)
class Probe:
    """Tokens, of which those from `start` on are the answer; no `text` for the run's own prompts, which are private."""

    ids: list[int]
    start: int
    text: str = ""


Reading = list[Tensor]  # a probe each: (T, V) log-probabilities before every token of its answer, or (1,) its score


@dataclass(frozen=True)
class Distance:
    """Between two policies (nats a token, teacher-forced) or two reward models (scores; KL and text do not apply)."""

    largest: float
    mean: float
    kl_nats: float | None = None
    greedy_equal: int | None = None  # answers that come out the same
    answers: int | None = None

    def within(self, floor: "Distance") -> bool:
        """Whether this is what rounding does, `floor` being one other rounding. NaN is not."""
        near = self.largest <= TIMES * floor.largest + ARITHMETIC_NATS
        return near and (self.kl_nats or 0.0) <= TIMES**2 * (floor.kl_nats or 0.0) + ARITHMETIC_KL_NATS

    def words(self) -> str:
        """As a line of the report."""
        if self.kl_nats is None:
            return f"scores within {self.largest:.2g} (mean {self.mean:.2g})"
        greedy = f"greedy text equal on {self.greedy_equal} of {self.answers}"
        return f"KL {self.kl_nats:.2g} nats/token, log-probs within {self.largest:.2g} (mean {self.mean:.2g}), {greedy}"


def questions(renderer: Renderer, own: Sequence[str], context: int) -> list[tuple[str, list[int]]]:
    """(text, ids) of every prompt that leaves room for an answer: ours through the chat template, `own` as texts.

    UserError where none does.
    """
    rows = [(asked, Row(Shape.prompts, _asked(asked), [], where=asked)) for asked, _, _ in QUESTIONS]
    rows.append((f"{SYSTEM} {QUESTIONS[0][0]}", Row(Shape.prompts, _asked(QUESTIONS[0][0], SYSTEM), [], where=SYSTEM)))
    rows += [("", Row(Shape.prompts, text, [], where="samples.jsonl")) for text in own]
    found = []
    for text, row in rows:
        try:
            ids = renderer.prompt_ids(row)
        except UserError:  # a template without system turns
            continue
        if len(ids) + NEW_TOKENS <= context:
            found.append((text, ids))
    if not found:
        raise UserError(f"no prompt leaves room for {NEW_TOKENS} tokens in a context of {context}; nothing to compare")
    return found


def continued(base: Base, role: str, asked: Sequence[tuple[str, list[int]]], end_ids: Sequence[int]) -> list[Probe]:
    """The prompts with `role`'s greedy answers."""
    with base.role(role):
        groups = sample(
            base,
            [ids for _, ids in asked],
            end_ids=end_ids,
            max_new_tokens=NEW_TOKENS,
            generator=generator_for(base.device, 0, "parity"),
            temperature=0.0,
        )
    answers = [group[0].ids for group in groups]
    return [Probe([*ids, *new], len(ids), text) for (text, ids), new in zip(asked, answers, strict=True)]


def answered(renderer: Renderer, context: int) -> list[Probe]:
    """The questions with their given answers, for a reward model. UserError where none fits."""
    found = []
    for asked, *answers in QUESTIONS:
        for answer in answers:
            row = Row(Shape.demonstration, _asked(asked), [[Message(role="assistant", content=answer)]], where=asked)
            tree = renderer.tree_row(row).tree
            if tree is not None and len(tree.prompt_ids) + len(tree.completions[0].ids) <= context:
                found.append(Probe([*tree.prompt_ids, *tree.completions[0].ids], len(tree.prompt_ids), asked))
    if not found:
        raise UserError(f"none of the parity questions fits into a context of {context}; nothing to compare")
    return found


@torch.no_grad()
def read_policy(model: Any, probes: Sequence[Probe], pad_id: int) -> Reading:
    """What a transformers (or PEFT) causal model says before every token of the answers."""
    ids, mask = _padded(probes, pad_id, model.device)
    first = min(probe.start for probe in probes) - 1
    takes = "logits_to_keep" in inspect.signature(_plain(model).forward).parameters
    kept = {"logits_to_keep": ids.shape[1] - first} if takes else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
    logits = logits[:, -(ids.shape[1] - first) :]
    return [
        logits[i, probe.start - 1 - first : len(probe.ids) - 1 - first].float().log_softmax(-1).cpu()
        for i, probe in enumerate(probes)
    ]


@torch.no_grad()
def read_classifier(model: Any, probes: Sequence[Probe], pad_id: int | None) -> Reading:
    """The scores of a transformers (or PEFT) sequence classifier; without a pad token, one text at a time."""
    if pad_id is None:
        return [_classified(model, [probe], 0)[0] for probe in probes]
    return _classified(model, probes, pad_id)


@torch.no_grad()
def read_reward(base: Base, role: str, probes: Sequence[Probe]) -> Reading:
    """The raw scores that `lowrank-align score` gives."""
    rows = [TreeRow(p.ids[: p.start], [Completion(p.ids[p.start :], [True] * (len(p.ids) - p.start))]) for p in probes]
    with base.role(role):
        return [score.reshape(1) for score in base.scores(base.collate(rows)).float().cpu()]


def policy_distance(truth: Reading, other: Reading, probes: Sequence[Probe]) -> Distance:
    """KL(truth || other) and the log-probs of the answers' tokens, over all tokens.

    Greedy texts are compared by their tokens' ranks: two models write the same answer exactly if the second's likeliest
    token is the first's at every place of the first's answer.
    """
    gaps, kls, equal = [], [], 0
    for left, right, probe in zip(truth, other, probes, strict=True):
        tokens = torch.tensor(probe.ids[probe.start :])[:, None]
        gaps.append((left.gather(1, tokens) - right.gather(1, tokens)).abs().flatten())
        kls.append((left.exp().double() * (left.double() - right.double())).sum(-1))
        equal += bool((left.argmax(-1) == right.argmax(-1)).all())
    gap, kl = torch.cat(gaps), torch.cat(kls)
    return Distance(_worst(gap), gap.mean().item(), max(kl.mean().item(), 0.0), equal, len(probes))


def score_distance(truth: Reading, other: Reading) -> Distance:
    """Between the scores of two reward models."""
    gap = (torch.cat(truth) - torch.cat(other)).abs()
    return Distance(_worst(gap), gap.mean().item())


def _asked(question: str, system: str | None = None) -> list[Message]:
    opening = [Message(role="system", content=system)] if system else []
    return [*opening, Message(role="user", content=question)]


def _padded(probes: Sequence[Probe], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    width = max(len(probe.ids) for probe in probes)
    ids = torch.tensor([[*p.ids, *[pad_id] * (width - len(p.ids))] for p in probes], device=device)
    mask = torch.tensor([[1] * len(p.ids) + [0] * (width - len(p.ids)) for p in probes], device=device)
    return ids, mask


def _classified(model: Any, probes: Sequence[Probe], pad_id: int) -> Reading:
    ids, mask = _padded(probes, pad_id, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [score.float().cpu().reshape(1) for score in logits[:, 0]]


def _plain(model: Any) -> Any:
    """The transformers model, whatever PEFT has put around it."""
    get: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    return get() if get is not None else model


def _worst(gap: Tensor) -> float:
    return gap.max().item() if torch.isfinite(gap).all() else math.inf
