"""Proximal policy optimisation of a reward (arXiv 1707.06347, for language 1909.08593; details of 2403.17031).

Policy and value have an adapter each, the reference is a frozen copy, the reward model a fourth adapter: one base.
Left out: PPO-ptx, reward whitening, several rollouts a prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank_align.base import Base
from lowrank_align.config import PPOSettings
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.memory import release_unused
from lowrank_align.methods.method import Method, Metrics, Retry, assert_policy_is_reference
from lowrank_align.objectives.rollout import (
    AdaptiveKL,
    penalise_unfinished,
    per_token_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)
from lowrank_align.rewards import is_function, load_function
from lowrank_align.rollout import Rollout, fill_cache, generator_for, sample
from lowrank_align.runs import RunFolder
from lowrank_align.tensors import gae, reduce, whiten
from lowrank_align.trees import Completion, TreeRow, longest_rows


@dataclass(frozen=True)
class Episode:
    """One rollout with what the old policy and the old value model said about its T tokens; all tensors (T,)."""

    row: TreeRow
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor  # whitened over the step's rollouts
    returns: Tensor


class PPO(Method[PPOSettings, Episode]):
    # ---- data

    shapes = frozenset({Shape.prompts})

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: PPOSettings) -> Rendered:
        ids = renderer.prompt_ids(row)
        if len(ids) + settings.max_new_tokens > settings.max_length:
            return Rendered(None, f"prompt of {len(ids)} tokens leaves no room for {settings.max_new_tokens} new ones")
        # what a reward function sees: the prompt as the row has it; of a conversation, what was said last
        text = row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1]["content"])
        return Rendered(TreeRow(ids, [], index=row.index, prompt_text=text))

    # ---- roles

    trained = ("policy", "value")

    def __init__(self, base: Base, settings: PPOSettings, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.reward = load_function(settings.reward) if is_function(settings.reward) else None
        self.kl = AdaptiveKL(settings.kl_coefficient, settings.target_kl or 1.0, settings.kl_horizon)
        self.measured: dict[str, float] = {}

    def add_roles(self) -> None:
        s = self.settings
        self.policy_from_settings()
        self.base.add_role("reference", frozen_copy_of="policy")
        if self.reward is None:
            self.base.add_role("reward", start_from=s.reward, trainable=False)
            self.base.add_role("value", start_from=s.reward)
        else:
            self.policy_from_settings("value", head=True)

    def learning_rates(self) -> dict[str, float]:
        rate = self.settings.learning_rate
        return {"policy": rate, "value": self.settings.value_learning_rate or 2 * rate}

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[Episode]]:
        """Rollouts once, then `ppo_epochs` passes over them in minibatches, in a new order each time."""
        s = self.settings
        rollouts = self._roll_out(rows, step, retry)
        episodes, self.measured = self._judge(rows, rollouts, retry)
        if s.target_kl is not None:
            self.kl.update(self.measured["objective/kl"], len(rollouts))
        release_unused()
        order = generator_for(torch.device("cpu"), s.seed, step, "minibatches")
        for _ in range(s.ppo_epochs):
            for places in torch.randperm(len(episodes), generator=order).tensor_split(self._minibatches(len(rows))):
                yield [episodes[i] for i in places.tolist()]

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
        metrics.mean("loss/policy_avg", policy.loss, mask)
        metrics.mean("loss/value_avg", value.loss, mask)
        metrics.mean("policy/approxkl_avg", policy.approx_kl, mask)
        metrics.mean("policy/clipfrac_avg", policy.clipped, mask)
        metrics.mean("policy/entropy_avg", scores.entropy, mask)
        metrics.mean("val/clipfrac_avg", value.clipped, mask)
        metrics.mean("val/ratio", policy.ratio, mask)
        return (policy_loss + value_loss).detach()

    def round_metrics(self) -> dict[str, float]:
        return self.measured

    def _roll_out(self, rows: Sequence[TreeRow], step: int | str, retry: Retry) -> list[Rollout]:
        s = self.settings

        def draw(size: int) -> list[list[Rollout]]:
            with self.base.role("policy"):
                return sample(
                    self.base,
                    [row.prompt_ids for row in rows],
                    end_ids=self.renderer.end_ids,
                    max_new_tokens=s.max_new_tokens,
                    generator=generator_for(self.base.device, s.seed, step, "rollouts"),
                    temperature=s.temperature,
                    batch_size=size,
                )

        return [group[0] for group in retry(draw, "rollout_batch_size")]

    @torch.no_grad()
    def _judge(
        self, rows: Sequence[TreeRow], rollouts: list[Rollout], retry: Retry
    ) -> tuple[list[Episode], dict[str, float]]:
        """Old log-probs by the training path, reference, values and scores; from them rewards and advantages."""
        s = self.settings
        trees = [TreeRow(r.prompt_ids, [Completion(r.ids, [True] * len(r.ids))]) for r in rollouts]
        found = retry(lambda size: self._score_all(trees, size), "micro_batch_size")
        logps, ref_logps, values, mask = (pad_sequence([part[i] for part in found], batch_first=True) for i in range(4))
        raw = self._function_scores(rows, rollouts) if self.reward else torch.stack([part[4] for part in found])
        finished = torch.tensor([r.finished for r in rollouts], device=raw.device)
        scores = penalise_unfinished(raw, finished, s.missing_eos_penalty)
        coefficient = self.kl.coefficient
        rewards = per_token_rewards(scores, logps, ref_logps, mask, coefficient)
        advantages, returns = gae(rewards.rewards, values, mask, s.gamma, s.gae_lambda)
        advantages = whiten(advantages, mask)
        kl, lengths = rewards.kl.sum(1), mask.sum(1)
        measured = {
            "objective/kl": kl.mean().item(),
            "objective/scores": raw.mean().item(),
            "objective/rlhf_reward": rewards.rewards.sum(1).mean().item(),
            "objective/non_score_reward": -coefficient * kl.mean().item(),
            "objective/entropy": -logps.sum(1).mean().item(),
            "objective/kl_coefficient": coefficient,
            "completions/mean_length": lengths.float().mean().item(),
            "completions/finished": finished.float().mean().item(),
        }
        columns = (logps, values, advantages, returns)
        episodes = [Episode(tree, *(column[i, : lengths[i]] for column in columns)) for i, tree in enumerate(trees)]
        return episodes, measured

    def _score_all(self, trees: list[TreeRow], size: int) -> list[tuple[Tensor, ...]]:
        """Per rollout: log-probs, reference log-probs, values, mask (T,), and the reward model's shifted score ()."""
        found: list[tuple[Tensor, ...]] = []
        temperature = self.settings.temperature
        for start in range(0, len(trees), size):
            batch = self.base.collate(trees[start : start + size])
            with self.base.role("policy"):
                logps = self.base.token_scores(batch, temperature=temperature).per_token_logps
            with self.base.role("reference"):
                ref_logps = self.base.token_scores(batch, temperature=temperature).per_token_logps
            with self.base.role("value"):
                values = self.base.values(batch)
            scores = torch.zeros(len(logps), device=logps.device)
            if self.reward is None:
                with self.base.role("reward"):
                    scores = self.base.scores(batch, shifted=True)
            for i, length in enumerate(batch.num_tokens.tolist()):
                tokens = [column[i, :length] for column in (logps, ref_logps, values, batch.token_mask)]
                found.append((*tokens, scores[i]))
            self.base.turns.give_way()
        return found

    def _function_scores(self, rows: Sequence[TreeRow], rollouts: list[Rollout]) -> Tensor:
        assert self.reward is not None
        texts = [self.renderer.decode(r.ids) for r in rollouts]
        return torch.tensor(self.reward([row.prompt_text for row in rows], texts), device=self.base.device)

    def _minibatches(self, rows: int) -> int:
        return min(self.settings.minibatches, rows)

    # ---- evaluation

    monitor = ("objective/scores", max)

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """Score and KL of rollouts on held-out prompts."""
        return self._judge(rows, self._roll_out(rows, "evaluation", retry), retry)[1]

    # ---- before and after

    def state(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        end = self.renderer.end_ids[:1]
        assert_policy_is_reference(self.base, [TreeRow(row.prompt_ids, [Completion(end, [True])]) for row in rows[:2]])

    def preflight(self, rows: Sequence[TreeRow]) -> None:
        """As if each of these prompts had got the longest answer."""
        answer = Completion(
            self.renderer.end_ids[:1] * self.settings.max_new_tokens, [True] * self.settings.max_new_tokens
        )
        zeros = torch.zeros(self.settings.max_new_tokens, device=self.base.device)
        trees = [TreeRow(row.prompt_ids, [answer]) for row in rows]
        episodes = [Episode(tree, zeros, zeros, zeros, zeros) for tree in trees]
        self.step(episodes, self.weight(episodes), Metrics())

    def preflight_rollouts(self, rows: Sequence[TreeRow], retry: Retry) -> None:
        prompts = [row.prompt_ids for row in longest_rows(rows, self.settings.batch_size)]
        with self.base.role("policy"):
            retry(
                lambda size: fill_cache(self.base, prompts[:size], self.settings.max_new_tokens), "rollout_batch_size"
            )

    def save(self, run: RunFolder) -> str:
        """`adapter/` is the policy, `value/` the critic with its head."""
        self.base.save_role("value", run.value, as_reward=True)
        return self.base.save_role("policy", run.adapter)
