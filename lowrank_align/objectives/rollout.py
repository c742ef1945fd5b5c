"""Losses on sampled responses: PPO's per-token rewards, policy and value losses and KL control; GRPO's and RLOO's.

N counts responses, T their tokens, padded on the right; the mask is 1 on a response's tokens, the end token included.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lowrank_align.tensors import KLKind, kl_estimate, masked, masked_mean, same_shape

RatioKind = Literal["token", "sequence"]


class TokenRewards(NamedTuple):
    """Result of `per_token_rewards`; no gradient, 0 where the mask is 0."""

    rewards: Tensor  # (N, T) -kl_coefficient * kl, plus the score at the last token
    kl: Tensor  # (N, T) estimate in nats


class PolicyLoss(NamedTuple):
    """Result of `ppo_policy_loss`; only `loss` carries a gradient."""

    loss: Tensor  # (N, T), 0 where the mask is 0
    ratio: Tensor  # (N, T) exp(new - old), 1 where the mask is 0
    clipped: Tensor  # (N, T) 1.0 where the clipped branch decides, else 0.0: its mean is the clip fraction
    approx_kl: Tensor  # (N, T) k2 between the old and the new policy in nats, 0 where the mask is 0


class ValueLoss(NamedTuple):
    """Result of `ppo_value_loss`; only `loss` carries a gradient."""

    loss: Tensor  # (N, T), 0 where the mask is 0
    clipped: Tensor  # (N, T) 1.0 where the clipped branch decides, else 0.0: its mean is the clip fraction


class GroupLoss(NamedTuple):
    """Result of `grpo_loss`, (N, T) each, and of `rloo_loss`, (N,) each; only `loss` carries a gradient."""

    loss: Tensor  # 0 where the mask is 0
    ratio: Tensor  # exp(new - old), 1 where the mask is 0
    clipped_low: Tensor  # 1.0 where the ratio fell below the range and the advantage is negative, else 0.0
    clipped_high: Tensor  # 1.0 where the ratio rose above the range and the advantage is positive, else 0.0
    kl: Tensor  # estimate of KL to the reference in nats, 0 without one


@torch.no_grad()
def per_token_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coefficient: float, kl: KLKind = "k1"
) -> TokenRewards:
    """r_t = -kl_coefficient * KL_t, plus the score at the last token that counts.

    `scores` (N,), with shift and penalties applied; `logps`, `ref_logps` (N, T) under the policy that sampled and under
    the reference; `mask` (N, T). KL_t is log pi - log ref for k1. Ziegler et al. 2019, arXiv 1909.08593, eq. 2, spread
    over tokens as in Huang et al. 2024, arXiv 2403.17031. A response without any token gets no reward at all.
    Left out: whitening of the rewards. TRL wrote the score one position further, at the padding after the end token.
    """
    same_shape(logps=logps, ref_logps=ref_logps, mask=mask)
    same_shape(scores=scores, responses=mask.any(dim=-1))
    mask = mask.bool()
    divergence = masked(kl_estimate(logps, ref_logps, kl), mask)
    tokens_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    is_last = mask & (tokens_from_here == 1)
    score_at_end = masked(scores[:, None].expand_as(divergence), is_last)
    return TokenRewards(rewards=score_at_end - kl_coefficient * divergence, kl=divergence)


def ppo_policy_loss(
    new_logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) per token, rho = exp(new_logps - old_logps), eps the `clip_range`.

    All tensors (N, T). Schulman et al. 2017, arXiv 1707.06347, eq. 7 with its sign turned, A being whitened as Huang et
    al. 2024 (arXiv 2403.17031) have it. Divide the sum by the tokens of the accumulated minibatch.
    Left out: the entropy bonus, early stopping on `approx_kl`, PPO-ptx.
    """
    same_shape(new_logps=new_logps, old_logps=old_logps, advantages=advantages, mask=mask)
    # masked before exp: at the padding the difference may be anything, and so may exp's gradient
    log_ratio = masked(new_logps - old_logps, mask)
    ratio, advantages = log_ratio.exp(), masked(advantages, mask)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        loss=torch.max(unclipped_loss, clipped_loss),
        ratio=ratio.detach(),
        clipped=(clipped_loss > unclipped_loss).to(ratio.dtype),
        approx_kl=log_ratio.detach() ** 2 / 2,
    )


def ppo_value_loss(
    new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range_value: float
) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) per token, eps the `clip_range_value`.

    All tensors (N, T); `returns` from `gae`, not whitened. An infinite eps turns clipping off. From OpenAI's PPO code,
    described in Huang et al. 2024, arXiv 2403.17031; the coefficient (0.1) is the caller's.
    """
    same_shape(new_values=new_values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = masked(new_values, mask), masked(old_values, mask), masked(returns, mask)
    clipped_values = values.clamp(old_values - clip_range_value, old_values + clip_range_value)
    unclipped_loss, clipped_loss = (values - returns) ** 2, (clipped_values - returns) ** 2
    return ValueLoss(
        loss=0.5 * torch.max(unclipped_loss, clipped_loss),
        clipped=(clipped_loss > unclipped_loss).to(values.dtype),
    )


def grpo_loss(
    new_logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    clip_range: float,
    clip_range_high: float | None = None,
    ratio: RatioKind = "token",
) -> GroupLoss:
    """-[min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) - beta KL] per token, KL outside min and clip.

    `new_logps`, `old_logps`, `ref_logps`, `mask` (N, T), `advantages` (N,) from `groups.group_advantages`. Without
    `clip_range_high`, eps_high is `clip_range`, eps; with it, DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476,
    eq. 8). Without `ref_logps` there is no KL term.
    Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4: KL is k3, ref/pi - log(ref/pi) - 1. rho is exp(new - old) of each
    `token`, or, for a whole `sequence`, exp of the mean over its tokens (GSPO, Zheng et al. 2025, arXiv 2507.18071,
    eq. 7). Reduce with token_mean (DAPO) or sequence_mean (the paper's).
    Left out: Dr. GRPO's division by a constant length, two-sided clipping, KL times rho (DeepSeek-V3.2, 2512.02556).
    Raises ValueError for an unknown `ratio`.
    """
    if ratio not in get_args(RatioKind):
        raise ValueError(f"ratio: {ratio!r} is no ratio (known: {', '.join(get_args(RatioKind))})")
    same_shape(new_logps=new_logps, old_logps=old_logps, mask=mask)
    same_shape(advantages=advantages, responses=mask.any(dim=-1))
    log_ratio = masked(new_logps - old_logps, mask)
    if ratio == "sequence":
        log_ratio = masked(masked_mean(log_ratio, mask, -1)[:, None].expand_as(log_ratio), mask)
    loss, rho, low, high = _clipped(
        log_ratio, masked(advantages[:, None].expand_as(log_ratio), mask), clip_range, clip_range_high
    )
    if ref_logps is None:
        return GroupLoss(loss, rho, low, high, torch.zeros_like(rho))
    same_shape(new_logps=new_logps, ref_logps=ref_logps)
    kl = kl_estimate(masked(new_logps, mask), masked(ref_logps, mask), "k3")
    return GroupLoss(loss + beta * kl, rho, low, high, kl.detach())


def rloo_loss(new_logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float) -> GroupLoss:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) per response (N,), rho = exp(sum of new - old over its tokens).

    `new_logps`, `old_logps`, `mask` (N, T), `advantages` (N,) from `groups.leave_one_out`, of scores from which the KL
    was taken off already. Ahmadian et al. 2024, arXiv 2402.14740: the whole response is one action; there without ratio
    and clip, which at the first update change nothing. The form is TRL 1.16's.
    Left out: advantages normalised over the batch. Mean over responses.
    """
    same_shape(new_logps=new_logps, old_logps=old_logps, mask=mask)
    same_shape(advantages=advantages, responses=mask.any(dim=-1))
    log_ratio = masked(new_logps - old_logps, mask).sum(dim=-1)
    loss, rho, low, high = _clipped(log_ratio, advantages, clip_range, None)
    return GroupLoss(loss, rho, low, high, torch.zeros_like(rho))


def _clipped(
    log_ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-min(rho A, clip(rho) A), rho, and where the clip decides below and above; all of `log_ratio`'s shape."""
    least, most = 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(least, most) * advantages)
    low = ((ratio < least) & (advantages < 0)).to(ratio.dtype)
    high = ((ratio > most) & (advantages > 0)).to(ratio.dtype)
    return loss, ratio.detach(), low, high


def penalise_unfinished(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """`scores` (N,) less `penalty` (at least 0) where `finished` (N,) bool is False: the response has no end token.

    TRL's `missing_eos_penalty`. Left out: Huang et al. 2024 (arXiv 2403.17031) set such a score to -1 instead, which
    presumes the reward model's scale.
    """
    same_shape(scores=scores, finished=finished)
    return torch.where(finished.bool(), scores, scores - penalty)


@dataclass
class AdaptiveKL:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2),   coefficient <- coefficient * (1 + e * n / horizon)

    n is the number of responses that the KL was measured on, so their K_beta is n / horizon; it is held at 1 or below
    (in the paper 0.1): more would let the coefficient reach 0 or change its sign.
    """

    coefficient: float  # begins as the initial one
    target_nats: float  # above 0, KL of a whole response, mean over responses
    horizon: float  # above 0, in responses

    def update(self, kl_nats: float, num_responses: int) -> float:
        """The new coefficient, also kept. A KL that is not finite changes nothing."""
        if math.isfinite(kl_nats):
            error = max(-0.2, min(0.2, kl_nats / self.target_nats - 1))
            self.coefficient *= 1 + error * min(1.0, num_responses / self.horizon)
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """What changes while training; target and horizon are configuration."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict()`. Raises KeyError where the coefficient is missing."""
        self.coefficient = float(state["coefficient"])
