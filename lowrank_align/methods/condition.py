"""Reward conditioning: good and bad answers are both learned, each behind a text that says which it is.

-log pi(y_w | x, good) - log pi(y_l | x, bad), and asked behind `good` ever after. This is AlpacaFarm's binary reward
conditioning (arXiv 2305.14387, after the control tokens of Keskar et al., arXiv 1909.05858) and the C-SFT
baseline of chain of hindsight (arXiv 2302.02676). The texts are plain, not new tokens: a frozen base learns none.
Left out: more than two levels (Quark has quantiles), weights for the two sides, rows without a text.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_align.config import ConditionSettings
from lowrank_align.data.assembly import TIE, best_and_worst
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.methods.method import Method
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.completion import nll
from lowrank_align.tensors import reduce
from lowrank_align.trees import TreeRow


class Condition(Method[ConditionSettings, TreeRow]):
    # ---- data

    shapes = frozenset({Shape.pair, Shape.ranking, Shape.unpaired})

    @staticmethod
    def answer_prefix(settings: Any) -> str:
        """The text before the good answers."""
        return str(settings.good_text)

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: ConditionSettings) -> Rendered:
        """The winner and the loser as one tree row, the good one first; a labelled answer alone, its label kept.

        Of a ranking the best and the worst. A tie is dropped, and counted as every dropped row is.
        """
        if row.shape is Shape.unpaired:
            rendered = renderer.tree_row(row, [settings.good_text if row.label else settings.bad_text])
            return replace(rendered, tree=rendered.tree and replace(rendered.tree, label=row.label))
        pair = best_and_worst(row)
        if pair is None:
            return Rendered(None, TIE)
        return renderer.tree_row(pair, [settings.good_text, settings.bad_text])

    # ---- roles

    trained = ("policy",)

    def add_roles(self) -> None:
        self.policy_from_settings()

    # ---- step

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Tokens of the answers: the texts before them are not trained."""
        return float(sum(sum(c.mask) for row in items for c in row.completions))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        batch = self.base.collate(list(items))
        mask = batch.completion_mask
        with self.base.role("policy"):
            policy = self.base.token_scores(batch)
            losses = nll(policy.per_token_logps, mask).loss
            loss = reduce(losses, mask, "token_mean", weight)
            self.backward(loss)
        sides = [side for row in items for side in ((True, False) if row.label is None else (row.label,))]
        good = torch.tensor(sides, device=mask.device)[:, None]
        metrics.mean("loss/good", losses, mask & good)
        metrics.mean("loss/bad", losses, mask & ~good)
        metrics.mean("mean_token_accuracy", policy.is_top, mask)
        metrics.mean("entropy", policy.entropy, mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach()
