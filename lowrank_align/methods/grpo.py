"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): the answers of a prompt are the baseline.

With `reduction: token_mean` and `clip_range_high` it is DAPO's loss (arXiv 2503.14476), with `ratio: sequence` and
`reduction: sequence_mean` GSPO's (2507.18071), with `scale: none` Dr. GRPO's advantage (2503.20783).
Left out: a reference that is renewed on the way, DAPO's drawing of new groups for those without variance.
"""

from collections.abc import Sequence

from torch import Tensor

from lowrank_align.config import GRPOSettings
from lowrank_align.methods.grouped import Group, GroupedMethod
from lowrank_align.methods.method import Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import Judged
from lowrank_align.objectives.groups import group_advantages
from lowrank_align.objectives.rollout import GroupLoss, grpo_loss
from lowrank_align.tensors import masked, reduce
from lowrank_align.trees import TreeRow


class GRPO(GroupedMethod[GRPOSettings]):
    # ---- roles

    trained = ("policy",)

    # ---- step

    def groups(self, trees: list[TreeRow], judged: Judged, retry: Retry) -> list[Group]:
        advantages = group_advantages(self.grouped(judged.scores), self.settings.scale).advantages
        # with one update a step the policy that is trained is the one that drew: no pass for the old log-probs
        old_logps = self.logps_of("policy", trees, retry) if self.updates_per_step > 1 else None
        ref_logps = self.logps_of("reference", trees, retry) if self.settings.needs_reference else None
        kl = None
        if old_logps is not None and ref_logps is not None:
            kl = (old_logps - ref_logps).sum(dim=1)
        self.measured = self.measure(judged, kl)
        return self.as_groups(trees, advantages, old_logps, ref_logps)

    def weight(self, items: Sequence[Group]) -> float:
        """Tokens, or with `reduction: sequence_mean` answers."""
        answers = [completion for group in items for completion in group.row.completions]
        if self.settings.reduction == "sequence_mean":
            return float(len(answers))
        return float(sum(len(completion.ids) for completion in answers))

    def step(self, items: Sequence[Group], weight: float, metrics: Metrics) -> Tensor:
        s, these = self.settings, self.as_tensors(items)
        mask = these.batch.completion_mask
        with self.base.role("policy"):
            scores = self.base.token_scores(these.batch, temperature=s.temperature)
            logps = scores.per_token_logps
            old_logps = logps.detach() if these.old_logps is None else these.old_logps
            outcome = grpo_loss(
                logps, old_logps, these.ref_logps, these.advantages, mask, beta=s.beta,
                clip_range=s.clip_range, clip_range_high=s.clip_range_high, ratio=s.ratio,
            )  # fmt: skip
            loss = reduce(outcome.loss, mask, s.reduction, weight)
            self.backward(loss)
        seen = GroupLoss(*(field[:, 0] for field in outcome)) if s.ratio == "sequence" else outcome
        self.measure_step(seen, scores, mask, metrics)
        if these.ref_logps is not None:
            metrics.mean("kl", outcome.kl, mask)
            if these.old_logps is None:  # else measured when they were drawn, by the policy that drew them
                metrics.mean("objective/kl", masked(logps - these.ref_logps, mask).sum(dim=1))
        return loss.detach()
