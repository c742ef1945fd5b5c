"""What is compared: a line a method, with the knob that draws its curve and the learning rates that are tried."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from lowrank_align.config import METHODS
from lowrank_align.errors import UserError, nearest

RATE_GRID = (0.3, 1.0, 3.0)  # times an entry's own learning rate
BEST_OF, BEST_OF_QUICK = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16)
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25)
LOOKS = 6  # how often on its way a training is looked at
FURTHER = 3  # over-optimisation: so many times the budget
DATA_SHARES, RANKS = (0.125, 0.25, 0.5, 1.0), (1, 4, 16, 64)


@dataclass(frozen=True)
class Entry:
    """One method in the comparison."""

    name: str
    label: str
    method: str
    rate: float  # tiny's learning rate; another model starts from its preset's, or the method's default
    knobs: dict[str, Any] = field(default_factory=dict)  # for any model
    on_tiny: dict[str, Any] = field(default_factory=dict)  # sizes that suit a model of half a million parameters
    sweep: str | None = None  # the knob that draws the curve
    values: tuple[Any, ...] = (None,)
    chosen: int = 0  # which of the values the learning rate is tuned at, and the other panels show
    reward: Literal["learned", "exact"] | None = None  # of methods that sample by themselves
    watched: bool = False  # looked at on its way
    warm: bool = False  # asked at several temperatures
    further: int = 1  # times the budget, for over-optimisation
    rate_of: str | None = None  # takes the learning rate that was tuned for this entry
    quick: bool = False

    @property
    def middle(self) -> Any:
        """The value of the sweep that stands for the method."""
        return self.values[self.chosen]


PAIRED = {"batch_size": 16, "micro_batch_size": 16}
SAMPLED = {"micro_batch_size": 32, "rollout_batch_size": 64}
ON_PPO = SAMPLED | {"batch_size": 64, "minibatches": 2, "ppo_epochs": 2}

ENTRIES: tuple[Entry, ...] = (
    Entry("preferred_ft", "Preferred-FT", "dpo", 5e-4, {"loss": ["nll"]}, PAIRED, watched=True, warm=True, quick=True),
    Entry("unlikelihood", "unlikelihood", "dpo", 1e-4, {"loss": ["unlikelihood"]}, PAIRED),
    Entry("token_unlikelihood", "unlikelihood, per token", "dpo", 3e-5, {"loss": ["token_unlikelihood"]}, PAIRED),
    Entry("dpo", "DPO", "dpo", 3e-4, {}, PAIRED, "beta", (1.0, 0.3, 0.1, 0.05), 1, watched=True, warm=True, quick=True),
    Entry("cpl", "CPL", "dpo", 3e-4, {"loss": ["cpl"]}, PAIRED, "cpl_alpha", (0.3, 0.1, 0.03, 0.01), 2),
    Entry("condition", "conditioning", "condition", 1e-3, {}, PAIRED),
    Entry("coh", "CoH", "coh", 1e-3, {}, PAIRED),
    Entry("ppo", "PPO, learned reward", "ppo", 1e-3, {}, ON_PPO, "kl_coefficient", (0.3, 0.1, 0.03), 1,
          reward="learned", watched=True, warm=True, quick=True),
    Entry("ppo_exact", "PPO, exact reward", "ppo", 1e-3, {}, ON_PPO, "kl_coefficient", (0.3, 0.1, 0.03), 1,
          reward="exact", warm=True),
    Entry("grpo", "GRPO", "grpo", 1e-3, {}, SAMPLED | {"batch_size": 8, "group_size": 8}, "beta", (0.3, 0.1, 0.03), 1,
          reward="learned", watched=True, warm=True),
    Entry("expert", "expert iteration", "expert", 1e-3, {}, SAMPLED | {"batch_size": 16, "group_size": 8},
          reward="learned", watched=True, warm=True),
    Entry("quark", "Quark", "quark", 1e-3, {}, SAMPLED | {"batch_size": 32}, "beta", (0.3, 0.05), 1, reward="learned"),
    # over-optimisation: on and on, with little to hold the policy back
    Entry("dpo_on", "DPO, small beta", "dpo", 3e-4, {"beta": 0.03}, PAIRED, watched=True, further=FURTHER,
          rate_of="dpo", quick=True),
    Entry("ppo_on", "PPO, small KL price", "ppo", 1e-3, {"kl_coefficient": 0.003}, ON_PPO, reward="learned",
          watched=True, further=FURTHER, rate_of="ppo", quick=True),
)  # fmt: skip
BEST_OF_NAME = "best_of_n"
OVER_OPTIMISED = ("dpo_on", "ppo_on")


def present(entry: Entry) -> bool:
    """Whether this installation has the entry's method."""
    if entry.method not in METHODS:
        return False
    return find_spec(f"lowrank_align.methods.{entry.method.replace('-', '_')}") is not None


def chosen_entries(only: Sequence[str] | None, quick: bool) -> tuple[list[Entry], list[Entry]]:
    """(entries to run, entries whose method is not there). UserError for a name that no entry has."""
    names = [entry.name for entry in ENTRIES] + [BEST_OF_NAME]
    for name in only or ():
        if name not in names:
            raise UserError(f"only: {name}: no such entry{nearest(name, names)} (there are: {', '.join(names)})")
    wanted = [e for e in ENTRIES if (e.name in only if only is not None else e.quick or not quick)]
    return [e for e in wanted if present(e)], [e for e in wanted if not present(e)]
