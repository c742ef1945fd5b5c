"""The answers that are compared: sampled from a role, or the data's own; and what they are worth to those who score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lowrank_align.base import Base
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, Shape, Text
from lowrank_align.errors import UserError
from lowrank_align.rewards import Rewards, seen_answer
from lowrank_align.rollout import Rollout, generator_for, sample
from lowrank_align.trees import Completion, TreeRow

REFERENCE = "reference"  # the data's own answers
WITH_REFERENCE = (Shape.demonstration, Shape.pair, Shape.ranking)


@dataclass(frozen=True)
class Asked:
    """One prompt, and the data's own answer to it where there is one."""

    row: Row  # prompt alone
    prompt_ids: list[int]  # at least one token, without any prefix
    text: str  # what functions and other judges are given, see `rewards.seen_prompt`
    reference: Text | None = None


@dataclass(frozen=True)
class Side:
    """One voice's answer to every prompt, in the order of the prompts."""

    name: str
    texts: list[str]
    trees: list[TreeRow]  # the prompt without a prefix, and the answer: what a reward model reads
    rollouts: list[Rollout] | None = None  # as drawn, with a prefix in the prompt where the voice has one
    prefix: str = ""

    @property
    def tokens(self) -> list[int]:
        return [len(tree.completions[0].ids) for tree in self.trees]

    @property
    def finished(self) -> float | None:
        """Share of sampled answers that ended by themselves."""
        return None if self.rollouts is None else sum(r.finished for r in self.rollouts) / len(self.rollouts)


def reference_of(row: Row) -> tuple[Row, Text]:
    """The prompt of a demonstration, pair or ranking, and the answer that its data prefers.

    UserError where it has none: a `text` without a prompt, a pair that is a tie, a ranking with two at the top.
    """
    if row.shape is Shape.demonstration and not row.prompt:
        whole = row.completions[0]
        if isinstance(whole, str):
            raise UserError(f"{row.where}: text: a text without a prompt has nothing to answer")
        start = max(i for i, message in enumerate(whole) if message["role"] != "assistant") + 1
        return replace(row, prompt=whole[:start], completions=[], shape=Shape.prompts), whole[start:]
    best = 0
    if row.shape is Shape.pair:
        if row.preference == 0.5:
            raise UserError(f"{row.where}: preference: a tie has no better answer to compare with")
        best = 0 if row.preference > 0.5 else 1
    elif row.ranks is not None:
        best = row.ranks.index(min(row.ranks))
        if row.ranks.count(min(row.ranks)) > 1:
            raise UserError(f"{row.where}: ranks: several first, so no one answer to compare with")
    return replace(row, completions=[], shape=Shape.prompts, ranks=None), row.completions[best]


def answer_text(answer: Text) -> str:
    """What is said in an answer."""
    return answer if isinstance(answer, str) else "\n\n".join(str(message["content"]) for message in answer)


def conversation_text(prompt: Text) -> str:
    """A whole prompt for a judge that reads: of a conversation of several turns, who said what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def draw(
    base: Base,
    role: str,
    name: str,
    renderer: Renderer,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Side:
    """One answer a prompt from `role`; `renderer` has the prefix that the role was trained to answer behind.

    Every voice draws with a generator of its own name, so that the order in which they are asked does not matter.
    """
    with base.role(role):
        groups = sample(
            base,
            [[*one.prompt_ids, *renderer.prefix_ids] for one in asked],
            end_ids=renderer.end_ids,
            max_new_tokens=max_new_tokens,
            generator=generator_for(base.device, seed, role, "evaluation"),
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
        )
    rollouts = [group[0] for group in groups]
    texts = [
        seen_answer(renderer, r.ids, chat=not isinstance(one.row.prompt, str))
        for r, one in zip(rollouts, asked, strict=True)
    ]
    trees = [tree(one.prompt_ids, r.ids) for one, r in zip(asked, rollouts, strict=True)]
    return Side(name, texts, trees, rollouts, renderer.answer_prefix)


def references(renderer: Renderer, asked: Sequence[Asked]) -> Side:
    """The data's own answers; UserError for one that cannot be tokenised."""
    texts, trees = [], []
    for one in asked:
        assert one.reference is not None
        rendered = renderer.tree_row(replace(one.row, completions=[one.reference], shape=Shape.demonstration))
        if rendered.tree is None:
            raise UserError(f"{one.row.where}: its own answer cannot be used: {rendered.dropped}")
        texts.append(answer_text(one.reference))
        trees.append(rendered.tree)
    return Side(REFERENCE, texts, trees)


def scores_of(rewards: Rewards, asked: Sequence[Asked], side: Side, size: int) -> dict[str, list[float]]:
    """Each reward run's shifted score and each function's score of every answer, by name; `size` rows at once."""
    found = rewards.of_trees(side.trees, size)
    found |= rewards.of_texts([one.text for one in asked], side.texts)
    return {name: scores.tolist() for name, scores in found.items()}


@torch.no_grad()
def summed_logps(
    base: Base, role: str, trees: Sequence[TreeRow], size: int, tell: Callable[[], None] = lambda: None
) -> tuple[list[float], list[int]]:
    """Of every row's completions together: log-probability in nats under `role`, and how many tokens that is."""
    logps, tokens = [], []
    for start in range(0, len(trees), size):
        part = list(trees[start : start + size])
        batch = base.collate(part)
        with base.role(role):
            found = base.token_scores(batch).logps.double().tolist()
        counts = batch.completion_mask.sum(1).tolist()
        at = 0
        for row in part:
            end = at + len(row.completions)
            logps.append(sum(found[at:end]))
            tokens.append(int(sum(counts[at:end])))
            at = end
        tell()
    return logps, tokens


def tree(prompt_ids: list[int], ids: list[int]) -> TreeRow:
    """A prompt with one answer, all of whose tokens count."""
    return TreeRow(prompt_ids, [Completion(ids, [True] * len(ids))])
