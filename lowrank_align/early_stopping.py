"""The best evaluation so far: what early stopping waits for, and goes back to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class BestSoFar:
    """The least finite value of what is watched, and what was found and trained when it was seen."""

    patience: int  # evaluations without a better one, after which the run stops; 0: it never does
    value: float | None = None
    step: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # kept only where there is a patience
    since: int = 0  # evaluations that were no better

    def see(self, value: float, step: int, evaluation: dict[str, float], weights: Mapping[str, Tensor]) -> None:
        """An evaluation of the weights as they are."""
        if not math.isfinite(value) or (self.value is not None and value >= self.value):
            self.since += 1
            return
        self.value, self.step, self.evaluation, self.since = value, step, evaluation, 0
        kept = weights if self.patience else {}
        self.weights = {name: weight.detach().clone() for name, weight in kept.items()}

    @property
    def given_up(self) -> bool:
        """Whether held-out rows have got no better often enough."""
        return 0 < self.patience <= self.since

    def put_back(self, weights: Mapping[str, Tensor]) -> None:
        """Make the weights what they were at the best step."""
        for name, weight in weights.items():
            weight.data.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside the weights."""
        best = None if self.value is None else [self.value, self.step, self.since]
        return {"best": best, "best_evaluation": self.evaluation}

    def load_state(self, state: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; one without weights is of a run that had no patience, and there is no best yet."""
        if state["best"] is None or (self.patience and not weights):
            return
        self.value, self.step, self.since = state["best"]
        self.evaluation, self.weights = state["best_evaluation"], weights
