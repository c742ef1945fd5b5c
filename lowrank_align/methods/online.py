"""What the methods that sample answers share: prompts in, rollouts, what they are worth, figures about a round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank_align.alarms import HackingWatch, KLWatch
from lowrank_align.base import Base
from lowrank_align.config import OnlineSettings
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.errors import NoNumbers
from lowrank_align.methods.method import Item, Method, Retry, assert_policy_is_reference
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.rollout import penalise_unfinished
from lowrank_align.rewards import Rewards, seen_answer, seen_prompt
from lowrank_align.rollout import Rollout, fill_cache, generator_for, sample
from lowrank_align.rollout_server import ServedRollouts
from lowrank_align.trees import Completion, TreeRow, longest_rows

OnlineSettingsT = TypeVar("OnlineSettingsT", bound=OnlineSettings)


@dataclass(frozen=True)
class Judged:
    """What N rollouts are worth; all (N,), without gradient."""

    scores: Tensor  # what is optimised: the weighted rewards less the penalties
    raw: Tensor  # the weighted rewards alone
    finished: Tensor  # bool
    lengths: Tensor  # tokens


class OnlineMethod(Method[OnlineSettingsT, Item]):
    """A method on prompts: it samples answers from the policy, has them scored, and learns from that."""

    # ---- data

    shapes = frozenset({Shape.prompts})

    @staticmethod
    def render(row: Row, renderer: Renderer, settings: OnlineSettings) -> Rendered:
        ids = renderer.prompt_ids(row)
        if len(ids) + settings.max_new_tokens > settings.max_length:
            return Rendered(None, f"prompt of {len(ids)} tokens leaves no room for {settings.max_new_tokens} new ones")
        return Rendered(
            TreeRow(ids, [], index=row.index, prompt_text=seen_prompt(row), chat=not isinstance(row.prompt, str))
        )

    # ---- roles

    def __init__(self, base: Base, settings: OnlineSettingsT, renderer: Renderer) -> None:
        super().__init__(base, settings, renderer)
        self.rewards = Rewards(base, settings.reward, settings.reward_weights)
        self.measured: dict[str, float] = {}
        self.group_size: int = getattr(settings, "group_size", 1)  # answers a prompt
        self.hacking = HackingWatch()
        price = "--kl-coefficient" if hasattr(settings, "kl_coefficient") else "--beta"
        self.blow_up = KLWatch(price, getattr(settings, "target_kl", None))
        self.said_unwatched = self.said_equal = False
        self.served: ServedRollouts | None = None  # who draws the rollouts, where it is a server
        if settings.rollout_server is not None:
            self.served = ServedRollouts(settings, self.group_size, renderer.end_ids)

    def add_roles(self) -> None:
        self.policy_from_settings()
        if self.settings.needs_reference:
            self.base.add_role("reference", frozen_copy_of="policy")
        self.rewards.add_roles()

    # ---- a round

    def roll_out(self, rows: Sequence[TreeRow], step: int | str, retry: Retry) -> list[list[Rollout]]:
        """`group_size` answers of the policy to each row's prompt, drawn by the step's own generator."""
        s = self.settings
        if self.served is not None:
            return self.served.roll_out(
                self.base, rows, step,
                lambda groups, temperature: self.logps_of("policy", list(map(group_row, groups)), retry, temperature),
                self.tell,
            )  # fmt: skip

        def draw(mine: Sequence[int], size: int) -> list[list[Rollout]]:
            with self.base.role("policy"):
                return sample(
                    self.base,
                    [row.prompt_ids for row in rows],
                    end_ids=self.renderer.end_ids,
                    max_new_tokens=s.max_new_tokens,
                    generator=generator_for(self.base.device, s.seed, step, "rollouts"),
                    temperature=s.temperature,
                    completions_per_prompt=self.group_size,
                    batch_size=size,
                    only=mine,
                )

        return self.by_share(range(len(rows)), draw, retry, "rollout_batch_size")

    @torch.no_grad()
    def judge(self, rows: Sequence[TreeRow], groups: Sequence[Sequence[Rollout]], retry: Retry) -> Judged:
        """The scores of all rollouts, group after group; within one, the same tokens have the first one's score.

        Side by side in a batch they may differ in the last digits, which advantages would take for a difference.
        """
        s, device = self.settings, self.base.device
        flat = [rollout for group in groups for rollout in group]
        judged = [self.as_judged(group) for group in groups]
        found = self.by_share(judged, lambda mine, size: [self.rewards.of_trees(mine, size)], retry)
        parts = {run: torch.cat([part[run] for part in found]) for run in self.rewards.roles}
        if self.rewards.functions:
            prompts = [row.prompt_text for row, group in zip(rows, groups, strict=True) for _ in group]
            chats = [row.chat for row, group in zip(rows, groups, strict=True) for _ in group]
            texts = [seen_answer(self.renderer, r.ids, chat=chat) for r, chat in zip(flat, chats, strict=True)]
            parts = parts | self.workers.of_first(lambda: self.rewards.of_texts(prompts, texts))
        raw = self.rewards.total(parts)[first_alike(groups)]
        for name, scores in {**parts, "the weighted sum of rewards": raw}.items():
            if not scores.isfinite().all():
                at = int(scores.isfinite().logical_not().nonzero()[0])
                prompt = rows[at // self.group_size].prompt_text
                raise NoNumbers(f"{name} gave {scores[at]:.3g} for an answer to the prompt {prompt[:80]!r}")
        finished = torch.tensor([r.finished for r in flat], device=device)
        lengths = torch.tensor([len(r.ids) for r in flat], device=device)
        scores = penalise_unfinished(raw, finished, s.missing_eos_penalty) - s.length_penalty * lengths
        self.measured = {f"rewards/{name}": part.mean().item() for name, part in parts.items() if len(parts) > 1}
        return Judged(scores, raw, finished, lengths)

    def as_judged(self, group: Sequence[Rollout]) -> TreeRow:
        """A prompt's rollouts for a reward model: it has never seen the text before the answer."""
        row = group_row(group)
        return replace(row, prompt_ids=row.prompt_ids[: len(row.prompt_ids) - len(self.renderer.prefix_ids)])

    @torch.no_grad()
    def logps_of(self, role: str, trees: Sequence[TreeRow], retry: Retry, temperature: float | None = None) -> Tensor:
        """(N, C) log-probabilities of all completions under a role, by the training path; 0 on padding.

        At the rollouts' temperature, unless another is given.
        """
        temperature = self.settings.temperature if temperature is None else temperature

        def score(mine: Sequence[TreeRow], size: int) -> list[Tensor]:
            found: list[Tensor] = []
            for start in range(0, len(mine), size):
                batch = self.base.collate(list(mine[start : start + size]))
                with self.base.role(role):
                    logps = self.base.token_logps(batch, temperature=temperature)
                found += [row[:length] for row, length in zip(logps, batch.num_tokens.tolist(), strict=True)]
                self.base.turns.give_way()
            return found

        return pad_sequence(self.by_share(trees, score, retry), batch_first=True)

    def measure(self, judged: Judged, kl: Tensor | None) -> dict[str, float]:
        """TRL's figures about a round; `kl` (N,) in nats an answer, estimated on the rollouts, where there is one."""
        found = self.measured | (self.served.figures if self.served else {})
        found |= {
            "objective/scores": judged.raw.mean().item(),
            "completions/mean_length": judged.lengths.float().mean().item(),
            "completions/finished": judged.finished.float().mean().item(),
        }
        if self.group_size > 1:
            scores = self.grouped(judged.scores)
            found["reward_std"] = scores.std(dim=1).mean().item()
            without_variance = scores.max(dim=1).values == scores.min(dim=1).values
            found["frac_reward_zero_std"] = without_variance.float().mean().item()  # such a group teaches nothing
        return found if kl is None else found | {"objective/kl": kl.mean().item()}

    def grouped(self, per_answer: Tensor) -> Tensor:
        """(B, G) of (N,): the answers of each prompt side by side."""
        return per_answer.view(-1, self.group_size)

    def watch(self, figures: dict[str, float]) -> dict[str, float]:
        kl = figures.get("objective/kl")
        if not self.settings.needs_reference and not self.said_unwatched:
            self.tell("no KL is measured, so nothing watches for an exploited reward: read samples.jsonl")
            self.said_unwatched = True
        if figures.get("frac_reward_zero_std") == 1 and not self.said_equal:
            self.tell(
                "in this step the answers of every prompt had equal scores: nothing in them says what is better; if it"
                " goes on, look at the reward, or raise --temperature or --group-size"
            )
            self.said_equal = True
        if kl is None:
            return {}
        length = figures["completions/mean_length"]
        return self.sound(self.hacking, self.hacking.add(figures["objective/scores"], kl, length)) | self.sound(
            self.blow_up, self.blow_up.add(kl, length)
        )

    def state(self) -> dict[str, Any]:
        return {"hacking": self.hacking.state_dict(), "blow_up": self.blow_up.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.hacking.load_state_dict(state.get("hacking", {}))
        self.blow_up.load_state_dict(state.get("blow_up", {}))

    def round_metrics(self) -> dict[str, float]:
        return self.measured

    # ---- evaluation

    monitor = ("objective/scores", max)

    def evaluate(self, rows: Sequence[TreeRow], retry: Retry) -> dict[str, float]:
        """Score and KL of rollouts on held-out prompts."""
        kept = self.measured
        groups = self.roll_out(rows, "evaluation", retry)
        judged, trees = self.judge(rows, groups, retry), [group_row(group) for group in groups]
        kl = None
        if self.settings.needs_reference:  # on a shared base another run's may lie there still
            kl = (self.logps_of("policy", trees, retry) - self.logps_of("reference", trees, retry)).sum(1)
        found = self.measure(judged, kl)
        self.measured = kept
        return found

    # ---- before and after

    def asked(self, row: TreeRow) -> list[int]:
        return row.prompt_ids  # the answer prefix stands at its end already

    def check_start(self, rows: Sequence[TreeRow]) -> None:
        if self.settings.needs_reference:
            end = Completion(self.renderer.end_ids[:1], [True])
            assert_policy_is_reference(self.base, [TreeRow(row.prompt_ids, [end]) for row in rows[:2]])

    def longest_answers(self, rows: Sequence[TreeRow]) -> list[TreeRow]:
        """These prompts as if each had got a group of the longest answers."""
        length = self.settings.max_new_tokens
        answer = Completion(self.renderer.end_ids[:1] * length, [True] * length)
        return [TreeRow(row.prompt_ids, [answer] * self.group_size) for row in rows]

    def preflight(self, rows: Sequence[TreeRow]) -> None:
        items = self.preflight_items(self.longest_answers(rows))
        self.step(items, self.weight(items), Metrics())

    def preflight_items(self, trees: list[TreeRow]) -> Sequence[Item]:
        """Items of a round that these rollouts would have given, figures of no meaning in them."""
        raise NotImplementedError

    def close(self) -> None:
        if self.served is not None:
            self.served.close()

    def preflight_rollouts(self, rows: Sequence[TreeRow], retry: Retry) -> None:
        if self.served is not None:
            return
        prompts = [
            row.prompt_ids for row in longest_rows(rows, self.settings.batch_size) for _ in range(self.group_size)
        ]
        with self.base.role("policy"):
            retry(
                lambda size: fill_cache(self.base, prompts[:size], self.settings.max_new_tokens), "rollout_batch_size"
            )


def group_row(group: Sequence[Rollout]) -> TreeRow:
    """A prompt's rollouts as one tree row: the prompt is computed once for all of them."""
    return TreeRow(group[0].prompt_ids, [Completion(r.ids, [True] * len(r.ids)) for r in group])


def first_alike(groups: Sequence[Sequence[Rollout]]) -> list[int]:
    """For every rollout, group after group, the place of the first one of its group with the same tokens."""
    places: list[int] = []
    for group in groups:
        first: dict[tuple[int, ...], int] = {}
        begin = len(places)
        places += [first.setdefault(tuple(rollout.ids), begin + i) for i, rollout in enumerate(group)]
    return places
