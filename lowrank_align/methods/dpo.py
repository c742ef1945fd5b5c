"""Direct preference optimisation: a policy's own log-ratios are the reward (Rafailov et al. 2023, arXiv 2305.18290)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_align.config import DPOSettings
from lowrank_align.data.formats import Shape
from lowrank_align.methods.method import Method, Metrics, assert_policy_is_reference
from lowrank_align.objectives.paired import dpo, mean_per_row
from lowrank_align.trees import TreeRow, collate_comparisons


class DPO(Method[DPOSettings, TreeRow]):
    # ---- data

    shapes = frozenset({Shape.pair, Shape.ranking})

    # ---- roles

    trained = ("policy",)

    def add_roles(self) -> None:
        self.policy_from_settings()
        self.base.add_role("reference", frozen_copy_of="policy")

    # ---- step

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Rows: a ranking's K(K-1)/2 comparisons count as one."""
        return float(len(items))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        s = self.settings
        batch, pairs = self.base.collate(list(items)), collate_comparisons(items, self.base.device)
        with self.base.role("reference"), torch.no_grad():
            ref_logps = self.base.token_scores(batch).logps
        with self.base.role("policy"):
            policy = self.base.token_scores(batch)
            logps, num_tokens = policy.logps, batch.num_tokens
            outcome = dpo(
                logps[pairs.first], logps[pairs.second], ref_logps[pairs.first], ref_logps[pairs.second],
                num_tokens[pairs.first], num_tokens[pairs.second],
                s.beta, s.loss[0], s.label_smoothing, pairs.preference,
            )  # fmt: skip
            loss = mean_per_row(outcome.loss, pairs.row_of, len(items)).sum() / weight
            self.backward(loss)
        chosen = torch.where(pairs.preference >= 0.5, pairs.first, pairs.second)
        rejected = torch.where(pairs.preference >= 0.5, pairs.second, pairs.first)
        metrics.mean("rewards/chosen", outcome.chosen_rewards, outcome.decided)
        metrics.mean("rewards/rejected", outcome.rejected_rewards, outcome.decided)
        metrics.mean("rewards/margins", outcome.margins, outcome.decided)
        metrics.mean("rewards/accuracies", outcome.accuracies, outcome.decided)
        metrics.mean("logps/chosen", logps[chosen], outcome.decided)
        metrics.mean("logps/rejected", logps[rejected], outcome.decided)
        is_of_chosen = batch.completion_mask[chosen] & outcome.decided[:, None]
        metrics.mean("mean_token_accuracy", policy.is_top[chosen], is_of_chosen)
        metrics.mean("entropy", policy.entropy, batch.completion_mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach()

    # ---- before and after

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        assert_policy_is_reference(self.base, rows)
