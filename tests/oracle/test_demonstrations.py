"""What is learned from chosen completions alone: likelihood goes to the distribution of what was chosen, exactly.

Preferred-FT, expert iteration, reward conditioning, chain of hindsight and Quark are that one theorem (-sum_y c(y) log
pi(y) is least at pi = c / sum c) with five choices of c, each of which can be written down.
"""

import math

import pytest
import torch
from torch import Tensor

from lowrank_align.objectives.completion import nll
from lowrank_align.objectives.quantiles import quantiles
from tests.oracle.fitting import minimise
from tests.oracle.world import World, distance, kl, make_world

WORLD = make_world(max_length=3)
BETA = 0.5


def fit(world: World, shares: Tensor) -> Tensor:
    """(P, C) log-probabilities after SFT on completions that come with these shares (P, C)."""

    def loss(logits: Tensor) -> Tensor:
        result = nll(world.per_token_logps(logits), world.row_mask)
        return (shares.flatten()[:, None] * result.loss).sum() / (shares.flatten() * result.num_tokens).sum()

    return world.log_probs(minimise(loss, world.ref_logits, max_iterations=250))


def chosen_of_pairs(world: World) -> Tensor:
    """(P, C) shares of the chosen, pairs drawn twice from the reference: ref(y) 2 sum_y' ref(y') s(r(y) - r(y'))."""
    r, ref = world.rewards, world.reference.exp()
    return ref * 2 * (torch.sigmoid(r[:, :, None] - r[:, None]) * ref[:, None]).sum(-1)


def best_of(log_probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """(P, C) probabilities of the best of n: F(y)^n - F(y-)^n, F the chance of at most r(y), F(y-) of less."""
    order = rewards.argsort(-1)
    below = log_probs.exp().gather(-1, order).cumsum(-1).clamp(max=1.0)
    sorted_probs = below**n - torch.nn.functional.pad(below, (1, 0))[:, :-1] ** n
    return torch.zeros_like(rewards).scatter(-1, order, sorted_probs)


def test_preferred_ft_approaches_the_chosen():
    """No completion is chosen more than twice as often as the reference says it: KL(c || ref) < log 2, however long it
    is trained and whatever the reward, which is why Preferred-FT is weak beside pi* at a small beta.
    """
    chosen = chosen_of_pairs(WORLD)
    assert chosen.sum(-1).tolist() == pytest.approx([1, 1])
    found = fit(WORLD, chosen)
    reached = distance(found, chosen.log())
    assert reached.gap < 1e-5, f"{reached}"
    assert distance(found, WORLD.reference).kl < math.log(2) < kl(WORLD.optimum(0.1), WORLD.reference).min().item()


def test_conditioning_is_preferred_ft_with_its_complement():
    """Two tags are two prompts: pi(y|x, good) = the chosen, pi(y|x, bad) = the rejected, their mean is the reference.

    Each pair has one of both, and both were drawn from the reference: chosen + rejected = 2 ref.
    """
    chosen = chosen_of_pairs(WORLD)
    rejected = 2 * WORLD.reference.exp() - chosen
    tagged = World(
        WORLD.ref_logits.repeat(2, 1, 1), WORLD.rewards.repeat(2, 1), WORLD.tokens, WORLD.mask, WORLD.prefixes
    )
    found = fit(tagged, torch.cat([chosen, rejected]))
    reached = distance(found, torch.cat([chosen, rejected]).log())
    assert reached.gap < 1e-5, f"{reached}"
    good, bad = found.exp().chunk(2)
    assert torch.allclose((good + bad) / 2, WORLD.reference.exp(), atol=1e-5)
    assert (WORLD.expected_reward(good.log()) > WORLD.expected_reward(bad.log())).all()


def test_best_of_n_by_hand():
    """Probabilities 1/2, 1/4, 1/4 with rewards 0, 1, 2, n = 2: F = 1/2, 3/4, 1, so 1/4, 9/16 - 4/16, 1 - 9/16."""
    probs = best_of(torch.tensor([[0.5, 0.25, 0.25]]).double().log(), torch.tensor([[0.0, 1.0, 2.0]]).double(), 2)
    assert probs.tolist() == [pytest.approx([4 / 16, 5 / 16, 7 / 16])]


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_best_of_n_stays_near(n):
    """KL <= log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879): equal where no one has much probability.

    And no policy of that KL has a higher score than the pi* of that KL; best-of-n comes close.
    """
    best = best_of(WORLD.reference, WORLD.rewards, n).clamp(min=0).log()
    bound, exact = math.log(n) - (n - 1) / n, kl(best, WORLD.reference)
    assert (exact <= bound + 1e-12).all(), f"KL {exact.tolist()}, bound {bound:.4f}"
    if n > 1:
        for prompt in range(len(exact)):
            low, high = 1e-3, 100.0  # of beta: KL(pi*) falls as it grows
            for _ in range(60):
                beta = math.sqrt(low * high)
                near = kl(WORLD.optimum(beta), WORLD.reference)[prompt] < exact[prompt]
                low, high = (low, beta) if near else (beta, high)
            frontier = WORLD.expected_reward(WORLD.optimum(high))[prompt].item()
            got = WORLD.expected_reward(best)[prompt].item()
            assert frontier - 0.1 < got <= frontier + 1e-6, f"n {n}: score {got:.4f}, frontier {frontier:.4f}"


def test_expert_iteration_multiplies():
    """SFT on the best of n is the best of n; its best of n again, the best of n^2 of where it began: F_n = F^n."""
    first = fit(WORLD, best_of(WORLD.reference, WORLD.rewards, 2))
    reached = distance(first, best_of(WORLD.reference, WORLD.rewards, 2).log())
    assert reached.gap < 1e-5, f"round 1: {reached}"
    second = fit(WORLD, best_of(first, WORLD.rewards, 2))
    reached = distance(second, best_of(WORLD.reference, WORLD.rewards, 4).log())
    assert reached.gap < 1e-4, f"round 2: {reached}"


def test_chain_of_hindsight_improves_step_by_step():
    """Behind a worse answer y1 CoH learns the better one as it comes: pi(y2|x, y1) = ref(y2) s(r2 - r1) / N(y1).

    Asked again and again for a better one than the last, it does not run away. Since e^{r1} s(r2 - r1) is symmetric,
    g(y) = ref(y) N(y) e^{r(y)} has g(y1) pi(y2|y1) = g(y2) pi(y1|y2): the chain settles at g / sum g.
    """
    world = make_world(prompts=1, max_length=2)  # 13 completions, each of which is a first answer in turn
    (r,), (ref,) = world.rewards, world.reference.exp()
    better = ref * torch.sigmoid(r - r[:, None])  # (y1, y2), not normalised
    rows = len(r)
    chains = World(world.ref_logits.repeat(rows, 1, 1), r.repeat(rows, 1), world.tokens, world.mask, world.prefixes)
    steps = fit(chains, better).exp()
    settled = torch.linalg.matrix_power(steps, 100)[0]
    expected = ref * better.sum(-1) * r.exp()
    reached = distance(settled.log()[None], (expected / expected.sum()).log()[None])
    assert reached.gap < 1e-5, f"{reached}"
    scores = [(probs * r).sum().item() for probs in (ref, ref @ steps, settled)]
    assert scores[0] < scores[1] < scores[2], f"score of the reference, of the second answer, at the end: {scores}"


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_quark_mixes_the_quantile_with_the_reference(beta):
    """-log pi(y|x, top) + beta KL(ref || pi) per token: pi(a|s) = (c(a|s) + beta ref(a|s)) / (1 + beta) after every s.

    c is the top third of the pool, over all prompts together, here a pool of some 800 answers in the reference's
    proportions. A completion's answers are all in one quantile, that of their middle rank. At prefixes which no answer
    of the top third has nothing is learned, and the policy stays what it was.
    """
    counts = (400 * WORLD.reference.exp()).round().long()
    which = torch.arange(counts.numel()).repeat_interleave(counts.flatten())
    is_top = quantiles(WORLD.rewards.flatten()[which], 3) == 3
    top = torch.bincount(which[is_top], minlength=counts.numel()).view(counts.shape).double()
    below = torch.stack([counts[WORLD.rewards < reward].sum() for reward in WORLD.rewards.flatten()]).view(counts.shape)
    middle = (below + (counts - 1) / 2) / counts.sum()
    assert torch.equal(top, torch.where(middle >= 2 / 3, counts, 0).double())

    ref = WORLD.ref_logits.softmax(-1)
    reached_by = WORLD.edge_sums(top[..., None].expand(-1, *WORLD.mask.shape))  # (P, S, V) answers
    seen = reached_by.sum(-1, keepdim=True)
    expected = torch.where(seen > 0, (reached_by / seen + beta * ref) / (1 + beta), ref)

    def loss(logits: Tensor) -> Tensor:
        answers = nll(WORLD.per_token_logps(logits), WORLD.row_mask)
        divergence = (ref * (ref.log() - logits.log_softmax(-1))).sum(-1)
        total = (top.flatten()[:, None] * answers.loss).sum() + beta * (seen[..., 0] * divergence).sum()
        return total / seen.sum()

    found = WORLD.log_probs(minimise(loss, WORLD.ref_logits))
    reached = distance(found, WORLD.log_probs(expected.clamp(min=1e-300).log()))
    assert reached.gap < 1e-4, f"{reached}"
    assert (WORLD.expected_reward(found) > WORLD.expected_reward(WORLD.reference)).all()
