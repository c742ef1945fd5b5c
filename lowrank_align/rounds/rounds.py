"""The loop over rounds, each in a folder of its own; what a round has finished is never done again."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.config import METHODS, RoundsSettings, TrainSettings, read_yaml, resolve
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.load import load_rows, split_off
from lowrank_align.errors import UserError, nearest
from lowrank_align.evaluate.answers import Asked, Side, draw
from lowrank_align.evaluate.comparing import kl, tied_where_alike
from lowrank_align.evaluate.win_rate import win_rate
from lowrank_align.methods import method_class
from lowrank_align.rewards import Rewards, load_function, seen_prompt
from lowrank_align.roles import BARE
from lowrank_align.rounds.collecting import (
    as_unpaired,
    judged_since,
    of_round,
    read_lines,
    simulate,
    together,
    write_lines,
)
from lowrank_align.rounds.record import Record, RoundResult
from lowrank_align.runs import read_state
from lowrank_align.train import train

PAIRS, COLLECTED = "pairs.jsonl", "collected.json"
DATA, PROMPTS, REWARD, POLICY = "data.jsonl", "prompts.jsonl", "reward", "policy"
BATCH = 16
OF_THE_MODEL = (
    "model", "preset", "quantize", "device", "dtype", "attention", "chat_template", "thinking", "max_length",
)  # fmt: skip


class Rounds:
    """Everything checked, the base loaded once. UserError for what a user can have got wrong, before any training."""

    def __init__(self, settings: RoundsSettings, tell: Callable[[str], None]) -> None:
        self.settings, self.tell = settings, tell
        self.out = Path(settings.out).expanduser()
        self._check_method()
        self.kind = METHODS[settings.method]
        self.samples = self.kind.rows_field == "prompts"
        self.refits = self.samples if settings.refit is None else settings.refit
        self.exact = load_function(settings.score) if settings.score else None
        self._train_settings(settings.method, settings.policy_config, self._policy_knobs(1), 1)
        if self.refits:
            self._train_settings("reward", settings.reward_config, {"data": "-"}, 1)
        self.record = Record(self.out, settings)
        rows = load_rows(settings.prompts, expect={Shape.prompts}).rows if settings.prompts else []
        self.base = Base.of(settings)
        self.renderer = Renderer(
            self.base.tokenizer,
            chat_template=settings.chat_template,
            max_length=min(settings.max_length, self.base.context_tokens),
            thinking=settings.thinking,
        )
        self.prompts, self.held_out = self._split(rows)

    def run(self) -> list[RoundResult]:
        """All rounds; those that are done from before are only read."""
        for number in range(1, self.settings.rounds + 1):
            if number <= len(self.record.rounds):
                self.tell(f"round {number}: done before")
            else:
                self.record.add(self._round(number))
        return self.record.rounds

    # ---- one round

    def _round(self, number: int) -> RoundResult:
        folder = self.out / f"round-{number}"
        before = self._policy_before(number)
        new = self._collect(number, folder, before)
        earlier = [read_lines(self.out / f"round-{n}" / PAIRS) for n in range(1, number)]
        lines = together([*earlier, new]) if self.settings.all_rounds else new
        write_lines(folder / DATA, lines)
        if self.refits:
            self.tell(f"round {number}: reward model on {len(lines)} pairs")
            knobs = {"data": str(folder / DATA), "adapter": self.settings.adapter, "out": str(folder / REWARD)}
            train(self._train_settings("reward", self.settings.reward_config, knobs, number), base=self.base)
        self.tell(f"round {number}: {self.settings.method} from {before or 'the bare base'}")
        knobs = self._policy_knobs(number, before)
        self._write_rows_for_policy(folder, lines, number)
        train(self._train_settings(self.settings.method, self.settings.policy_config, knobs, number), base=self.base)
        return self._measure(number, folder, before, new, len(lines))

    def _collect(self, number: int, folder: Path, before: str | None) -> list[dict[str, Any]]:
        """The new pairs, from their file where a run before got that far."""
        s, file = self.settings, folder / PAIRS
        if file.is_file():
            return read_lines(file)
        if s.store is not None:
            earlier = [read_lines(self.out / f"round-{n}" / PAIRS) for n in range(1, number)]
            adapter = f" --adapter {before}" if before else ""
            found = judged_since(s, earlier, f"lowrank-align studio --model {s.model}{adapter} --store {s.store}")
        else:
            role, renderer = self._speaker("before", before)
            found = simulate(s, self.base, role, renderer, self.prompts, number)
        if not found.lines:
            raise UserError(f"round {number}: no pairs: {found.told}; raise --temperature or --pairs")
        self.tell(f"round {number}: {found.told}")
        write_lines(folder / COLLECTED, [{"as_scored": found.as_scored}])  # first: with its pairs a round is collected
        write_lines(folder / PAIRS, found.lines)
        return found.lines

    def _write_rows_for_policy(self, folder: Path, lines: list[dict[str, Any]], number: int) -> None:
        """Prompts for a method that samples (those of the round's pairs where none were given), labels for KTO."""
        if not self.samples:
            if Shape.pair not in method_class(self.settings.method).shapes:
                write_lines(folder / "unpaired.jsonl", as_unpaired(lines))
            return
        if self.prompts:
            prompts = [row.prompt for row in of_round(self.prompts, self.settings.pairs, number, self.settings.seed)]
        else:
            prompts = list({json.dumps(line["prompt"]): line["prompt"] for line in lines}.values())
        write_lines(folder / PROMPTS, [{"prompt": prompt} for prompt in prompts])

    def _measure(
        self, number: int, folder: Path, before: str | None, new: list[dict[str, Any]], trained_on: int
    ) -> RoundResult:
        """The new policy beside the one before, on the held-out prompts."""
        as_scored = next(iter(read_lines(folder / COLLECTED)), {}).get("as_scored")
        state = read_state(folder / REWARD) if self.refits else None
        accuracy = (state or {}).get("summary", {}).get("accuracy")
        judge, found = self._judge(folder), None
        if self.held_out:
            old, new_side = self._answers("before", before), self._answers("after", str(folder / POLICY))
            # of a policy that answers behind a text, the reference has the text that it has itself
            prefix = self._renderer_of(before).prefix_ids
            found = kl(self.base, "after", old[0], self.held_out, new_side[1], prefix, BATCH).nats.value
            if judge is not None:
                ours, theirs = self._worth(folder, new_side[1]), self._worth(folder, old[1])
                theirs = tied_where_alike(new_side[1], old[1], ours, theirs)
                wins = win_rate(ours, theirs).rate
                return RoundResult(
                    number, len(new), trained_on, as_scored, accuracy, judge,
                    fmean(ours), fmean(theirs), wins, found,
                )  # fmt: skip
        return RoundResult(number, len(new), trained_on, as_scored, accuracy, None, None, None, None, found)

    def _judge(self, folder: Path) -> str | None:
        if self.exact is not None:
            return self.settings.score
        return str(folder / REWARD) if self.refits else None

    def _worth(self, folder: Path, side: Side) -> list[float]:
        """What the judge says of answers."""
        if self.exact is not None:
            return list(self.exact([one.text for one in self.held_out], side.texts))
        rewards = Rewards(self.base, [str(folder / REWARD)])
        rewards.add_roles()
        scores: list[float] = rewards.of_trees(side.trees, BATCH)[str(folder / REWARD)].tolist()
        return scores

    # ---- parts

    def _policy_before(self, number: int) -> str | None:
        return self.settings.adapter if number == 1 else str(self.out / f"round-{number - 1}" / POLICY)

    def _renderer_of(self, run: str | None) -> Renderer:
        return self.renderer.with_prefix(adapters.answer_prefix(run))

    def _speaker(self, role: str, run: str | None) -> tuple[str, Renderer]:
        """A policy as a role, with the renderer that asks it; without a run, the bare base."""
        if run is None:
            return BARE, self.renderer
        self.base.add_role(role, start_from=run, trainable=False)
        return role, self._renderer_of(run)

    def _answers(self, role: str, run: str | None) -> tuple[str, Side]:
        role, renderer = self._speaker(role, run)
        s = self.settings
        side = draw(
            self.base, role, role, renderer, self.held_out,
            max_new_tokens=s.max_new_tokens, seed=s.seed, batch_size=BATCH,
        )  # fmt: skip
        return role, side

    def _policy_knobs(self, number: int, before: str | None = None) -> dict[str, Any]:
        folder = self.out / f"round-{number}"
        knobs: dict[str, Any] = {"adapter": before, "out": str(folder / POLICY)}
        if self.samples:
            reward = str(folder / REWARD) if self.refits else self.settings.score
            return knobs | {"prompts": str(folder / PROMPTS), "reward": reward,
                            "max_new_tokens": self.settings.max_new_tokens}  # fmt: skip
        pairs = Shape.pair in method_class(self.settings.method).shapes
        return knobs | {"data": str(folder / (DATA if pairs else "unpaired.jsonl"))}

    def _train_settings(self, method: str, config: str | None, knobs: dict[str, Any], number: int) -> TrainSettings:
        """The file's settings under what the rounds themselves decide; a round has a seed of its own."""
        s = self.settings
        given = read_yaml(config) if config else {}
        given.pop("method", None)
        common = {name: getattr(s, name) for name in OF_THE_MODEL if name in s.model_fields_set or name == "model"}
        out = {"out": str(self.out / f"round-{number}" / REWARD)} if method == "reward" else {}
        return resolve(METHODS[method], given | common | out | knobs | {"seed": s.seed + number, "resume": True})

    def _check_method(self) -> None:
        method = self.settings.method
        usable = [name for name in METHODS if name not in ("sft", "reward")]
        if method not in usable:
            raise UserError(
                f"method: {method}: not one for rounds{nearest(method, usable)} (there are: {', '.join(usable)})"
            )
        samples = METHODS[method].rows_field == "prompts"
        if samples and self.settings.refit is False and self.settings.score is None:
            raise UserError(f"refit: {method} needs a reward: leave out --no-refit, or give --score module:function")
        shapes = method_class(method).shapes
        if not samples and not shapes & {Shape.pair, Shape.unpaired}:
            raise UserError(f"method: {method} learns neither from pairs nor by sampling")

    def _split(self, rows: list[Row]) -> tuple[list[Row], list[Asked]]:
        """(prompts to train on, held-out ones with their tokens); those without room are left out and counted."""
        s = self.settings
        room = self.renderer.max_length - s.max_new_tokens
        fitting = [row for row in rows if len(self.renderer.prompt_ids(row)) <= room]
        if len(fitting) < len(rows):
            self.tell(
                f"{s.prompts}: {len(rows) - len(fitting)} prompts left out: no room for {s.max_new_tokens} tokens"
            )
        if not fitting:
            if rows:
                raise UserError(f"{s.prompts}: no prompt leaves room for an answer; lower --max-new-tokens")
            self.tell("no --prompts: the rounds are not compared on held-out ones")
            return [], []
        if not s.held_out:
            return fitting, []
        if s.held_out >= len(fitting):
            raise UserError(f"held_out: {s.held_out} of {len(fitting)} prompts; leave some to train on")
        train_rows, held_out = split_off(fitting, s.held_out, s.seed)
        return train_rows, [Asked(row, self.renderer.prompt_ids(row), seen_prompt(row)) for row in held_out]
