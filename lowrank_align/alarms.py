"""What shows only over many steps: figures of a run that together say that it goes wrong.

An alarm is a hint for people to look, told in one line when it begins and again only once it has been off for a window.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import median
from typing import Any, ClassVar

WINDOW = 12  # steps over which a change is looked for
CLIMB = 0.5  # Kendall's tau with time from which a figure climbs: by chance in 12 steps 1 in 95 times
LONGER = 1.1  # and answers must have grown by a tenth from the window's first half to its second

NOW = 5  # steps whose median is the KL of now: no single step can raise the alarm
LEAP = 4.0  # times the KL of the window before
LEAST_LEVEL = 0.125  # nats a token: KL that begins at 0 leaps over anything smaller
FAR = 1.0  # nats a token, whatever was before
OVER_TARGET = 3.0  # times `target_kl`

FALL = 0.25  # of the chosen answers' log-probability at the start
CLEAR = 3.0  # times the noise of a step


class Alarm(ABC):
    """Keeps the last figures, and knows whether they are alarming."""

    name: ClassVar[str]  # of the metric, 1 while it is on
    keeps: ClassVar[int] = WINDOW

    def __init__(self) -> None:
        self._seen: list[list[float]] = []  # of the last steps
        self._quiet = 0  # steps for which it must be off before it speaks again

    @property
    @abstractmethod
    def on(self) -> bool:
        """Whether the last figures are alarming."""

    @property
    @abstractmethod
    def line(self) -> str:
        """What to tell, with what to do."""

    def _note(self, *figures: float) -> bool:
        """A step's figures; True where the alarm begins. A step without finite ones says nothing."""
        if not all(map(math.isfinite, figures)):
            return False
        self._seen = [*self._seen, list(figures)][-self.keeps :]
        begins = self.on and not self._quiet
        self._quiet = WINDOW if self.on else max(0, self._quiet - 1)
        return begins

    def _column(self, place: int) -> list[float]:
        return [seen[place] for seen in self._seen]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "quiet": self._quiet}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._quiet = state.get("seen", []), state.get("quiet", 0)


class HackingWatch(Alarm):
    """Notices when score, KL and length all climb together, the usual picture of a reward that is being exploited.

    Over-optimisation raises the proxy score with KL while the true one falls (Gao et al. 2022, arXiv 2210.10760), and
    the most common exploit is length (Singhal et al. 2023, arXiv 2310.03716). It can also be honest progress: a hint.
    """

    name = "reward_hacking"

    def add(self, score: float, kl: float, length: float) -> bool:
        """A step's figures; True where the alarm begins."""
        return self._note(score, kl, length)

    @property
    def on(self) -> bool:
        """Whether all three climb over a full window."""
        if len(self._seen) < WINDOW:
            return False
        lengths, half = self._column(2), WINDOW // 2
        longer = sum(lengths[half:]) >= LONGER * sum(lengths[:half])
        return longer and all(_kendall(self._column(place)) >= CLIMB for place in range(3))

    @property
    def line(self) -> str:
        return (
            f"score, KL and length have all climbed for {WINDOW} steps: the policy may be exploiting the reward;"
            " read samples.jsonl, and raise the price of KL or --length-penalty"
        )


class KLWatch(Alarm):
    """Notices when the policy leaps away from its reference: KL far above what it just was, its target, or any sense.

    In nats a token, for answers of any length. A slow climb to a plateau is training; one step's spike is noise.
    """

    name = "kl_blow_up"
    keeps = WINDOW + NOW

    def __init__(self, price: str, target_nats: float | None = None) -> None:
        """`price`: the setting that holds KL down; `target_nats` an answer, where the run has a target."""
        super().__init__()
        self.price, self.target_nats = price, target_nats

    def add(self, kl: float, length: float) -> bool:
        """A step's KL in nats an answer and tokens an answer; True where the alarm begins."""
        return self._note(kl, max(1.0, length))

    @property
    def on(self) -> bool:
        if len(self._seen) < NOW:
            return False
        by_token = [kl / length for kl, length in self._seen]
        now, before = median(by_token[-NOW:]), by_token[:-NOW]
        if self.target_nats is not None and median(self._column(0)[-NOW:]) >= OVER_TARGET * self.target_nats:
            return True
        leaps = len(before) >= WINDOW // 2 and now >= LEAP * max(LEAST_LEVEL, median(before))
        return leaps or now >= FAR

    @property
    def line(self) -> str:
        kls = self._column(0)
        before = f" ({median(kls[:-NOW]):.1f} before)" if kls[:-NOW] else ""
        return (
            f"KL has blown up to {median(kls[-NOW:]):.1f} nats an answer{before}: the policy is leaving its reference;"
            f" begin again with a higher {self.price} or a lower --learning-rate, and a new --out"
        )


class LikelihoodWatch(Alarm):
    """Notices when the chosen answers themselves become unlikely, while margins grow because the rejected fall faster.

    Likelihood displacement (Razin et al. 2024, arXiv 2410.08847): what neither of the two says gets the probability.
    Some of it is in every run of DPO; this is a quarter of the log-probability, clear of the noise between batches.
    """

    name = "likelihood_displacement"
    keeps = 2 * WINDOW

    def __init__(self) -> None:
        super().__init__()
        self._first: list[list[float]] = []  # chosen and margin of the first steps, where no reference knows them

    def add(self, chosen: float, margin: float, reference: float | None = None) -> bool:
        """A step's log-probability of the chosen answers and margin; True where the alarm begins.

        `reference`: their log-probability at the start. Without it the first steps say what it was.
        """
        if not math.isfinite(chosen) or not math.isfinite(margin):
            return False
        if reference is not None:
            return self._note((reference - chosen) / max(abs(reference), 1e-6), margin)
        if len(self._first) < NOW:
            self._first.append([chosen, margin])
            return False
        chosen_first, margins_first = zip(*self._first, strict=True)
        start, start_margin = median(chosen_first), median(margins_first)
        if chosen_first[0] - start > 2 * FALL * abs(chosen_first[0]):  # it fell within these steps, by more than noise
            start, start_margin = self._first[0]
        return self._note((start - chosen) / max(abs(start), 1e-6), margin - start_margin)

    @property
    def on(self) -> bool:
        """Over a full window, or two where the start is not known; as margins have grown, the rejected fell by more."""
        window = 2 * WINDOW if self._first else WINDOW
        if len(self._seen) < window:
            return False
        falls, margins = self._column(0)[-window:], self._column(1)[-window:]
        grown = CLEAR * _noise(margins) if self._first else 0.0  # a reference's margin begins at exactly 0
        return median(falls) >= max(FALL, CLEAR * _noise(falls)) and median(margins) > grown

    @property
    def line(self) -> str:
        lost = 100 * median(self._column(0)[-WINDOW:])
        return (
            f"the chosen answers have lost {lost:.0f} % of their log-probability while margins grew (likelihood"
            " displacement): begin again with a lower --learning-rate, a higher --beta, or nll added to --loss"
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._first = state.get("first", [])


def _noise(series: Sequence[float]) -> float:
    """The standard deviation of a step around whatever trend there is, from the median change between neighbours."""
    return 1.4826 / math.sqrt(2) * median(abs(b - a) for a, b in pairwise(series))


def _kendall(series: Sequence[float]) -> float:
    """Kendall's tau (a) of a series with time: 1 where it only climbs, -1 where it only falls."""
    pairs = [(b > a) - (b < a) for a, b in combinations(series, 2)]
    return sum(pairs) / len(pairs)
