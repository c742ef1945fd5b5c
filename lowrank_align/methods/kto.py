"""Kahneman-Tversky optimisation: single answers that are good or bad, no pairs (arXiv 2402.01306)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_align.base import Base
from lowrank_align.config import KTOSettings
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.methods.method import Method, Retry, assert_policy_is_reference
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.unpaired import kto, reference_point
from lowrank_align.trees import Completion, TreeRow

UNEVEN = 1.5  # beyond this ratio a line says so; the paper takes good over bad between 1 and 4/3


class KTO(Method[KTOSettings, TreeRow]):
    # ---- data

    shapes = frozenset({Shape.unpaired})

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: KTOSettings) -> Rendered:
        rendered = renderer.tree_row(row)
        return replace(rendered, tree=rendered.tree and replace(rendered.tree, label=row.label))

    # ---- roles

    trained = ("policy",)

    def __init__(self, base: Base, settings: KTOSettings, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.kl = torch.zeros((), device=base.device)  # z0 of the batch
        self.of_label = {True: 0, False: 0}  # rows of the batch

    def add_roles(self) -> None:
        self.policy_from_settings()
        self.base.add_role("reference", frozen_copy_of="policy")

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[TreeRow]]:
        """The rows, once z0 is known: it is the whole batch's, so it comes before any of its micro-batches."""
        self._look_at_batch(rows, retry)
        yield rows

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Rows."""
        return float(len(items))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        s, batch = self.settings, self.base.collate(list(items))
        good = torch.tensor([row.label for row in items], dtype=torch.bool, device=self.base.device)
        with self.base.role("reference"):
            ref_logps = self.base.token_logps(batch).sum(1)
        with self.base.role("policy"):
            policy = self.base.token_scores(batch)
            outcome = kto(
                policy.logps - ref_logps, good, self.kl, beta=s.beta,
                desirable_weight=s.desirable_weight, undesirable_weight=s.undesirable_weight,
            )  # fmt: skip
            loss = outcome.loss.sum() / weight
            self.backward(loss)
        for name, mask in (("chosen", good), ("rejected", ~good)):
            metrics.mean(f"rewards/{name}", outcome.rewards, mask)
            metrics.mean(f"logps/{name}", policy.logps, mask)
        if all(self.of_label.values()):  # the mean over the good less that over the bad, in parts that add up
            shares = torch.where(good, 1 / self.of_label[True], -1 / self.of_label[False])
            metrics.total("rewards/margins", (shares * outcome.rewards).sum())
        metrics.mean("kl", self.kl)
        metrics.mean("entropy", policy.entropy, batch.completion_mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach()

    @torch.no_grad()
    def _look_at_batch(self, rows: Sequence[TreeRow], retry: Retry) -> None:
        """z0, and how many rows are good and bad."""
        mismatched = mismatch(rows, self.settings.max_length)

        def logratios(mine: Sequence[TreeRow], size: int) -> list[Tensor]:
            found: list[Tensor] = []
            for start in range(0, len(mine), size):
                batch, logps = self.base.collate(list(mine[start : start + size])), []
                for name in ("policy", "reference"):
                    with self.base.role(name):
                        logps.append(self.base.token_logps(batch).sum(1))
                found += logps[0] - logps[1]
                self.base.turns.give_way()
            return found

        found = self.by_share(mismatched, logratios, retry)
        self.kl = reference_point(torch.stack(found)) if found else torch.zeros_like(self.kl)
        good = sum(bool(row.label) for row in rows)
        self.of_label = {True: good, False: len(rows) - good}

    # ---- evaluation

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """The loss and the metrics on held-out rows, with their own z0."""
        self._look_at_batch(rows, retry)
        return super().evaluate(rows, retry)

    # ---- before and after

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        assert_policy_is_reference(self.base, rows)
        if line := imbalance(rows, self.settings):
            self.tell(line)


def imbalance(rows: Sequence[TreeRow], settings: KTOSettings) -> str | None:
    """A line where weight x number of the good rows is far from that of the bad ones (section 4.2 of the paper)."""
    good = sum(bool(row.label) for row in rows)
    bad = len(rows) - good
    if not (good and bad):
        only = "good" if good else "bad"
        return f"all {len(rows)} rows are {only}: nothing holds against it; rows of both kinds teach what differs"
    weights = settings.desirable_weight * good, settings.undesirable_weight * bad
    if min(weights) == 0 or max(weights) / min(weights) <= UNEVEN:
        return None
    name, even = (
        ("--undesirable-weight", weights[0] / bad)
        if weights[0] > weights[1]
        else ("--desirable-weight", weights[1] / good)
    )
    return f"{good} good rows and {bad} bad ones do not weigh alike; {name} {even:.3g} would make them"


def mismatch(rows: Sequence[TreeRow], max_length: int) -> list[TreeRow]:
    """Each prompt with the answer of the row before it, the first with the last's, cut to `max_length` tokens.

    As TRL 1.16 turns its batches round by one, so that z0 and the rewards are of the same answers. Of a single row
    there is no other answer: nothing, and z0 is 0.
    """
    if len(rows) < 2:
        return []
    found = []
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        room, answer = max_length - len(row.prompt_ids), other.completions[0]
        found.append(TreeRow(row.prompt_ids, [Completion(answer.ids[:room], answer.mask[:room])]))
    return found
