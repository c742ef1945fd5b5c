"""`rounds.json`: what each round brought, and the settings that all of them share."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_align.config import RoundsSettings
from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.json_files import read_json
from lowrank_align.links import refuse_links

RECORD = "rounds.json"
# What may differ when rounds go on: how many, who waits for how much, and where it runs.
MAY_CHANGE = {"rounds", "min_judgements", "device", "attention", "out"}


@dataclass(frozen=True)
class RoundResult:
    """What came of one round. None: not measured (no held-out prompts, no exact score, no reward model)."""

    number: int
    pairs: int  # new ones
    trained_on: int  # pairs, of all rounds so far unless told otherwise; 0 for a method that samples by itself
    as_scored: float | None  # share of the new pairs that the exact score agrees with
    reward_accuracy: float | None  # on the pairs that it was trained on, as its last step saw it
    judge: str | None  # who says what the answers are worth: the score function, or the round's reward model
    score: float | None  # mean over held-out prompts, of the new policy's answers
    score_before: float | None  # of the policy before, by the same judge
    wins: float | None  # against the policy before, a tie half
    kl: float | None  # to the policy before, nats an answer


class Record:
    """The rounds of a folder so far.

    UserError where they were made by other settings, or where the folder holds something else or links.
    """

    def __init__(self, out: Path, settings: RoundsSettings) -> None:
        self.file = out / RECORD
        self.settings = {k: v for k, v in settings.model_dump(mode="json").items() if k not in MAY_CHANGE}
        self.rounds: list[RoundResult] = []
        if self.file.is_file():
            refuse_links(out.rglob("*"))
            self._read(out)
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: holds files that no rounds wrote; choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{out}: cannot be made: {error.strerror}") from error
        self._write()

    def add(self, result: RoundResult) -> None:
        """From here on the round is not done again."""
        self.rounds.append(result)
        self._write()

    def _read(self, out: Path) -> None:
        try:
            content: dict[str, Any] = read_json(self.file)
            was, rounds = content["settings"], [RoundResult(**one) for one in content["rounds"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file}: damaged ({type(error).__name__}); choose another --out") from None
        for name, now in self.settings.items():
            if was.get(name) != now:
                raise UserError(
                    f"{out}: {name}: the rounds in there have {was.get(name)!r}, not {now!r}; choose another --out"
                )
        self.rounds = rounds

    def _write(self) -> None:
        content = {"settings": self.settings, "rounds": [asdict(one) for one in self.rounds]}
        write_atomic(self.file, json.dumps(content, indent=1) + "\n")
