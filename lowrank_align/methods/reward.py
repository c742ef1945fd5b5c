"""Reward model: scores whose differences explain the preferences (Bradley-Terry; arXiv 2203.02155, eq. 1).

Of rankings the mean over their comparisons, or the likelihood of the whole order (Plackett-Luce).
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_align import adapters
from lowrank_align.adapters import REWARD
from lowrank_align.base import Base
from lowrank_align.config import RewardSettings
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.durable import write_atomic
from lowrank_align.errors import NumericError, UserError
from lowrank_align.methods.method import Method, Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.paired import bradley_terry, centring, mean_per_row
from lowrank_align.objectives.ranked import MOST_TIED, TOO_MANY_TIES, most_tied, whole_orders
from lowrank_align.rollout import Rollout, generator_for, inference, sample
from lowrank_align.runs import RunFolder
from lowrank_align.trees import Completion, TreeRow, collate_comparisons


class Reward(Method[RewardSettings, TreeRow]):
    # ---- data

    shapes = frozenset({Shape.pair, Shape.ranking})

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: RewardSettings) -> Rendered:
        if settings.ranking == "plackett_luce" and most_tied(row.ranks or ()) > MOST_TIED:
            return Rendered(None, TOO_MANY_TIES)
        return renderer.tree_row(row)

    # ---- roles

    trained = ("reward",)

    def add_roles(self) -> None:
        self.policy_from_settings("reward", head=True)

    # ---- step

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Rows: a ranking's K(K-1)/2 comparisons count as one."""
        return float(len(items))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        batch, pairs = self.base.collate(list(items)), collate_comparisons(items, self.base.device)
        with self.base.role("reward"):
            scores = self.base.scores(batch)
            first, second = scores[pairs.first], scores[pairs.second]
            outcome = bradley_terry(first, second, pairs.preference, pairs.target_margin)
            per_row = mean_per_row(outcome.loss, pairs.row_of, len(items))
            if self.settings.ranking == "plackett_luce":
                per_row = whole_orders(per_row, scores, batch.row_of, [row.ranks for row in items])
            centred = centring(first, second, self.settings.centering_coefficient)
            loss = (per_row + mean_per_row(centred, pairs.row_of, len(items))).sum() / weight
            self.backward(loss)
        metrics.mean("accuracy", outcome.accuracies, outcome.decided)
        metrics.mean("margin", outcome.margins, outcome.decided)
        metrics.mean("mean_reward", scores)
        metrics.extreme("min_reward", scores, torch.minimum)
        metrics.extreme("max_reward", scores, torch.maximum)
        return loss.detach()

    # ---- before and after

    def __init__(self, base: Base, settings: RewardSettings, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.shifted_rows = 0
        # what the start adapter answers behind; a reward model itself never sees it
        self.start_prefix_ids = renderer.with_prefix(adapters.answer_prefix(settings.adapter)).prefix_ids

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        """Where the shift is taken over the start adapter's answers, some prompt must leave room for one."""
        if self.settings.shift_over == "reference" and not self._with_room(rows[: self.settings.shift_rows]):
            tokens = self.settings.sample_tokens
            raise UserError(
                f"shift_over reference: no prompt leaves room for {tokens} new tokens; lower --sample-tokens"
            )

    def finish(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """The shift that puts the mean score of the chosen kind of completions at 0."""
        rows = rows[: self.settings.shift_rows]
        if self.settings.shift_over == "chosen":
            rows = [_best_only(row) for row in rows]
        elif self.settings.shift_over == "reference":
            rows = self._answers_of_start(rows)

        def score(mine: Sequence[TreeRow], size: int) -> list[Tensor]:
            with self.base.role("reward"), inference(self.base), torch.no_grad():
                batches = [self.base.collate(list(mine[i : i + size])) for i in range(0, len(mine), size)]
                return [score for batch in batches for score in self.base.scores(batch)]

        role = self.base.roles["reward"]
        shift = torch.stack(self.by_share(rows, score, retry)).double().mean().item()
        if not math.isfinite(shift):
            raise NumericError(f"the mean score over {len(rows)} training rows is {shift}; the model is not saved")
        role.shift, self.shifted_rows = shift, len(rows)
        return {"shift": role.shift}

    def samples(self, rows: Sequence[TreeRow], step: int) -> list[dict[str, Any]]:
        """The scores of these rows' completions."""
        with self.base.role("reward"), inference(self.base), torch.no_grad():
            scores = iter(self.base.scores(self.base.collate(list(rows))).tolist())
        return [
            {
                "prompt": row.prompt_text or self.renderer.decode(row.prompt_ids),
                "completions": [self.renderer.decode(c.ids) for c in row.completions],
                "scores": [next(scores) for _ in row.completions],
            }
            for row in rows
        ]

    def save(self, run: RunFolder) -> str:
        """The adapter with its head as a sequence classifier; the shift lies beside it."""
        digest = self.base.save_role("reward", run.adapter, as_reward=True)
        shift = {"shift": self.base.roles["reward"].shift, "over": self.settings.shift_over, "rows": self.shifted_rows}
        write_atomic(run.path / REWARD, json.dumps(shift, indent=2) + "\n")
        return digest

    def _with_room(self, rows: Sequence[TreeRow]) -> list[TreeRow]:
        room = self.base.context_tokens - self.settings.sample_tokens - len(self.start_prefix_ids)
        return [row for row in rows if len(row.prompt_ids) <= room]

    def _answers_of_start(self, rows: Sequence[TreeRow]) -> list[TreeRow]:
        """Behind the start's own text, which does not stand in the rows that come back."""
        start = self.settings.adapter
        self.base.add_role("start", start_from=start, trainable=False)
        prompts = [row.prompt_ids for row in self._with_room(rows)]
        asked = [[*prompt, *self.start_prefix_ids] for prompt in prompts]

        def answer(mine: Sequence[int]) -> list[list[Rollout]]:
            with self.base.role("start"):
                return sample(
                    self.base,
                    asked,
                    end_ids=self.renderer.end_ids,
                    max_new_tokens=self.settings.sample_tokens,
                    generator=generator_for(self.base.device, self.settings.seed, "shift"),
                    only=mine,
                )

        answers = self.workers.map(range(len(asked)), answer)
        self.base.remove_role("start")
        return [
            TreeRow(prompt, [Completion(a.ids, [True] * len(a.ids))])
            for prompt, (a,) in zip(prompts, answers, strict=True)
        ]


def _best_only(row: TreeRow) -> TreeRow:
    """The row with the completion alone that loses no comparison (the chosen one; of a ranking, the best)."""
    losers = {c.second if c.preference >= 0.5 else c.first for c in row.comparisons}
    best = next((i for i in range(len(row.completions)) if i not in losers), 0)
    return TreeRow(row.prompt_ids, [row.completions[best]], index=row.index)
