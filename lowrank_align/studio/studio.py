"""What the page works with: one base, one store, one speaker, and everything that is done with them."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_align import __version__
from lowrank_align.base import Base
from lowrank_align.config import StudioSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Shape, parse_row
from lowrank_align.data.load import load_rows
from lowrank_align.devices import check_device
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.loading import read_config, read_tokenizer
from lowrank_align.memory import free_bytes
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.store import Enqueued, Store, Text
from lowrank_align.studio.answers import Answer, Source, draw, new_seed
from lowrank_align.studio.arena import Arena
from lowrank_align.studio.chatting import Chats
from lowrank_align.studio.collecting import Desk
from lowrank_align.studio.speaking import COLLECT, Speaker
from lowrank_align.studio.training import Trainer
from lowrank_align.studio.voices import BASE, LIVE, Voices
from lowrank_align.trees import TreeRow

log = logging.getLogger(__name__)

NAME_CHARACTERS = 60  # of an annotator
IMPLICIT = "implicit:"  # before a voice's name: its implicit reward instead of a reward run's score


@dataclass(frozen=True)
class Facts:
    """What the header tells."""

    model: str
    quantize: str
    copies: int
    adapters: int
    base_bytes: int
    free_bytes: int
    doing: str


class Studio:
    """Everything behind the page. Its parts are safe to use from any thread; the base is touched in turns only."""

    def __init__(self, base: Base, renderer: Renderer, store: Store, settings: StudioSettings) -> None:
        self.base, self.renderer, self.store, self.settings = base, renderer, store, settings
        self.runs = Path(settings.runs).expanduser()
        self.voices = Voices(base, self.runs, tuple(settings.adapter or ()))
        self.speaker = Speaker(base)
        self.trainer = Trainer(self)
        self.chats = Chats(self)
        self._lock = threading.Lock()
        # Told every second, but counted once: these go through every tensor of the process, and of the base.
        self._copies, self._base_bytes = base.copies_in_memory(), base.frozen_bytes()
        self._desks: dict[str, Desk] = {}
        self._arenas: dict[str, Arena] = {}

    @classmethod
    def open(cls, settings: StudioSettings, store: Store | None = None) -> "Studio":
        """Check everything, load the base, open the store; UserError where something is wrong."""
        check_device(settings.device, settings.quantize, settings.attention)
        tokenizer, context = read_tokenizer(settings.model)
        renderer = Renderer(
            tokenizer,
            chat_template=settings.chat_template,
            max_length=min(settings.max_length, context),
            thinking=settings.thinking,
            thinking_if_possible=from_preset(settings, "thinking"),
        )
        for line in preset_lines(settings, renderer, read_config(settings.model)):
            log.info("%s", line)
        base = Base.of(settings)
        base.model.eval()
        return cls(base, renderer, store or _opened_store(settings), settings)

    # ---- answers

    def answer(self, prompt: Text, source: Source, *, seed: int | None = None, urgency: int = COLLECT) -> Answer:
        """Begin an answer and come back at once; without a seed, one of its own."""
        seed = new_seed() if seed is None else seed
        return draw(self.base, self.renderer, self.voices, self.speaker, prompt, source, seed, urgency)

    def scores(self, reward: str, prompt: Text, completions: Sequence[Text]) -> list[float]:
        """The shifted scores of a reward run, one a completion; UserError where one cannot be scored (too long)."""
        tree = self._tree(prompt, completions)

        def score() -> list[float]:
            with self.base.role(self.voices.voice(reward).role), torch.no_grad():
                found: list[float] = self.base.scores(self.base.collate([tree]), shifted=True).tolist()
            return found

        return self.speaker.call(score)

    def implicit_rewards(self, voice: str, prompt: Text, completions: Sequence[Text]) -> list[float]:
        """log pi(y|x) - log base(y|x) in nats, one a completion: DPO's implicit reward without its beta."""
        tree = self._tree(prompt, completions)

        def measure() -> list[float]:
            batch = self.base.collate([tree])
            logps = []
            for role in (self.voices.voice(voice).role, self.voices.voice(BASE).role):
                with self.base.role(role), torch.no_grad():
                    logps.append(self.base.token_scores(batch).logps)
            found: list[float] = (logps[0] - logps[1]).tolist()
            return found

        return self.speaker.call(measure)

    def judges(self) -> list[str]:
        """Whoever can say how far two answers are apart: reward runs, and trained policies by their implicit reward."""
        policies = [name for name in self.voices.names() if name not in (BASE, LIVE)]
        return [*self.voices.rewards(), *(f"{IMPLICIT}{name}" for name in policies)]

    def add_prompts_from(self, path: str) -> Enqueued:
        """Put the prompts of a file at the end of the queue: rows that have one, or the lines of a .txt file."""
        file = Path(path)
        if file.suffix == ".txt":
            lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
            found: list[Text] = [[{"role": "user", "content": line}] for line in lines if line]
        else:
            rows = load_rows(file, expect={Shape.prompts}).rows
            found = [row.prompt if isinstance(row.prompt, str) else [dict(m) for m in row.prompt] for row in rows]
        if not found:
            raise UserError(f"{file.name}: no prompts")
        return self.store.enqueue(found, file.name)

    def gap(self, judge: str, prompt: Text, completions: Sequence[Text]) -> float:
        """How far a judge (a reward run, or `implicit:VOICE`) sees two answers apart; a small gap is informative."""
        voice = judge.removeprefix(IMPLICIT)
        if voice != judge:
            first, second = self.implicit_rewards(voice, prompt, completions)
        else:
            first, second = self.scores(judge, prompt, completions)
        return abs(first - second)

    def _tree(self, prompt: Text, completions: Sequence[Text]) -> TreeRow:
        """The completions as tokens; each as a ranking would have it, so that all are kept in their order."""
        ranks = list(range(1, len(completions) + 1))
        if len(completions) == 1:
            raw: dict[str, Any] = {"prompt": prompt, "completion": completions[0], "score": 0.0}
        else:
            raw = {"prompt": prompt, "completions": list(completions), "ranks": ranks}
        rendered = self.renderer.tree_row(parse_row(raw, "these answers", 0))
        if rendered.tree is None:
            raise UserError(f"these answers cannot be scored: {rendered.dropped}")
        return rendered.tree

    # ---- people

    def desk(self, annotator: str) -> Desk:
        """Where this annotator collects; the same one in every tab, made when first asked for."""
        name = self._name(annotator)
        with self._lock:  # making one draws answers: once is enough
            if name not in self._desks:
                self._desks[name] = Desk(self, name)
            return self._desks[name]

    def arena(self, annotator: str) -> Arena:
        """Where this annotator lets players meet; the same one in every tab."""
        name = self._name(annotator)
        with self._lock:
            if name not in self._arenas:
                self._arenas[name] = Arena(self, name)
            return self._arenas[name]

    def _name(self, annotator: str | None) -> str:
        return " ".join((annotator or "").split())[:NAME_CHARACTERS] or self.settings.annotator

    # ---- facts

    def versions(self) -> dict[str, Any]:
        """What a row keeps of what made it."""
        return {
            "lowrank_align": __version__,
            "base": self.base.name,
            "base_hash": self.base.weights_hash,
            "quantize": self.base.quantize,
            "template_hash": self.renderer.template_hash(),
        }

    def facts(self) -> Facts:
        """For the header; cheap."""
        adapters = sum(role.adapter is not None for role in self.base.roles.values())
        return Facts(
            model=Path(self.base.name).name,
            quantize={"nf4": "NF4", "int8": "8-bit", "none": "not quantised"}[self.base.quantize],
            copies=self._copies,
            adapters=adapters,
            base_bytes=self._base_bytes,
            free_bytes=free_bytes(self.base.device),
            doing=self.doing(),
        )

    def doing(self) -> str:
        """What the machine is at, in a few words."""
        words = self.trainer.in_words()
        return words or ("answering" if self.speaker.busy else "idle")

    def close(self) -> None:
        """Stop a run at its next step boundary and wait for its save, end the speaker, close the store."""
        self.trainer.close()
        self.chats.close()
        self.speaker.close()
        self.store.close()


def _opened_store(settings: StudioSettings) -> Store:
    """The store, with a dated copy beside it where one is due; one that fails is told, and keeps nobody from work."""
    store = Store(Path(settings.store).expanduser())
    try:
        made = store.back_up_by_age(settings.backup_hours, settings.backups)
    except EnvironmentProblem as error:
        log.warning("%s", error)
    else:
        if made is not None:
            log.info("%s: backed up as %s", store.path, made.name)
    return store
