"""DPO on the policy's own answers, the best against the worst of a group by score (Guo et al. 2024, arXiv 2402.04792).

Left out: a judge that compares the two directly; here whoever scores higher is chosen, and equal scores are a tie.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from lowrank_align.config import OnlineDPOSettings
from lowrank_align.methods.method import Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import OnlineMethod, group_row
from lowrank_align.objectives.paired import Side, by_preference, hinge, ipo, outcome, sigmoid
from lowrank_align.rollout import Rollout
from lowrank_align.tensors import masked
from lowrank_align.trees import Comparison, TreeRow, collate_comparisons

LOSSES = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


class OnlineDPO(OnlineMethod[OnlineDPOSettings, TreeRow]):
    # ---- roles

    trained = ("policy",)

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[TreeRow]]:
        """The best and the worst answer of each prompt; a prompt whose answers are all the same text has no pair."""
        groups = self.roll_out(rows, step, retry)
        judged = self.judge(rows, groups, retry)
        pairs = [pair_of(group, s) for group, s in zip(groups, self.grouped(judged.scores).tolist(), strict=True)]
        kept = [pair for pair in pairs if pair is not None]
        self.measured = self.measure(judged, None) | {"pairs/identical": float(len(pairs) - len(kept))}
        yield kept

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Pairs."""
        return float(len(items))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        s = self.settings
        batch, pairs = self.base.collate(list(items)), collate_comparisons(items, self.base.device)
        mask = batch.completion_mask
        with self.base.role("reference"):
            ref_logps = self.base.token_logps(batch, temperature=s.temperature)
        with self.base.role("policy"):
            scores = self.base.token_scores(batch, temperature=s.temperature)
            answers = Side(scores.per_token_logps, mask, ref_logps)
            first, second = answers.at(pairs.first), answers.at(pairs.second)
            loss = by_preference(partial(LOSSES[s.loss], beta=s.beta), first, second, pairs.preference).sum() / weight
            self.backward(loss)
        logratios = masked(scores.per_token_logps - ref_logps, mask).sum(dim=1).detach()
        seen = outcome(s.beta * logratios[pairs.first], s.beta * logratios[pairs.second], pairs.preference)
        metrics.mean("objective/kl", logratios)  # of the two answers that are learned from
        metrics.mean("rewards/chosen", seen.chosen, seen.decided)
        metrics.mean("rewards/rejected", seen.rejected, seen.decided)
        metrics.mean("rewards/margins", seen.margins, seen.decided)
        metrics.mean("rewards/accuracies", seen.accuracies, seen.decided)
        metrics.mean("pairs/tied", (~seen.decided).float())
        metrics.mean("entropy", scores.entropy, mask)
        return loss.detach()

    # ---- before and after

    def preflight_items(self, trees: list[TreeRow]) -> list[TreeRow]:
        return [TreeRow(tree.prompt_ids, tree.completions[:2], (Comparison(0, 1),)) for tree in trees]


def pair_of(group: Sequence[Rollout], scores: Sequence[float]) -> TreeRow | None:
    """The group's best answer before its worst other text, preference 1, or .5 where both score the same.

    None where all answers are the same tokens: there is nothing to prefer.
    """
    best = max(range(len(group)), key=lambda i: scores[i])
    others = [i for i in range(len(group)) if group[i].ids != group[best].ids]
    if not others:
        return None
    worst = min(others, key=lambda i: scores[i])
    row = group_row([group[best], group[worst]])
    return TreeRow(row.prompt_ids, row.completions, (Comparison(0, 1, 1.0 if scores[best] > scores[worst] else 0.5),))
