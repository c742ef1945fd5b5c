"""Chain of hindsight: both answers in one sequence, with words that say which is better (arXiv 2302.02676).

    prompt, A good answer: {good}, a worse answer: {bad} [end]

The later answer sees the earlier: a chain, so one completion of its tree row. -log pi of both answers' tokens, none on
the words of feedback, whose wording and order are drawn for each row; the end token stands, and is trained, where the
chain ends. Some past tokens are hidden from attention, lest the later answer copy the earlier (section 3 of the paper;
forgetful causal masking, arXiv 2210.13432). `pretrain_data` keeps up the likelihood of texts, the paper's regulariser.
Left out: more than two answers, wordings written by a model, feedback that says more than which is better.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_align.config import CoHSettings
from lowrank_align.data.assembly import TIE, best_and_worst
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.errors import UserError
from lowrank_align.methods.method import Method, PretrainRow, Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.completion import nll
from lowrank_align.probe import hides_tokens
from lowrank_align.rollout import generator_for
from lowrank_align.tensors import reduce
from lowrank_align.trees import Completion, TreeRow, longest_rows

# (words before the first answer, words before the second, whether the good one comes first)
WORDINGS = (
    ("A good answer: ", ", a worse answer: ", True),
    ("A bad answer: ", ", a good answer: ", False),
    ("You are a helpful assistant: ", ", you are an unhelpful assistant: ", True),
    ("You are an unhelpful assistant: ", ", you are a helpful assistant: ", False),
    ("A good answer is ", ", a bad answer is ", True),
    ("A bad answer is ", ", a good answer is ", False),
)
PREFIX = WORDINGS[0][0]  # answers are asked for as the good one that begins a chain
NO_ROOM_FOR_BOTH = "there is no room for both answers in one chain"


@dataclass(frozen=True)
class Chain:
    """A row of one step, with a row of `pretrain_data` beside it where there is one."""

    row: TreeRow
    text: PretrainRow | None = None


class CoH(Method[CoHSettings, Chain]):
    # ---- data

    shapes = frozenset({Shape.pair, Shape.ranking})

    @staticmethod
    def answer_prefix(settings: Any) -> str:
        """The words before a good answer that begins a chain."""
        return PREFIX

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: CoHSettings) -> Rendered:
        """The winner and the loser (of a ranking the best and the worst) as one chain; a tie is dropped, and counted.

        The wording is drawn by seed and row. A chain is cut at `max_length` within its second answer, or dropped.
        """
        pair = best_and_worst(row)
        if pair is None:
            return Rendered(None, TIE)
        draw = generator_for(torch.device("cpu"), settings.seed, row.index, "wording")
        first, second, good_first = WORDINGS[int(torch.randint(len(WORDINGS), (1,), generator=draw))]
        answers = pair.completions if good_first else pair.completions[::-1]
        rendered = renderer.tree_row(replace(pair, completions=list(answers)), [first, second])
        if rendered.tree is None:
            return rendered
        before, after = rendered.tree.completions
        before = renderer.without_end(before)
        room = renderer.max_length - len(rendered.tree.prompt_ids) - len(before.ids)
        if rendered.cut_tokens[0] or not any(after.mask[: max(room, 0)]):
            return Rendered(None, NO_ROOM_FOR_BOTH, notes=rendered.notes)
        chain = Completion([*before.ids, *after.ids[:room]], [*before.mask, *after.mask[:room]])
        cut = rendered.cut_tokens[1] + max(len(after.ids) - room, 0)
        return replace(rendered, tree=replace(rendered.tree, completions=[chain], comparisons=()), cut_tokens=(cut,))

    # ---- roles

    trained = ("policy",)

    def add_roles(self) -> None:
        self.policy_from_settings()

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[Chain]]:
        """The rows, each with its own share of hidden tokens, from 0 up to `hidden_tokens`."""
        draw = generator_for(torch.device("cpu"), self.settings.seed, step, "hidden")
        texts: list[PretrainRow | None] = [*self.draw_pretrain_rows(len(rows), step)]
        texts = texts or [None] * len(rows)
        yield [Chain(self._forgetful(row, draw), text) for row, text in zip(rows, texts, strict=True)]

    def weight(self, items: Sequence[Chain]) -> float:
        """Tokens of the answers: the words of feedback are not trained."""
        return float(sum(sum(c.mask) for item in items for c in item.row.completions))

    def step(self, items: Sequence[Chain], weight: float, metrics: Metrics) -> Tensor:
        batch = self.base.collate([item.row for item in items])
        mask = batch.completion_mask
        with self.base.role("policy"):
            policy = self.base.token_scores(batch)
            losses = nll(policy.per_token_logps, mask).loss
            loss = reduce(losses, mask, "token_mean", weight)
            self.backward(loss)
        text_loss = self.pretrain_step([item.text for item in items if item.text], metrics)
        metrics.mean("loss/chain", losses, mask)
        metrics.mean("mean_token_accuracy", policy.is_top, mask)
        metrics.mean("entropy", policy.entropy, mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach() + text_loss

    def _forgetful(self, row: TreeRow, draw: torch.Generator) -> TreeRow:
        """With a share of its tokens hidden, never the first, which attention rests on."""
        (chain,) = row.completions
        length = len(row.prompt_ids)
        share = torch.rand(1, generator=draw) * self.settings.hidden_tokens
        hidden = (torch.rand(length + len(chain.ids), generator=draw) < share).tolist()
        hidden[0] = False
        return replace(row, prompt_hidden=hidden[:length], completions=[replace(chain, hidden=hidden[length:])])

    # ---- evaluation

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """The chains' loss on held-out rows, nothing hidden."""
        return super().evaluate([Chain(row) for row in rows], retry)  # type: ignore[misc]

    # ---- before and after

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        if self.settings.hidden_tokens and not hides_tokens(self.base):
            raise UserError(
                f"hidden_tokens: {self.base.name} remembers tokens otherwise than by attention; take --hidden-tokens 0"
            )

    def preflight(self, rows: Sequence[TreeRow]) -> None:
        texts: list[PretrainRow | None] = [PretrainRow(row, 1) for row in longest_rows(self.pretrain_rows, len(rows))]
        texts += [None] * (len(rows) - len(texts))
        items = [Chain(row, text) for row, text in zip(rows, texts, strict=True)]
        self.step(items, self.weight(items), Metrics())
