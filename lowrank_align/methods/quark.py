"""Quark: answers sorted into quantiles of score, each learned behind a text that names its own (arXiv 2205.13636).

A step explores with the text of the best quantile, scores, sorts the pool of the last steps' answers anew, and goes
through it once, in as many updates as the pool has steps:

    -log pi(y_t | x, text_k, y_<t) + beta KL( ref(. | x, y_<t) || pi(. | x, text_k, y_<t) )

The KL is exact over the vocabulary at every token, from the reference to the policy as in the paper; the reference is
asked without the text (of a run that goes on, behind that adapter's own). Until the pool is full answers are drawn
without a text: behind one that means nothing yet they are far from the reference, and learned all the same.
The texts are plain, not new tokens: a frozen base learns none.
Left out: a pool without end (the last `pool_steps` steps stay), drawing the same number from every quantile, the
entropy bonus of the authors' code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.config import QuarkSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.errors import UserError
from lowrank_align.memory import release_unused
from lowrank_align.methods.method import Retry
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online import OnlineMethod
from lowrank_align.objectives.completion import nll
from lowrank_align.objectives.quantiles import quantiles
from lowrank_align.rollout import Rollout, generator_for
from lowrank_align.scoring import token_kl, token_scores
from lowrank_align.tensors import reduce
from lowrank_align.trees import Completion, TreeRow


@dataclass(frozen=True)
class Pooled:
    """An answer in the pool, with the step that drew it; JSON-able."""

    step: int
    prompt_ids: list[int]  # without any text before the answer
    ids: list[int]
    score: float


@dataclass(frozen=True)
class Sorted:
    """An answer of the pool behind its quantile's text, and as the reference gets it."""

    row: TreeRow
    plain: TreeRow
    quantile: int  # `quantiles` is the best


class Quark(OnlineMethod[QuarkSettings, Sorted]):
    # ---- data

    @staticmethod
    def answer_prefix(settings: Any) -> str:
        """The text of the best quantile."""
        return str(settings.texts[-1])

    # ---- roles

    trained = ("policy",)

    def __init__(self, base: Base, settings: QuarkSettings, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.text_ids = [renderer.with_prefix(text).prefix_ids for text in settings.texts]
        self.reference_ids = renderer.with_prefix(adapters.answer_prefix(settings.adapter)).prefix_ids
        self.pool: list[Pooled] = []

    def add_roles(self) -> None:
        super().add_roles()
        head = self.base.model.get_output_embeddings()
        if self.base.roles["policy"].adapter in getattr(head, "lora_A", {}):
            asked = f"adapter: {self.settings.adapter}" if self.settings.adapter else "target_modules"
            raise UserError(f"{asked}: adapts the output layer, and Quark's KL needs the base's own; leave it out")

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[Sorted]]:
        """New answers into the pool, old ones out, all of them sorted anew; then the pool once, in minibatches."""
        s = self.settings
        filling = step <= s.pool_steps + 1  # until then the texts mean too little to be asked with
        drawn = [replace(row, prompt_ids=self._plain(row)) for row in rows] if filling else list(rows)
        groups = self.roll_out(drawn, step, retry)
        self._add(rows, groups, step, retry)
        release_unused()
        scores = torch.tensor([one.score for one in self.pool], dtype=torch.float64)
        places = quantiles(scores, s.quantiles)
        best = places == s.quantiles
        self.measured |= {"quark/pool": float(len(self.pool)), "quark/share_of_best": best.double().mean().item()}
        if best.any():
            self.measured["quark/score_of_best"] = scores[best].mean().item()
        items = [self._sorted(one, place) for one, place in zip(self.pool, places.tolist(), strict=True)]
        order = torch.randperm(len(items), generator=generator_for(torch.device("cpu"), s.seed, step, "minibatches"))
        for part in order.tensor_split(min(self.updates_per_step, len(items))):
            yield [items[i] for i in part.tolist()]

    @property
    def updates_per_step(self) -> int:
        """One for each step that has answers in a full pool."""
        return self.settings.pool_steps + 1

    def weight(self, items: Sequence[Sorted]) -> float:
        """Tokens of the minibatch's answers."""
        return float(sum(len(item.row.completions[0].ids) for item in items))

    def step(self, items: Sequence[Sorted], weight: float, metrics: Metrics) -> Tensor:
        s, base = self.settings, self.base
        batch, plain = base.collate([item.row for item in items]), base.collate([item.plain for item in items])
        mask, ref_hidden = batch.completion_mask, None
        if s.needs_reference:
            with base.role("reference"), torch.no_grad():
                ref_hidden = base.hidden_states(plain)
        with base.role("policy"):
            hidden = base.hidden_states(batch)
            with base.autocast():
                policy = token_scores(hidden, batch, base.logits_head, temperature=s.temperature)
                losses = nll(policy.per_token_logps, mask).loss
                kl = torch.zeros_like(losses)
                if ref_hidden is not None:
                    kl = token_kl(hidden, batch, ref_hidden, plain, base.logits_head, temperature=s.temperature)
            loss = reduce(losses + s.beta * kl, mask, "token_mean", weight)
            self.backward(loss)
        best = torch.tensor([item.quantile == s.quantiles for item in items], device=mask.device)[:, None]
        metrics.mean("loss/nll", losses, mask)
        metrics.mean("loss/nll_of_best", losses, mask & best)
        if ref_hidden is not None:
            metrics.mean("loss/kl", kl, mask)
        metrics.mean("policy/entropy_avg", policy.entropy, mask)
        return loss.detach()

    # ---- the pool

    def _add(self, rows: Sequence[TreeRow], groups: list[list[Rollout]], step: int, retry: Retry) -> None:
        """The step's answers, scored, into the pool; out of it what is older than `pool_steps` steps."""
        self.measured = self._figures(rows, groups, retry)
        scores = self.judged.scores.tolist()
        new = [
            Pooled(step, self._without_text(row), rollout.ids, score)
            for row, (rollout,), score in zip(rows, groups, scores, strict=True)
        ]
        self.pool = [one for one in self.pool if step - one.step <= self.settings.pool_steps] + new

    def _figures(self, rows: Sequence[TreeRow], groups: list[list[Rollout]], retry: Retry) -> dict[str, float]:
        """What `measure` tells of answers, whichever text they were drawn behind; sets `judged`."""
        asked = [[replace(group[0], prompt_ids=row.prompt_ids)] for row, group in zip(rows, groups, strict=True)]
        self.judged = self.judge(rows, asked, retry)
        kl = None
        if self.settings.needs_reference:
            drawn = [_tree(rollout.prompt_ids, rollout.ids) for (rollout,) in groups]
            plain = [_tree(self._plain(row), rollout.ids) for row, (rollout,) in zip(rows, groups, strict=True)]
            kl = (self.logps_of("policy", drawn, retry) - self.logps_of("reference", plain, retry)).sum(1)
        return self.measure(self.judged, kl)

    def _sorted(self, one: Pooled, quantile: int) -> Sorted:
        text = self.text_ids[quantile - 1]
        plain = _tree([*one.prompt_ids, *self.reference_ids], one.ids)
        return Sorted(_tree([*one.prompt_ids, *text], one.ids), plain, quantile)

    def _without_text(self, row: TreeRow) -> list[int]:
        """A prompt as it was before the best quantile's text was put behind it."""
        return row.prompt_ids[: len(row.prompt_ids) - len(self.renderer.prefix_ids)]

    def _plain(self, row: TreeRow) -> list[int]:
        """A prompt as the reference gets it."""
        return [*self._without_text(row), *self.reference_ids]

    # ---- evaluation

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """Score and KL of answers behind the best quantile's text, to held-out prompts."""
        kept = self.measured
        found = self._figures(rows, self.roll_out(rows, "evaluation", retry), retry)
        self.measured = kept
        return found

    # ---- before and after

    def state(self) -> dict[str, Any]:
        return super().state() | {"pool": [asdict(one) for one in self.pool]}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.pool = [Pooled(**one) for one in state["pool"]]

    def preflight_items(self, trees: list[TreeRow]) -> list[Sorted]:
        return [Sorted(tree, replace(tree, prompt_ids=self._plain(tree)), self.settings.quantiles) for tree in trees]


def _tree(prompt_ids: list[int], ids: list[int]) -> TreeRow:
    return TreeRow(prompt_ids, [Completion(ids, [True] * len(ids))])
