"""A run's figures as series: their first values, their last ones, and whether the change stands out of the noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Sequence[Mapping[str, float | None]]  # one mapping a logged step, oldest first; None: it was not finite

SETTLED_STEPS = 12  # from here on, what has not moved yet may be told
SHARE_COMPARED = 5  # the first fifth of the steps against the last
LEAST_COMPARED = 3
STANDS_OUT = 2.0  # standard errors


@dataclass(frozen=True)
class Change:
    """A series' mean over its first and over its last steps, and the standard error of their difference."""

    before: float
    after: float
    error: float

    @property
    def rises(self) -> bool:
        return self.after - self.before > STANDS_OUT * self.error and self.after > self.before

    @property
    def falls(self) -> bool:
        return self.before - self.after > STANDS_OUT * self.error and self.after < self.before


class Series:
    """The figures by name."""

    def __init__(self, method: str, figures: Figures) -> None:
        self.method, self.steps = method, len(figures)
        self._figures = figures

    def values(self, name: str) -> list[float]:
        """The finite values of a metric in the order of the steps."""
        found = (entry.get(name) for entry in self._figures)
        return [value for value in found if value is not None and math.isfinite(value)]

    def last(self, name: str) -> float | None:
        """The mean over the last steps; None where there is no value."""
        values = self.values(name)
        return _mean(values[-_compared(len(values)) :]) if values else None

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of the metrics that the run has."""
        return next((name for name in names if self.values(name)), None)

    def last_is_finite(self, name: str) -> bool:
        """Whether the newest step has a finite value; true where it logs no such metric."""
        if not self._figures or name not in self._figures[-1]:
            return True
        value = self._figures[-1][name]
        return value is not None and math.isfinite(value)

    def change(self, name: str | None, least: int = SETTLED_STEPS) -> Change | None:
        """From the first steps to the last; None with fewer than `least` values."""
        values = self.values(name) if name else []
        if len(values) < max(least, 2):
            return None
        count = _compared(len(values))
        # Between neighbours a trend hardly shows, so their differences measure the noise: var(a - b) = 2 var.
        squares = [(b - a) ** 2 for a, b in zip(values, values[1:], strict=False)]
        noise = math.sqrt(_mean(squares) / 2)
        return Change(_mean(values[:count]), _mean(values[-count:]), noise * math.sqrt(2 / count))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _compared(count: int) -> int:
    return max(LEAST_COMPARED, count // SHARE_COMPARED)
