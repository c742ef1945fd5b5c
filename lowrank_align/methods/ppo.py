"""Proximal policy optimisation of a reward (arXiv 1707.06347, for language 1909.08593; details of 2403.17031).

Policy and value have an adapter each, the reference is a frozen copy, the reward model a fourth adapter: one base.
With `pretrain_data` it is PPO-ptx (2203.02155): the likelihood of texts is kept up beside the reward.
Left out: reward whitening, several rollouts a prompt.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank_align.base import Base
from lowrank_align.config import PPOSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.memory import release_unused
from lowrank_align.methods.method import PretrainRow, Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import OnlineMethod, group_row
from lowrank_align.objectives.rollout import AdaptiveKL, per_token_rewards, ppo_policy_loss, ppo_value_loss
from lowrank_align.rollout import Rollout, generator_for
from lowrank_align.runs import RunFolder
from lowrank_align.tensors import gae, reduce, whiten
from lowrank_align.trees import TreeRow, longest_rows


@dataclass(frozen=True)
class Episode:
    """One rollout with what the old policy and the old value model said about its T tokens; all tensors (T,)."""

    row: TreeRow
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor  # whitened over the step's rollouts
    returns: Tensor
    text: PretrainRow | None = None  # PPO-ptx: what is learned beside it


class PPO(OnlineMethod[PPOSettings, Episode]):
    # ---- roles

    trained = ("policy", "value")

    def __init__(self, base: Base, settings: PPOSettings, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.kl = AdaptiveKL(settings.kl_coefficient, settings.target_kl or 1.0, settings.kl_horizon)

    def add_roles(self) -> None:
        super().add_roles()
        if runs := self.settings.reward_runs:
            self.base.add_role("value", start_from=runs[0])
        else:
            self.policy_from_settings("value", head=True)

    def learning_rates(self) -> dict[str, float]:
        rate = self.settings.learning_rate
        return {"policy": rate, "value": self.settings.value_learning_rate or 2 * rate}

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[Episode]]:
        """Rollouts once, then `ppo_epochs` passes over them in minibatches, in a new order each time."""
        s = self.settings
        groups = self.roll_out(rows, step, retry)
        episodes, self.measured = self._episodes(rows, groups, retry)
        if s.target_kl is not None:
            self.kl.update(self.measured["objective/kl"], len(groups))
        release_unused()
        order = generator_for(torch.device("cpu"), s.seed, step, "minibatches")
        update = itertools.count()
        for _ in range(s.ppo_epochs):
            for places in torch.randperm(len(episodes), generator=order).tensor_split(self._minibatches(len(rows))):
                yield self._with_texts([episodes[i] for i in places.tolist()], step, next(update))

    @property
    def updates_per_step(self) -> int:
        return self.settings.ppo_epochs * self._minibatches(self.settings.batch_size)

    def weight(self, items: Sequence[Episode]) -> float:
        """Tokens of the minibatch."""
        return float(sum(len(episode.old_logps) for episode in items))

    def step(self, items: Sequence[Episode], weight: float, metrics: Metrics) -> Tensor:
        s = self.settings
        batch = self.base.collate([episode.row for episode in items])
        mask = batch.completion_mask
        old_logps, old_values, advantages, returns = (
            pad_sequence([getattr(episode, name) for episode in items], batch_first=True)
            for name in ("old_logps", "old_values", "advantages", "returns")
        )
        with self.base.role("policy"):
            scores = self.base.token_scores(batch, temperature=s.temperature)
            policy = ppo_policy_loss(scores.per_token_logps, old_logps, advantages, mask, s.clip_range)
            policy_loss = reduce(policy.loss, mask, "token_mean", weight)
            self.backward(policy_loss)
        release_unused()  # on CPU the heap of the policy's pass would otherwise lie beside that of the value's
        with self.base.role("value"):
            values = self.base.values(batch)
            value = ppo_value_loss(values, old_values, returns, mask, s.clip_range_value)
            value_loss = s.value_coefficient * reduce(value.loss, mask, "token_mean", weight)
            self.backward(value_loss)
        text_loss = self.pretrain_step([episode.text for episode in items if episode.text], metrics)
        metrics.mean("loss/policy_avg", policy.loss, mask)
        metrics.mean("loss/value_avg", value.loss, mask)
        metrics.mean("policy/approxkl_avg", policy.approx_kl, mask)
        metrics.mean("policy/clipfrac_avg", policy.clipped, mask)
        metrics.mean("policy/entropy_avg", scores.entropy, mask)
        metrics.mean("val/clipfrac_avg", value.clipped, mask)
        metrics.mean("val/ratio", policy.ratio, mask)
        return (policy_loss + value_loss).detach() + text_loss

    def _with_texts(self, episodes: list[Episode], step: int, update: int) -> list[Episode]:
        """A minibatch with a row of `pretrain_data` beside each episode, where there is such data."""
        texts = self.draw_pretrain_rows(len(episodes), step, update)
        return [replace(e, text=text) for e, text in zip(episodes, texts, strict=True)] if texts else episodes

    @torch.no_grad()
    def _episodes(
        self, rows: Sequence[TreeRow], groups: list[list[Rollout]], retry: Retry
    ) -> tuple[list[Episode], dict[str, float]]:
        """Old log-probs by the training path, reference, values and scores; from them rewards and advantages."""
        s, trees, coefficient = self.settings, [group_row(group) for group in groups], self.kl.coefficient
        judged = self.judge(rows, groups, retry)
        logps, ref_logps, values, mask = self._said(trees, retry)
        rewards = per_token_rewards(judged.scores, logps, ref_logps, mask, coefficient)
        advantages, returns = gae(rewards.rewards, values, mask, s.gamma, s.gae_lambda)
        advantages = whiten(advantages, mask)
        columns, lengths = (logps, values, advantages, returns), mask.sum(1)
        episodes = [Episode(tree, *_cut(columns, i, int(lengths[i]))) for i, tree in enumerate(trees)]
        kl = rewards.kl.sum(1)
        return episodes, self.measure(judged, kl) | {
            "objective/rlhf_reward": rewards.rewards.sum(1).mean().item(),
            "objective/non_score_reward": -coefficient * kl.mean().item(),
            "objective/entropy": -logps.sum(1).mean().item(),
            "objective/kl_coefficient": coefficient,
        }

    def _said(self, trees: list[TreeRow], retry: Retry) -> list[Tensor]:
        """Log-probs, reference log-probs, values and mask of the rollouts, (N, T) each."""

        def score(mine: Sequence[TreeRow], size: int) -> list[tuple[Tensor, ...]]:
            found: list[tuple[Tensor, ...]] = []
            for start in range(0, len(mine), size):
                batch = self.base.collate(list(mine[start : start + size]))
                with self.base.role("policy"):
                    logps = self.base.token_logps(batch, temperature=self.settings.temperature)
                with self.base.role("reference"):
                    ref_logps = self.base.token_logps(batch, temperature=self.settings.temperature)
                with self.base.role("value"):
                    values = self.base.values(batch)
                columns = (logps, ref_logps, values, batch.token_mask)
                found += [tuple(c[i, :length] for c in columns) for i, length in enumerate(batch.num_tokens.tolist())]
                self.base.turns.give_way()
            return found

        found = self.by_share(trees, score, retry)
        return [pad_sequence([part[i] for part in found], batch_first=True) for i in range(4)]

    def _minibatches(self, rows: int) -> int:
        return min(self.settings.minibatches, rows)

    # ---- evaluation

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """Score and KL of rollouts on held-out prompts."""
        return self._episodes(rows, self.roll_out(rows, "evaluation", retry), retry)[1]

    # ---- before and after

    def state(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()} | super().state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        super().load_state(state)

    def preflight_items(self, trees: list[TreeRow]) -> list[Episode]:
        zeros = torch.zeros(self.settings.max_new_tokens, device=self.base.device)
        texts: list[PretrainRow | None] = [PretrainRow(row, 1) for row in longest_rows(self.pretrain_rows, len(trees))]
        texts += [None] * (len(trees) - len(texts))
        return [Episode(tree, zeros, zeros, zeros, zeros, text) for tree, text in zip(trees, texts, strict=True)]

    def save(self, run: RunFolder) -> str:
        """`adapter/` is the policy, `value/` the critic with its head."""
        self.base.save_role("value", run.value, as_reward=True)
        return self.base.save_role("policy", run.adapter)


def _cut(
    columns: tuple[Tensor, Tensor, Tensor, Tensor], row: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row of each column, without its padding."""
    a, b, c, d = columns
    return a[row, :length], b[row, :length], c[row, :length], d[row, :length]
