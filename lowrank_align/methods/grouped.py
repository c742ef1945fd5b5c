"""What GRPO and RLOO share: groups of answers that are each other's baseline, and minibatches of whole groups."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lowrank_align.config import GRPOSettings, RLOOSettings
from lowrank_align.memory import release_unused
from lowrank_align.methods.method import Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import Judged, OnlineMethod, group_row
from lowrank_align.objectives.rollout import GroupLoss
from lowrank_align.rollout import generator_for
from lowrank_align.scoring import TokenScores
from lowrank_align.trees import TreeBatch, TreeRow

GroupSettingsT = TypeVar("GroupSettingsT", GRPOSettings, RLOOSettings)


@dataclass(frozen=True)
class Group:
    """A prompt with its G answers as one row, and what was said about them when they were drawn."""

    row: TreeRow
    advantages: Tensor  # (G,)
    old_logps: Tensor | None  # (G, T) of the policy that drew them; None where it is the one that is trained
    ref_logps: Tensor | None  # (G, T); None without a reference


@dataclass(frozen=True)
class Minibatch:
    """Some groups as tensors; N answers of at most T tokens."""

    batch: TreeBatch
    advantages: Tensor  # (N,)
    old_logps: Tensor | None  # (N, T)
    ref_logps: Tensor | None  # (N, T)


class GroupedMethod(OnlineMethod[GroupSettingsT, Group]):
    """A policy gradient whose baseline is the group: rollouts once a step, then passes over them."""

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[Group]]:
        """Rollouts once, then `inner_epochs` passes over them in minibatches of whole groups, in a new order each."""
        rollouts = self.roll_out(rows, step, retry)
        judged = self.judge(rows, rollouts, retry)
        groups = self.groups([group_row(group) for group in rollouts], judged, retry)
        release_unused()
        order = generator_for(torch.device("cpu"), self.settings.seed, step, "minibatches")
        for _ in range(self.settings.inner_epochs):
            for places in torch.randperm(len(groups), generator=order).tensor_split(self._minibatches(len(rows))):
                yield [groups[i] for i in places.tolist()]

    @property
    def updates_per_step(self) -> int:
        return self.settings.inner_epochs * self._minibatches(self.settings.batch_size)

    @abstractmethod
    def groups(self, trees: list[TreeRow], judged: Judged, retry: Retry) -> list[Group]:
        """Advantages, and the log-probs that the loss compares with; measures the round."""

    def as_groups(
        self, trees: list[TreeRow], advantages: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None
    ) -> list[Group]:
        """`advantages` (B, G) and log-probs (B * G, T) cut into the prompts' groups."""
        olds, refs = (
            [None] * len(trees) if logps is None else logps.split(self.group_size) for logps in (old_logps, ref_logps)
        )
        return [Group(*parts) for parts in zip(trees, advantages, olds, refs, strict=True)]

    def as_tensors(self, items: Sequence[Group]) -> Minibatch:
        """The groups side by side."""
        batch = self.base.collate([group.row for group in items])
        width = batch.completion_mask.shape[1]

        def joined(parts: list[Tensor | None]) -> Tensor | None:
            found = [part[:, :width] for part in parts if part is not None]
            return torch.cat(found) if found else None

        return Minibatch(
            batch,
            torch.cat([group.advantages for group in items]),
            joined([group.old_logps for group in items]),
            joined([group.ref_logps for group in items]),
        )

    def measure_step(self, outcome: GroupLoss, scores: TokenScores, mask: Tensor, metrics: Metrics) -> None:
        """TRL's figures about an update; of a loss per answer, per answer."""
        over = mask if outcome.ratio.dim() > 1 else None
        metrics.mean("policy/ratio", outcome.ratio, over)
        metrics.mean("clip_ratio/low_mean", outcome.clipped_low, over)
        metrics.mean("clip_ratio/high_mean", outcome.clipped_high, over)
        metrics.mean("clip_ratio/region_mean", outcome.clipped_low + outcome.clipped_high, over)
        metrics.mean("entropy", scores.entropy, mask)

    def _minibatches(self, rows: int) -> int:
        return min(self.settings.minibatches, rows)

    # ---- before and after

    def preflight_items(self, trees: list[TreeRow]) -> list[Group]:
        zeros = torch.zeros(len(trees) * self.group_size, self.settings.max_new_tokens, device=self.base.device)
        reference = zeros if self.settings.needs_reference else None
        return self.as_groups(trees, self.grouped(zeros[:, 0]), zeros, reference)
