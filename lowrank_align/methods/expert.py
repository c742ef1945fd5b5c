"""Expert iteration: answers are sampled, the best of each prompt is learned, and again (arXiv 1705.08439).

For language models as in AlpacaFarm (arXiv 2305.14387) and rejection sampling fine-tuning (Llama 2, arXiv 2307.09288,
section 3.2.3), there in rounds of whole data sets, here in every step. Nothing holds the policy to where it began.
Left out: keeping several answers of a prompt, or only those above a threshold.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lowrank_align.config import ExpertSettings
from lowrank_align.methods.method import Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import OnlineMethod, group_row
from lowrank_align.objectives.completion import nll
from lowrank_align.tensors import reduce
from lowrank_align.trees import TreeRow


class Expert(OnlineMethod[ExpertSettings, TreeRow]):
    # ---- roles

    trained = ("policy",)

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[TreeRow]]:
        """The best answer to each prompt; of equally good ones the first."""
        groups = self.roll_out(rows, step, retry)
        judged = self.judge(rows, groups, retry)
        best = self.grouped(judged.scores).argmax(dim=1)
        best_scores = self.grouped(judged.raw).gather(1, best[:, None])
        self.measured = self.measure(judged, None) | {"objective/best_scores": best_scores.mean().item()}
        yield [group_row([group[i]]) for group, i in zip(groups, best.tolist(), strict=True)]

    def weight(self, items: Sequence[TreeRow]) -> float:
        """Tokens: every token of the kept answers weighs the same, as in SFT."""
        return float(sum(len(row.completions[0].ids) for row in items))

    def step(self, items: Sequence[TreeRow], weight: float, metrics: Metrics) -> Tensor:
        batch = self.base.collate(list(items))
        with self.base.role("policy"):
            policy = self.base.token_scores(batch, temperature=self.settings.temperature)
            losses = nll(policy.per_token_logps, batch.completion_mask).loss
            loss = reduce(losses, batch.completion_mask, "token_mean", weight)
            self.backward(loss)
        metrics.mean("mean_token_accuracy", policy.is_top, batch.completion_mask)
        metrics.mean("entropy", policy.entropy, batch.completion_mask)
        metrics.total("num_tokens", batch.num_tokens.sum())
        return loss.detach()

    # ---- before and after

    def preflight_items(self, trees: list[TreeRow]) -> list[TreeRow]:
        return [TreeRow(tree.prompt_ids, tree.completions[:1]) for tree in trees]
