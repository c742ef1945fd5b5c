"""The figures that a method gives back with a step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor


class Metrics:
    """Means, extremes and sums over everything a step saw, whatever micro-batches it was cut into."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._extremes: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {}
        self._totals: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Adds to the mean of `name` the values, or those under `mask`."""
        values = values.detach()
        if mask is None:
            mask = torch.ones_like(values, dtype=torch.bool)
        total, count = self._sums.get(name, (torch.zeros((), device=values.device),) * 2)
        self._sums[name] = (total + values.masked_fill(~mask, 0).sum(), count + mask.sum())

    def extreme(self, name: str, values: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Keeps the least (`torch.minimum`) or the greatest (`torch.maximum`) of the values."""
        for value in values.detach().flatten():
            self._extremes[name] = (pick, pick(self._extremes[name][1], value) if name in self._extremes else value)

    def total(self, name: str, value: Tensor) -> None:
        """Adds to the sum of `name`."""
        self._totals[name] = self._totals.get(name, torch.zeros((), device=value.device)) + value.detach()

    def absorb(self, other: "Metrics") -> None:
        """Takes over everything that another one saw."""
        for name, (total, count) in other._sums.items():
            mine = self._sums.get(name)
            self._sums[name] = (total, count) if mine is None else (mine[0] + total, mine[1] + count)
        for name, (pick, value) in other._extremes.items():
            self.extreme(name, value, pick)
        for name, value in other._totals.items():
            self.total(name, value)

    @staticmethod
    def joined(parts: Sequence[tuple[float, "Metrics"]]) -> tuple[float, "Metrics"]:
        """The loss and the metrics of all processes from those of each."""
        seen = Metrics()
        for _, part in parts:
            seen.absorb(part)
        return sum(loss for loss, _ in parts), seen

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which has no use for this one's device."""
        return send_to_device(vars(self), "cpu")  # type: ignore[no-any-return]

    def results(self) -> dict[str, float]:
        """The numbers by name; a mean over nothing is left out."""
        found = {name: total.item() for name, total in self._totals.items()}
        found |= {name: (total / count).item() for name, (total, count) in self._sums.items() if count.item() > 0}
        return found | {name: value.item() for name, (_, value) in self._extremes.items()}
