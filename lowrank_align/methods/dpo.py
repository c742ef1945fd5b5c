"""Direct preference optimisation: a policy's own log-ratios are the reward (Rafailov et al. 2023, arXiv 2305.18290).

With it the other losses on pairs (`objectives/paired_losses.py`), one or several with weights, and DPO's Plackett-Luce
form for rankings. Where no loss compares with a reference, there is none.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_align.alarms import LikelihoodWatch
from lowrank_align.base import Base
from lowrank_align.config import DPOSettings
from lowrank_align.config.offline import LOSS_KNOBS, REFERENCE_FREE, SEGMENTS
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.methods.method import Method, Retry, assert_policy_is_reference
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.paired import Side, by_preference, mean_per_row, outcome
from lowrank_align.objectives.paired_losses import paired_loss
from lowrank_align.objectives.ranked import MOST_TIED, TOO_MANY_TIES, most_tied, whole_orders
from lowrank_align.objectives.segments import discounted_sum
from lowrank_align.reference_cache import ReferenceCache
from lowrank_align.scoring import TokenScores
from lowrank_align.trees import Comparisons, TreeBatch, TreeRow, collate_comparisons

BY_LENGTH = frozenset({"simpo", "orpo"})  # their reward is the mean over the answer's tokens


class DPO(Method[DPOSettings, TreeRow]):
    # ---- data

    shapes = frozenset({Shape.pair, Shape.ranking})

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: DPOSettings) -> Rendered:
        if settings.ranking == "plackett_luce" and most_tied(row.ranks or ()) > MOST_TIED:
            return Rendered(None, TOO_MANY_TIES)
        return renderer.tree_row(row)

    # ---- roles

    trained = ("policy",)

    def __init__(self, base: Base, settings: DPOSettings, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.displacement = LikelihoodWatch()
        self.reference_cache: ReferenceCache | None = None

    def add_roles(self) -> None:
        self.policy_from_settings()
        if self.settings.needs_reference:
            self.base.add_role("reference", frozen_copy_of="policy")
            if self.settings.cache_reference:
                self.reference_cache = ReferenceCache(self.base, "reference")

    # ---- step

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Rows: a ranking's K(K-1)/2 comparisons count as one."""
        return float(len(items))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        batch, pairs = self.base.collate(list(items)), collate_comparisons(items, self.base.device)
        reference = self._reference_logps(items, batch)
        with self.base.role("policy"):
            policy = self.base.token_scores(batch)
            answers = Side(policy.per_token_logps, batch.completion_mask, reference)
            losses = self._losses(answers, pairs, metrics)
            per_row = mean_per_row(losses, pairs.row_of, len(items))
            if self.settings.ranking == "plackett_luce":
                rewards = self.settings.beta * answers.logratios
                per_row = whole_orders(per_row, rewards, batch.row_of, [row.ranks for row in items])
            loss = per_row.sum() / weight
            self.backward(loss)
        self._measure(answers, policy, pairs, metrics)
        metrics.mean("entropy", policy.entropy, batch.completion_mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach()

    def _reference_logps(self, items: Sequence[TreeRow], batch: TreeBatch) -> Tensor | None:
        """(N, C) of all completions; None where no loss asks for it."""
        if not self.settings.needs_reference:
            return None
        if self.reference_cache is not None:
            return self.reference_cache.token_logps(items)
        with self.base.role("reference"):
            return self.base.token_logps(batch)

    def _losses(self, answers: Side, pairs: Comparisons, metrics: Metrics) -> Tensor:
        """(P,) the weighted sum of the losses; of several each goes into the metrics too."""
        s, first, second = self.settings, answers.at(pairs.first), answers.at(pairs.second)
        total = torch.zeros(len(pairs.first), device=self.base.device)
        for name, coefficient in zip(s.loss, s.loss_weights or [1.0] * len(s.loss), strict=True):
            knobs = {knob: getattr(s, knob) for knob in LOSS_KNOBS[name]}
            losses = by_preference(partial(paired_loss(name), **knobs), first, second, pairs.preference)
            total = total + coefficient * losses
            if len(s.loss) > 1:
                metrics.mean(f"loss/{name}", losses)
        return total

    @torch.no_grad()
    def _measure(self, answers: Side, policy: TokenScores, pairs: Comparisons, metrics: Metrics) -> None:
        """The rewards are the first loss's, see `_rewards`."""
        logps, decided = answers.logps, pairs.preference != 0.5
        rewards = self._rewards(answers)
        seen = outcome(rewards[pairs.first], rewards[pairs.second], pairs.preference)
        metrics.mean("rewards/chosen", seen.chosen, decided)
        metrics.mean("rewards/rejected", seen.rejected, decided)
        metrics.mean("rewards/margins", seen.margins, decided)
        metrics.mean("rewards/accuracies", seen.accuracies, decided)
        chosen = torch.where(pairs.preference >= 0.5, pairs.first, pairs.second)
        rejected = torch.where(pairs.preference >= 0.5, pairs.second, pairs.first)
        metrics.mean("logps/chosen", logps[chosen], decided)
        metrics.mean("logps/rejected", logps[rejected], decided)
        metrics.mean("nll_loss", -answers.per_token_mean(logps)[chosen], decided)
        metrics.mean("mean_token_accuracy", policy.is_top[chosen], answers.mask[chosen] & decided[:, None])

    def _rewards(self, answers: Side) -> Tensor:
        """(N,) beta times the log-ratio; without a reference, times the log-probability (or its mean).

        Where contrastive preference learning stands first, which has no beta: its S, without lambda.
        """
        s, first = self.settings, self.settings.loss[0]
        if first in SEGMENTS:
            per_token = answers.per_token_logps if first in REFERENCE_FREE else answers.per_token_logratios
            return self._price * discounted_sum(per_token, answers.mask, s.cpl_gamma)
        if answers.ref_per_token_logps is not None:
            return self._price * answers.logratios
        return self._price * (answers.per_token_mean(answers.logps) if first in BY_LENGTH else answers.logps)

    @property
    def _price(self) -> float:
        """What a nat of the reward is multiplied by."""
        return self.settings.cpl_alpha if self.settings.loss[0] in SEGMENTS else self.settings.beta

    def watch(self, figures: dict[str, float]) -> dict[str, float]:
        """Whether the chosen answers become unlikely: by the reward where it compares with the start, else a token."""
        s, first = self.settings, self.settings.loss[0]
        if "rewards/margins" not in figures:  # a batch of ties
            return {}
        if s.needs_reference and first != "cpl":
            chosen, gained = figures["logps/chosen"], figures["rewards/chosen"] / self._price
            begins = self.displacement.add(chosen, figures["rewards/margins"], chosen - gained)
        else:
            begins = self.displacement.add(-figures["nll_loss"], figures["rewards/margins"])
        return self.sound(self.displacement, begins)

    # ---- before and after

    def state(self) -> dict[str, Any]:
        return {"displacement": self.displacement.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.displacement.load_state_dict(state.get("displacement", {}))

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        if self.settings.needs_reference:
            assert_policy_is_reference(self.base, rows)

    def finish(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        if self.reference_cache is not None:
            self.reference_cache.save()
        return {}
