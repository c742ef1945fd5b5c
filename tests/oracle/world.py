"""A world small enough to write down: all prompts, completions and probabilities, in float64, nothing sampled.

Tokens are 0, the end token, and 1 .. V - 1. A completion is a string of tokens that stops after its first end token, or
is cut after `max_length` tokens, as a rollout is. With V = 4 and 4 tokens these are 1 + 3 + 9 + 27 that end and 81 that
are cut: C = 121. The probabilities of a prompt's C completions sum to 1, so that

    Z(x) = sum_y pi_ref(y|x) exp(r(x,y) / beta)      pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x)
    J(pi) = E_{y~pi} r(x,y) - beta KL(pi || pi_ref) = beta log Z(x) - beta KL(pi || pi*)

are sums over C terms. A policy is a table of logits for every prompt and prefix (S prefixes, those not ended yet):
any distribution that gives every completion some probability is one of its settings, so pi* is within reach, and
whether a method gets there is a matter of its loss alone. A method's losses are the project's own functions, given
the per-token log-probabilities of all N = P C completions; expectations are sums with the probabilities as weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

END = 0


class Pairs(NamedTuple):
    """Every two completions of one prompt; rows of the N completions."""

    first: Tensor  # (M,) int64
    second: Tensor  # (M,) int64
    preference: Tensor  # (M,) Bradley-Terry: s(r_first - r_second)


class Distance(NamedTuple):
    """How far one distribution is from another, over the worst prompt."""

    gap: float  # max over completions of |pi - target|
    kl: float  # KL(pi || target) in nats

    def __str__(self) -> str:
        return f"max |pi - target| {self.gap:.2e}, KL {self.kl:.2e} nats"


@dataclass(frozen=True)
class World:
    """P prompts with the same C completions; T is the longest one's length."""

    ref_logits: Tensor  # (P, S, V) of the reference
    rewards: Tensor  # (P, C)
    tokens: Tensor  # (C, T) int64, END on the padding
    mask: Tensor  # (C, T) bool, True on a completion's tokens, the end token included
    prefixes: Tensor  # (C, T) int64 in [0, S): what stands before each token

    # ---- probabilities

    def per_token_logps(self, logits: Tensor) -> Tensor:
        """(N, T) of all completions, 0 on the padding; `logits` (P, S, V)."""
        chosen = logits.log_softmax(-1)[:, self.prefixes, self.tokens]
        return chosen.masked_fill(~self.mask, 0.0).flatten(0, 1)

    def log_probs(self, logits: Tensor) -> Tensor:
        """(P, C) log pi(y|x)."""
        return self.per_token_logps(logits).sum(-1).view(self.rewards.shape)

    @property
    def reference(self) -> Tensor:
        """(P, C) log pi_ref(y|x)."""
        return self.log_probs(self.ref_logits)

    def log_z(self, beta: float) -> Tensor:
        """(P,) log Z(x)."""
        return (self.reference + self.rewards / beta).logsumexp(-1)

    def optimum(self, beta: float) -> Tensor:
        """(P, C) log pi*(y|x)."""
        return self.reference + self.rewards / beta - self.log_z(beta)[:, None]

    def expected_reward(self, log_probs: Tensor) -> Tensor:
        """(P,) E_{y~pi} r(x, y)."""
        return (log_probs.exp() * self.rewards).sum(-1)

    def objective(self, log_probs: Tensor, beta: float) -> Tensor:
        """(P,) J(pi)."""
        return self.expected_reward(log_probs) - beta * kl(log_probs, self.reference)

    # ---- prefixes

    def edge_sums(self, per_token: Tensor) -> Tensor:
        """(P, S, V): of all completions that have this token after this prefix, the sum of `per_token` (P, C, T)."""
        _, num_prefixes, vocabulary = self.ref_logits.shape
        edges = (self.prefixes * vocabulary + self.tokens)[self.mask]
        sums = per_token.new_zeros(len(per_token), num_prefixes * vocabulary)
        return sums.index_add(1, edges, per_token[:, self.mask]).view(self.ref_logits.shape)

    def logits_of(self, log_probs: Tensor) -> Tensor:
        """(P, S, V): the table whose completions have these log-probabilities (P, C)."""
        return self.edge_sums(log_probs.exp()[..., None].expand(-1, *self.tokens.shape)).log()

    def values(self, log_probs: Tensor, rewards: Tensor) -> Tensor:
        """(N, T) exact values: what is still to come, on average, before each token; 0 on the padding.

        `log_probs` (P, C) of the policy that goes on, `rewards` (N, T) per token.
        """
        to_go = rewards.flip(-1).cumsum(-1).flip(-1).view(*log_probs.shape, -1)
        weights = log_probs.exp()[..., None].expand_as(to_go)
        per_prefix = self.edge_sums(weights * to_go).sum(-1) / self.edge_sums(weights).sum(-1)
        return per_prefix[:, self.prefixes].masked_fill(~self.mask, 0.0).flatten(0, 1)

    def backward(self, rule: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:
        """(P, S, V) log-probabilities of the policy that `rule` makes, from the longest prefixes to the empty one.

        `rule(action_values, ref_logps, depth)`, the first two (P, V), returns what the policy does there, (P, V), and
        what being there is worth, (P,). A completion is worth its reward.
        """
        worth: dict[tuple[int, ...], Tensor] = {}
        for c, (row, keep) in enumerate(zip(self.tokens.tolist(), self.mask.tolist(), strict=True)):
            worth[tuple(t for t, kept in zip(row, keep, strict=True) if kept)] = self.rewards[:, c]
        places = {tuple(row[:t]): i for row, at in zip(self.tokens.tolist(), self.prefixes.tolist(), strict=True)
                  for t, i in enumerate(at) if END not in row[:t]}  # fmt: skip
        policy = torch.empty_like(self.ref_logits)
        for prefix in sorted(places, key=len, reverse=True):
            actions = torch.stack([worth[*prefix, token] for token in range(self.ref_logits.shape[-1])], dim=-1)
            ref_logps = self.ref_logits[:, places[prefix]].log_softmax(-1)
            policy[:, places[prefix]], worth[prefix] = rule(actions, ref_logps, len(prefix))
        return policy

    # ---- rows, as a loss wants them

    @property
    def row_mask(self) -> Tensor:
        """(N, T) bool."""
        return self.mask.repeat(len(self.rewards), 1)

    @property
    def num_tokens(self) -> Tensor:
        """(N,) int64."""
        return self.row_mask.sum(-1)

    def pairs(self) -> Pairs:
        """All P C (C - 1) / 2 pairs within a prompt, with true Bradley-Terry preferences."""
        prompts, completions = self.rewards.shape
        here = torch.combinations(torch.arange(completions))
        first, second = (here[None] + completions * torch.arange(prompts)[:, None, None]).flatten(0, 1).unbind(-1)
        scores = self.rewards.flatten()
        return Pairs(first, second, torch.sigmoid(scores[first] - scores[second]))


def make_world(prompts: int = 2, vocabulary: int = 4, max_length: int = 4, seed: int = 1) -> World:
    """A world with a drawn reference (logits normal, standard deviation 0.7) and rewards uniform in [-1, 1]."""
    words = range(1, vocabulary)
    prefixes = [p for length in range(max_length) for p in product(words, repeat=length)]
    completions = [(*prefix, END) for prefix in prefixes] + list(product(words, repeat=max_length))
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    tokens = torch.zeros(len(completions), max_length, dtype=torch.long)
    mask, before = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
    for i, completion in enumerate(completions):
        for t, token in enumerate(completion):
            tokens[i, t], mask[i, t], before[i, t] = token, True, place[completion[:t]]
    generator = torch.Generator().manual_seed(seed)
    logits = 0.7 * torch.randn(prompts, len(prefixes), vocabulary, generator=generator, dtype=torch.float64)
    rewards = 2 * torch.rand(prompts, len(completions), generator=generator, dtype=torch.float64) - 1
    return World(logits, rewards, tokens, mask, before)


def two_completions(probability: float, reward_first: float, reward_second: float) -> World:
    """One prompt and two completions of one token, the first (the end token) with `probability` in the reference."""
    world = make_world(prompts=1, vocabulary=2, max_length=1)
    logits = torch.tensor([[[probability, 1 - probability]]], dtype=torch.float64).log()
    rewards = torch.tensor([[reward_first, reward_second]], dtype=torch.float64)
    return World(logits, rewards, world.tokens, world.mask, world.prefixes)


def kl(log_probs: Tensor, target: Tensor) -> Tensor:
    """(P,) KL(pi || target) in nats, both (P, C) log-probabilities; a completion of probability 0 counts 0."""
    probs = log_probs.exp()
    return torch.where(probs > 0, probs * (log_probs - target), 0.0).sum(-1)


def distance(log_probs: Tensor, target: Tensor) -> Distance:
    """Between two sets of log-probabilities (P, C)."""
    log_probs = log_probs.detach()
    return Distance((log_probs.exp() - target.exp()).abs().max().item(), kl(log_probs, target).max().item())
