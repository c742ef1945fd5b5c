"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740): the whole answer is one action.

The KL to the reference (k1) is taken off the score, as PPO does it, not put into the loss as GRPO does.
Left out: advantages normalised over the batch.
"""

from collections.abc import Sequence

from torch import Tensor

from lowrank_align.config import RLOOSettings
from lowrank_align.methods.grouped import Group, GroupedMethod
from lowrank_align.methods.method import Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import Judged
from lowrank_align.objectives.groups import leave_one_out
from lowrank_align.objectives.rollout import rloo_loss
from lowrank_align.trees import TreeRow


class RLOO(GroupedMethod[RLOOSettings]):
    # ---- roles

    trained = ("policy",)

    # ---- step

    def groups(self, trees: list[TreeRow], judged: Judged, retry: Retry) -> list[Group]:
        s = self.settings
        old_logps = self.logps_of("policy", trees, retry)
        kl = None
        scores = judged.scores
        if s.needs_reference:
            kl = (old_logps - self.logps_of("reference", trees, retry)).sum(dim=1)
            scores = scores - s.beta * kl
        self.measured = self.measure(judged, kl) | {"objective/rlhf_reward": scores.mean().item()}
        return self.as_groups(trees, leave_one_out(self.grouped(scores)).advantages, old_logps, None)

    def weight(self, items: Sequence[Group]) -> float:
        """Answers."""
        return float(sum(len(group.row.completions) for group in items))

    def step(self, items: Sequence[Group], weight: float, metrics: Metrics) -> Tensor:
        s, these = self.settings, self.as_tensors(items)
        mask = these.batch.completion_mask
        with self.base.role("policy"):
            scores = self.base.token_scores(these.batch, temperature=s.temperature)
            assert these.old_logps is not None
            outcome = rloo_loss(scores.per_token_logps, these.old_logps, these.advantages, mask, s.clip_range)
            loss = outcome.loss.sum() / weight
            self.backward(loss)
        self.measure_step(outcome, scores, mask, metrics)
        return loss.detach()
