"""How a table learns: exactly where the loss is one function, step by step where it follows the policy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_align.objectives.paired import Side, by_preference
from tests.oracle.world import World


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int = 500) -> Tensor:
    """The argument, begun at `start`, that makes `loss` least, by L-BFGS until it no longer moves."""
    x = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimiser.step(closure)
    return x.detach()


def descend(
    loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, learning_rate: float = 0.1, epochs: int = 1
) -> Tensor:
    """The same where what is minimised changes with the policy, as with rollouts: Adam, the rate annealed to 0.

    `loss(logits)` is asked anew for every step: it sees the policy of now as the one that made the rollouts.
    """
    x = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=learning_rate, betas=(0.8, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(x).backward()
        optimiser.step()
        schedule.step()
    return x.detach()


def side(world: World, logits: Tensor, rows: Tensor) -> Side:
    """What the policy of these logits and the reference say about `rows` of the N completions."""
    return Side(world.per_token_logps(logits), world.row_mask, world.per_token_logps(world.ref_logits)).at(rows)


def on_all_pairs(
    world: World, loss: Callable[..., Tensor], preference: Tensor | None = None, **knobs: Any
) -> Callable[[Tensor], Tensor]:
    """The mean of a paired loss over all pairs, as a function of logits; true preferences unless others are given.

    Every pair weighs the same. Where the optimum fits every single comparison, as DPO's does, weights do not matter.
    """
    pairs = world.pairs()
    labels = pairs.preference if preference is None else preference

    def mean(logits: Tensor) -> Tensor:
        policy = side(world, logits, torch.arange(len(world.row_mask)))
        first, second = policy.at(pairs.first), policy.at(pairs.second)
        return by_preference(lambda a, b: loss(a, b, **knobs), first, second, labels).mean()

    return mean
