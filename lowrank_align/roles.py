"""What a role is, and the guard that keeps a backward inside the role of its forward.

Gradient checkpointing recomputes a forward under whatever role is active at backward. A backward under another role
gives wrong gradients without any error, so it is refused, and so is leaving a role while a graph still waits.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BARE = "base"  # the role that is always there: no adapter at all


@dataclass
class Role:
    """An adapter's name (None: the bare base), and a scalar head where the role scores instead of speaking."""

    name: str
    adapter: str | None = None
    trainable: bool = False
    head: Any = None  # nn.Linear(hidden, 1), fp32
    shift: float = 0.0  # subtracted from a reward model's raw scores
    parent: Path | None = None  # the run it started from
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)  # LoRA weights (PEFT's names) and `score.weight`


class Visit:
    """One stay in a role, and the graphs made during it that still wait for their backward."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.graphs: list[weakref.ref[Graph]] = []

    def pending(self) -> bool:
        alive = [ref() for ref in self.graphs]
        return any(graph is not None and not graph.done for graph in alive)


class Graph:
    """Lives as long as autograd keeps the graph that holds it."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.done = False


class BackwardInsideRole(torch.autograd.Function):
    """The identity; its backward refuses to run under another role than its forward did."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, visit: Visit, active_role: Callable[[], Role]) -> Tensor:
        ctx.active_role, ctx.graph = active_role, Graph(visit.role)
        visit.graphs = [ref for ref in visit.graphs if ref() is not None]
        visit.graphs.append(weakref.ref(ctx.graph))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        active: Role = ctx.active_role()
        if active is not ctx.graph.role:
            raise RuntimeError(
                f"backward of role {ctx.graph.role.name!r} ran under role {active.name!r}; "
                "call backward inside its role"
            )
        ctx.graph.done = True
        return gradients[0], None, None
