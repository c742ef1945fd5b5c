"""What `make bench` compares: a method's rows, batch and steps, and the micro-batch at which each side is fastest."""

from dataclasses import dataclass
from typing import Any

LEARNING_RATE = 1e-4
BETA, GRPO_BETA = 0.1, 0.02
NEW_TOKENS, GROUP, PPO_EPOCHS = 64, 8, 4


@dataclass(frozen=True)
class Case:
    """One method at one precision with so many threads; the first step warms up and is not counted."""

    method: str  # sft_packed: as sft, the peer with its packing; dpo_top: ours with adapters on half of the layers
    quantize: str  # nf4 or none
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.method}-{self.quantize}-{self.threads}"

    @classmethod
    def named(cls, name: str) -> "Case":
        method, quantize, threads = name.rsplit("-", 2)
        return cls(method, quantize, int(threads))

    @property
    def rows(self) -> str:
        return {
            "sft": "demonstrations",
            "sft_packed": "demonstrations",
            "kto": "unpaired",
            "grpo": "grpo",
            "ppo": "ppo",
        }.get(self.method, "pairs")

    @property
    def batch(self) -> int:
        """Rows of a step: prompts, for GRPO and PPO."""
        return {"sft": 8, "sft_packed": 8, "grpo": 1, "ppo": 8}.get(self.method, 4)

    @property
    def steps(self) -> int:
        return {"ppo": 2, "grpo": 4}.get(self.method, 4)

    @property
    def unit(self) -> str:
        others = {"sft": "rows", "kto": "rows", "grpo": "answers", "ppo": "episodes", "sft_packed": "tokens"}
        return others.get(self.method, "pairs")

    @property
    def per_row(self) -> int:
        return GROUP if self.method == "grpo" else 1

    @property
    def micro_batch(self) -> dict[str, int]:
        """Ours and the peer's."""
        return MICRO_BATCH.get(self.method, {"ours": 1, "theirs": 1})


# Padding costs the peers more than a batch saves, so 1 but where a group is drawn, or KTO's mismatched pairs are made
# (TRL's z0 is over a micro-batch; ours is over the batch, so that of 4 the losses agree, and of TRL's fastest, 2, not).
MICRO_BATCH: dict[str, dict[str, int]] = {
    "kto": {"ours": 1, "theirs": 2},
    "grpo": {"ours": 8, "theirs": 8},
    "ppo": {"ours": 8, "theirs": 8},
}

METHODS = ("dpo", "dpo_top", "reward", "sft", "sft_packed", "kto", "grpo", "ppo")
TOP_LAYERS = 3  # of 6
PACKS = 2  # sequences of the whole context in a packed step: about the tokens of `batch` rows


def cases() -> list[Case]:
    """Every method unquantised and in NF4 with two threads; DPO and PPO with one thread too."""
    found = [Case(method, quantize) for method in METHODS for quantize in ("none", "nf4")]
    return found + [Case(method, "none", 1) for method in ("dpo", "ppo")]


def result(
    case: Case, marks: list[float], losses: list[float], peak: int, tokens: int = 0, **more: Any
) -> dict[str, Any]:
    """One measurement: `marks` are the moments at which the first step and each later one ended.

    `tokens` of the counted steps, where the two sides cut the rows into other steps.
    """
    counted = tokens or (len(marks) - 1) * case.batch * case.per_row
    return {"case": case.name, "seconds": marks[-1] - marks[0], "units": counted,
            "per_second": counted / (marks[-1] - marks[0]), "peak_bytes": peak, "losses": losses, **more}  # fmt: skip
