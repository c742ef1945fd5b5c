"""What the loop asks of a method."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lowrank_align import adapters
from lowrank_align.alarms import Alarm
from lowrank_align.base import Base
from lowrank_align.config import TrainSettings
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.errors import NumericError
from lowrank_align.memory import release_unused
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.completion import nll
from lowrank_align.rollout import generator_for, sample
from lowrank_align.runs import RunFolder
from lowrank_align.tensors import reduce
from lowrank_align.trees import TreeRow
from lowrank_align.workers import Workers

A = TypeVar("A")
B = TypeVar("B")
Item = TypeVar("Item")
SettingsT = TypeVar("SettingsT", bound=TrainSettings)

log = logging.getLogger(__name__)

START_TOLERANCE_NATS, START_ROWS = 1e-5, 2

# retry(f, knob) runs f(size) with the size that this setting names, halved while memory runs out
Retry = Callable[[Callable[[int], Any], str], Any]


@dataclass(frozen=True)
class PretrainRow:
    """A row of `pretrain_data` as a part of one optimiser update."""

    row: TreeRow
    update_tokens: int  # trained tokens of all such rows of the update: what their summed loss is divided by


class Method(ABC, Generic[SettingsT, Item]):
    """One method: which rows it takes, which roles it puts on the base, and one micro-batch's forward and backward."""

    shapes: ClassVar[frozenset[Shape]]
    trained: ClassVar[tuple[str, ...]] = ("policy",)  # what the optimiser moves; the first is the run's adapter

    def __init__(self, base: Base, settings: SettingsT, renderer: Renderer) -> None:
        self.base, self.settings, self.renderer = base, settings, renderer
        self.pretrain_rows: Sequence[TreeRow] = ()  # of `pretrain_data`; `train` puts them in
        self.workers = Workers()  # the processes of the run; `train` puts them in
        # The loop puts accelerate's in place of this, which knows about 16-bit gradient scaling.
        self.backward: Callable[[Tensor], None] = lambda loss: loss.backward()
        self.tell: Callable[[str], None] = log.warning  # the loop puts its progress's in place

    # ---- data

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: Any) -> Rendered:
        """One row of the file as tokens, or why it is dropped; needs no model."""
        return renderer.tree_row(row)

    @staticmethod
    def answer_prefix(settings: Any) -> str:
        """What stands before every answer, in training and ever after: it is saved with the run (`prompting.json`).

        A run that goes on from another's adapter asks as that one was trained.
        """
        return adapters.answer_prefix(settings.adapter) if settings.speaks else ""

    # ---- roles

    @abstractmethod
    def add_roles(self) -> None:
        """Put the method's roles on the base."""

    def learning_rates(self) -> dict[str, float]:
        """The peak learning rate of every trained role."""
        return dict.fromkeys(self.trained, self.settings.learning_rate)

    def policy_from_settings(self, name: str = "policy", *, head: bool = False) -> None:
        """The trained adapter: the one that `--adapter` names goes on, otherwise a new one."""
        s = self.settings
        self.base.add_role(
            name,
            start_from=s.adapter,
            rank=None if s.adapter else s.rank,
            alpha=s.alpha,
            dropout=s.lora_dropout,
            target_modules=s.target_modules,
            lora_layers=s.lora_layers,
            head=head,
            seed=s.seed,
        )

    # ---- step

    def round(self, rows: Sequence[TreeRow], step: int, retry: Retry) -> Iterator[Sequence[Item]]:
        """The batches of a step's optimiser updates: the rows themselves, once; PPO makes rollouts of them first."""
        yield rows  # type: ignore[misc]

    @property
    def updates_per_step(self) -> int:
        """How many batches `round` yields."""
        return 1

    def tokens(self, item: Item) -> int:
        """Of one item, so that micro-batches are made of like lengths."""
        row: Any = getattr(item, "row", item)
        return int(row.tokens)

    @abstractmethod
    def weight(self, items: Sequence[Item]) -> float:
        """What a whole batch's summed loss is divided by: its rows, or its tokens."""

    @abstractmethod
    def step(self, items: Sequence[Item], weight: float, metrics: Metrics) -> Tensor:
        """Forward and, where gradients are wanted, backward of one micro-batch; returns its part of the loss.

        The loss is summed over the items and divided by `weight`, so that parts add up to the whole batch's loss.
        """

    def by_share(
        self,
        items: Sequence[A],
        function: Callable[[Sequence[A], int], Sequence[B]],
        retry: Retry,
        knob: str = "micro_batch_size",
    ) -> list[B]:
        """`function(some, size)` of all items, a list that every process gets: each its share, `size` at once."""
        return self.workers.map(items, lambda mine: retry(lambda size: function(mine, size), knob))

    def draw_pretrain_rows(self, count: int, *place: int | str) -> list[PretrainRow]:
        """`count` rows of `pretrain_data` for one optimiser update; none without such data.

        A function of the seed and of `place` (step, update) alone, so that a resumed run draws the same.
        """
        if not self.pretrain_rows:
            return []
        generator = generator_for(torch.device("cpu"), self.settings.seed, *place, "pretrain")
        rounds = -(-count // len(self.pretrain_rows))  # each row once before one comes again
        orders = [torch.randperm(len(self.pretrain_rows), generator=generator) for _ in range(rounds)]
        rows = [self.pretrain_rows[i] for i in torch.cat(orders)[:count].tolist()]
        tokens = sum(sum(completion.mask) for row in rows for completion in row.completions)
        return [PretrainRow(row, tokens) for row in rows]

    def pretrain_step(self, rows: Sequence[PretrainRow], metrics: Metrics) -> Tensor:
        """Forward and backward of pretraining rows under the policy; returns their part of the loss.

        + gamma_ptx * mean over the update's tokens of -log pi(y_t | y_<t), gamma_ptx the `pretrain_coefficient`
        (InstructGPT, arXiv 2203.02155, eq. 2, there a sum over sequences).
        """
        if not rows:
            return torch.zeros((), device=self.base.device)
        release_unused()  # on CPU the heap of the pass before would otherwise lie beside that of this one
        batch = self.base.collate([part.row for part in rows])
        with self.base.role(self.trained[0]):
            losses = nll(self.base.token_scores(batch).per_token_logps, batch.completion_mask).loss
            loss = reduce(losses, batch.completion_mask, "token_mean", rows[0].update_tokens)
            loss = getattr(self.settings, "pretrain_coefficient", 1.0) * loss
            self.backward(loss)
        metrics.mean("loss/pretrain", losses, batch.completion_mask)
        return loss.detach()

    def round_metrics(self) -> dict[str, float]:
        """Numbers about the round as a whole (PPO's rollouts)."""
        return {}

    def watch(self, figures: dict[str, float]) -> dict[str, float]:
        """More figures, from all those of a step: for what shows only over several steps."""
        return {}

    def sound(self, alarm: Alarm, begins: bool) -> dict[str, float]:
        """The alarm as a figure, and its line where it begins."""
        if begins:
            self.tell(alarm.line)
        return {alarm.name: float(alarm.on)}

    def state(self) -> dict[str, Any]:
        """JSON-able values beside weights and optimiser that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    # ---- evaluation

    monitor: ClassVar[tuple[str, Callable[..., Any]]] = ("loss", min)  # what early stopping watches, and which way

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """The loss and the metrics on held-out rows; gradients are off."""

        mine = self.workers.share(rows)

        def measure(size: int) -> tuple[float, Metrics]:
            weight, total, seen = self.weight(rows), 0.0, Metrics()  # type: ignore[arg-type]
            for start in range(0, len(mine), size):
                total += self.step(mine[start : start + size], weight, seen).item()  # type: ignore[arg-type]
                self.base.turns.give_way()
            return total, seen

        loss, seen = Metrics.joined(self.workers.each(lambda: retry(measure, "micro_batch_size")))
        return {"loss": loss, **seen.results()}

    # ---- before and after

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        """What must hold before the first step; NumericError or UserError where it does not."""

    def preflight(self, rows: Sequence[TreeRow]) -> None:
        """Forward and backward of these rows, for the memory that they take; gradients are thrown away."""
        items: Any = rows
        self.step(items, self.weight(items), Metrics())

    def preflight_rollouts(self, rows: Sequence[TreeRow], retry: Retry) -> None:
        """The same for the answers that the method samples; it samples none."""

    def finish(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """What is left to measure on the training rows when the last step is done."""
        return {}

    def asked(self, row: TreeRow) -> list[int]:
        """What the policy gets to answer a row's prompt."""
        return [*row.prompt_ids, *self.renderer.prefix_ids]

    def samples(self, rows: Sequence[TreeRow], step: int) -> list[dict[str, Any]]:
        """The policy's answers to these rows' prompts, to print and keep."""
        room = self.base.context_tokens - self.settings.sample_tokens
        prompts = [row for row in rows if len(self.asked(row)) <= room]
        with self.base.role(self.trained[0]):
            answers = sample(
                self.base,
                [self.asked(row) for row in prompts],
                end_ids=self.renderer.end_ids,
                max_new_tokens=self.settings.sample_tokens,
                generator=generator_for(self.base.device, self.settings.seed, step, "samples"),
            )
        texts = [self.renderer.decode(answer[0].ids) for answer in answers]
        return [
            {"prompt": row.prompt_text or self.renderer.decode(row.prompt_ids), "completion": text}
            for row, text in zip(prompts, texts, strict=True)
        ]

    def close(self) -> None:
        """Give back what is held outside this process, however the run ended."""

    def save(self, run: RunFolder) -> str:
        """Write the trained adapter into the run; returns its hash."""
        return self.base.save_role(self.trained[0], run.adapter)


def assert_policy_is_reference(base: Base, rows: Sequence[TreeRow]) -> None:
    """At step 0 the policy *is* the reference: DPO's loss is ln 2 and PPO's KL is 0, or everything after is skewed."""
    batch = base.collate(list(rows[:START_ROWS]))
    logps = []
    for name in ("policy", "reference"):
        with base.role(name):
            logps.append(base.token_logps(batch))
    gap = (logps[0] - logps[1]).abs().max().item()
    if not gap <= START_TOLERANCE_NATS:
        raise NumericError(
            f"before the first step the policy differs from its reference by {gap:.2g} nats a token; not training"
        )
