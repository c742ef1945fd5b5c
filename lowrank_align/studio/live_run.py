"""A run as it goes: what `train` reports, kept so that any thread can read it at any time."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_align.progress import Progress
from lowrank_align.runs import METRICS, SAMPLES, read_metrics
from lowrank_align.stopping import StopSignals
from lowrank_align.studio.words import duration, flags_as_settings

State = Literal["idle", "preparing", "running", "stopping", "ending", "finished", "failed", "stopped"]
ACTIVE: tuple[State, ...] = ("preparing", "running", "stopping", "ending")
PACE_STEPS = 20  # the time left is told from the last so many
LOG_LINES, SAMPLES_KEPT = 500, 60
_versions = itertools.count(1)  # of all runs, so that no two states share one


@dataclass(frozen=True)
class Sample:
    """One of the run's outputs."""

    step: int
    prompt: str
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Status:
    """Where a run stands. `version` changes whenever anything about it did."""

    state: State = "idle"
    sentence: str = "No run yet: choose a method and data, and press Start."
    run: str = ""
    method: str = ""
    step: int = 0
    total: int = 0
    elapsed_seconds: float = 0.0
    left_seconds: float | None = None
    resumable: bool = False
    version: int = 0

    @property
    def active(self) -> bool:
        """Whether a run holds the trainer."""
        return self.state in ACTIVE


@dataclass
class _Facts:
    state: State = "preparing"
    step: int = 0
    total: int = 0
    problem: str = ""
    resumable: bool = False
    version: int = field(default_factory=_versions.__next__)
    ended: float | None = None
    figures: list[dict[str, float | None]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)  # when each of the last steps ended; first, when the loop began


class LiveRun(Progress):
    """The progress of one run, and the wish to stop it."""

    def __init__(self, name: str, method: str, folder: Path, on_start: Callable[[], None] | None = None) -> None:
        """`on_start()` is called from the training thread when the first step is about to run."""
        super().__init__(quiet=True)
        self.name, self.method, self.folder = name, method, folder
        self.started_from = ""  # the voice's name
        self.stopping = StopSignals()
        self._lock = threading.Lock()
        self._facts = _Facts()
        self._read_back()  # of a run that goes on
        self._on_start = on_start
        self._started = time.monotonic()

    # ---- what the training thread reports

    def start(self, title: str, total: int, done: int) -> None:
        self._read_back()  # what stands behind the checkpoint has been taken away
        with self._lock:
            facts = self._facts
            facts.state, facts.step, facts.total = "running", done, total
            facts.moments = [time.monotonic()]
            facts.version = next(_versions)
        if self._on_start is not None:
            self._on_start()

    def _read_back(self) -> None:
        figures = [_plain(entry) for entry in read_metrics(self.folder / METRICS)]
        samples = [one for entry in read_metrics(self.folder / SAMPLES) for one in _samples(entry["step"], [entry])]
        with self._lock:
            self._facts.figures, self._facts.samples = figures, samples[-SAMPLES_KEPT:]

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        with self._lock:
            self._facts.step = step
            self._facts.figures.append({"step": step, **figures})
            self._facts.moments = [*self._facts.moments, time.monotonic()][-PACE_STEPS - 1 :]
            self._facts.version = next(_versions)

    def note(self, text: str) -> None:
        with self._lock:
            self._facts.log = [*self._facts.log, f"{time.strftime('%H:%M:%S')}  {flags_as_settings(text)}"][-LOG_LINES:]
            self._facts.version = next(_versions)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._facts.samples = [*self._facts.samples, *_samples(step, samples)][-SAMPLES_KEPT:]
            self._facts.version = next(_versions)

    def close(self) -> None:
        """The loop is over; where every step is done, what follows is measured and saved."""
        with self._lock:
            if self._facts.total and self._facts.step == self._facts.total:
                self._facts.state = "ending"
            self._facts.version = next(_versions)

    def end(self, state: State, problem: str = "", resumable: bool = False) -> None:
        """The run is over."""
        with self._lock:
            self._facts.state, self._facts.problem, self._facts.resumable = state, problem, resumable
            self._facts.ended = time.monotonic()
            self._facts.version = next(_versions)

    # ---- what anybody reads

    def stop(self) -> None:
        """Save at the next step boundary and stop."""
        self.stopping.asked = True
        with self._lock:
            self._facts.version = next(_versions)

    @property
    def figures(self) -> list[dict[str, float | None]]:
        """The figures by step, those from before a resumption among them."""
        with self._lock:
            return list(self._facts.figures)

    @property
    def log(self) -> list[str]:
        with self._lock:
            return list(self._facts.log)

    @property
    def shown_samples(self) -> list[Sample]:
        """The newest samples last."""
        with self._lock:
            return list(self._facts.samples)

    def status(self) -> Status:
        with self._lock:
            facts = self._facts
            state: State = facts.state
            if state in ("preparing", "running") and self.stopping.asked:
                state = "stopping"
            elapsed = (facts.ended or time.monotonic()) - self._started
            steps = len(facts.moments) - 1
            left = None
            if steps > 0 and state == "running":
                left = (facts.moments[-1] - facts.moments[0]) / steps * (facts.total - facts.step)
            sentence = self._sentence(state, elapsed, left)
            return Status(
                state, sentence, self.name, self.method, facts.step, facts.total, elapsed, left,
                facts.resumable, facts.version,
            )  # fmt: skip

    def _sentence(self, state: State, elapsed: float, left: float | None) -> str:
        facts, of = self._facts, f"step {self._facts.step} of {self._facts.total}"
        took = f"after {duration(elapsed)}"
        sentences: dict[str, str] = {
            "preparing": f"{self.name}: preparing (rows, adapters, a try for memory).",
            "running": f"{self.name}: {of}" + (f", {duration(left)} left." if left is not None else "."),
            "stopping": f"{self.name}: stopping; it saves when this step is done ({of})."
            if facts.total
            else f"{self.name}: stopping; it saves after its first step.",
            "ending": f"{self.name}: all {facts.step} steps are done; measuring and saving.",
            "finished": f"{self.name}: finished {took}, {facts.total or facts.step} steps.",
            "stopped": f"{self.name}: stopped at {of} and saved; Resume goes on.",
            "failed": f"{self.name}: failed: {facts.problem}" + (" It can be resumed." if facts.resumable else ""),
        }
        return sentences[state]


def _plain(entry: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in entry.items() if value is None or isinstance(value, (int, float))}


def _samples(step: int, samples: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """One line an answer: a reward model's sample has several, with their scores."""
    found = []
    for sample in samples:
        prompt = str(sample.get("prompt", ""))
        if "scores" in sample:
            scored = zip(sample["completions"], sample["scores"], strict=True)
            found += [Sample(step, prompt, str(text), float(score)) for text, score in scored]
        else:
            found.append(Sample(step, prompt, str(sample.get("completion", ""))))
    return found
