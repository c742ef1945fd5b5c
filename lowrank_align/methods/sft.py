"""Supervised fine-tuning: raise the likelihood of demonstrations (InstructGPT's first step, arXiv 2203.02155)."""

from collections.abc import Sequence

from torch import Tensor

from lowrank_align.config import SFTSettings
from lowrank_align.data.formats import Shape
from lowrank_align.methods.method import Method
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.completion import nll
from lowrank_align.tensors import reduce
from lowrank_align.trees import TreeRow


class SFT(Method[SFTSettings, TreeRow]):
    # ---- data

    shapes = frozenset({Shape.demonstration})

    # ---- roles

    trained = ("policy",)

    def add_roles(self) -> None:
        self.policy_from_settings()

    # ---- step

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Tokens: every trained token of the batch weighs the same."""
        return float(sum(sum(c.mask) for row in items for c in row.completions))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        batch = self.base.collate(list(items))
        with self.base.role("policy"):
            policy = self.base.token_scores(batch)
            losses = nll(policy.per_token_logps, batch.completion_mask).loss
            loss = reduce(losses, batch.completion_mask, "token_mean", weight)
            self.backward(loss)
        metrics.mean("mean_token_accuracy", policy.is_top, batch.completion_mask)
        metrics.mean("entropy", policy.entropy, batch.completion_mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach()
