"""A method's rollouts from a server: their seeds, and whether the server says what the policy would say."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lowrank_align.base import Base
from lowrank_align.config import OnlineSettings
from lowrank_align.rollout import Rollout, seed_of
from lowrank_align.rollout_server.client import RolloutServer
from lowrank_align.rollout_server.replies import Drawn
from lowrank_align.trees import TreeRow

SEED_BITS = 52  # what every reader of JSON keeps of a number
GAP_PROMPTS, GAP_WARNING_NATS = 4, 0.2

OwnLogps = Callable[[Sequence[Sequence[Rollout]], float], Tensor]  # of groups at a temperature: (answers, tokens)


class ServedRollouts:
    """Groups of answers from the server of `--rollout-server`; `figures` are those of the newest ones."""

    def __init__(self, settings: OnlineSettings, group_size: int, end_ids: Sequence[int]) -> None:
        self.settings, self.group_size, self.end_ids = settings, group_size, end_ids
        self.server = RolloutServer(settings)
        self.figures: dict[str, float] = {}
        self.told: set[str] = set()

    def roll_out(
        self, base: Base, rows: Sequence[TreeRow], step: int | str, own_logps: OwnLogps, tell: Callable[[str], None]
    ) -> list[list[Rollout]]:
        """`group_size` answers of the role `policy` to each row's prompt."""
        drawn = self.server.sample(
            base, [row.prompt_ids for row in rows], self.seeds(rows, step), end_ids=self.end_ids,
            completions_per_prompt=self.group_size, between=base.turns.give_way,
        )  # fmt: skip
        groups = [[one.rollout for one in group] for group in drawn]
        gap = self._gap(drawn[:GAP_PROMPTS], own_logps)
        self.figures = {} if gap is None else {"objective/sampler_gap": gap}
        for name, line in self._doubts(groups, gap):
            if name not in self.told:
                tell(f"--rollout-server: {line}")
                self.told.add(name)
        return groups

    def seeds(self, rows: Sequence[TreeRow], step: int | str) -> list[int]:
        """One for each row, by run, step and row, so that a resumed run asks for what it would have asked for.

        By the row, not its place: processes that share a step ask for different answers.
        """
        before, found = Counter[int](), []
        for row in rows:
            found.append(seed_of(self.settings.seed, step, "rollouts", row.index, before[row.index]) % 2**SEED_BITS)
            before[row.index] += 1
        return found

    def close(self) -> None:
        self.server.close()

    def _gap(self, drawn: Sequence[Sequence[Drawn]], own_logps: OwnLogps) -> float | None:
        """Mean |server's - own| log-prob of a token; None where the server gives none.

        Some servers give theirs before the temperature, some after it: the nearer is taken.
        """
        flat = [one for group in drawn for one in group]
        if all(one.logps is None for one in flat):
            return None
        groups, gaps = [[one.rollout for one in group] for group in drawn], []
        for temperature in {self.settings.temperature, 1.0}:
            pairs = zip(flat, own_logps(groups, temperature).cpu(), strict=True)
            apart = [torch.tensor(one.logps) - own[: len(one.logps)] for one, own in pairs if one.logps is not None]
            gaps.append(torch.cat(apart).abs().mean().item())
        return min(gaps)

    def _doubts(self, groups: Sequence[Sequence[Rollout]], gap: float | None) -> Iterable[tuple[str, str]]:
        """What looks wrong, by a name for each."""
        if gap is not None and gap > GAP_WARNING_NATS:
            far = f"its log-probs are {gap:.2g} nats a token from the policy's (objective/sampler_gap)"
            yield "gap", f"{far}; does it serve the same weights? These are not the answers of this policy"
        if self.server.guessed_ids:
            again = "they are tokenised again, which may give other tokens than were drawn"
            yield "text", f"it gives texts without token ids; {again}"
        if self.group_size > 1 and all(len({tuple(one.ids) for one in group}) == 1 for group in groups):
            yield "same", "every prompt got one answer again and again; does the server draw each anew?"
