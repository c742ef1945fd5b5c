"""What a training run shows: a bar with loss, pace and time left on a terminal, plain lines elsewhere, and samples."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from lowrank_align.terminal import make_console

SECONDS_BETWEEN_LINES = 5.0
SHOWN = ("loss", "objective/scores", "objective/kl", "rewards/accuracies", "accuracy", "eval_loss")
LABELS = {"objective/scores": "score", "objective/kl": "KL", "rewards/accuracies": "accuracy", "eval_loss": "eval loss"}
TEXT_WIDTH = 300


class Progress:
    """Prints to `console`; silent with `quiet`, where only notes go through."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or make_console()
        self.quiet = quiet
        self._bar: Bar | None = None
        self._total = self._first = 0
        self._began = self._last_line = 0.0

    def start(self, title: str, total: int, done: int) -> None:
        """The first of `total` steps is about to run; `done` are there from before."""
        self._total, self._first, self._began = total, done, time.monotonic()
        self._last_line = self._began - SECONDS_BETWEEN_LINES
        if self.quiet or not self.console.is_terminal:
            return
        name, figures = TextColumn("{task.description}"), TextColumn("{task.fields[line]}")
        self._bar = Bar(name, BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn(), console=self.console)
        self._bar.add_task(title, total=total, completed=done, line="")
        self._bar.start()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Step `step` is done."""
        pace = (step - self._first) / max(time.monotonic() - self._began, 1e-9)
        shown = [f"{LABELS.get(name, name)} {figures[name]:.4g}" for name in SHOWN if name in figures]
        line = "  ".join([*shown, f"{pace:.2f} steps/s"])
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, line=line)
        elif not self.quiet and (step == self._total or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            left = (self._total - step) / pace
            self.console.print(f"step {step}/{self._total}  {line}  {left:.0f} s left", soft_wrap=True)

    def note(self, text: str) -> None:
        """One line that people should read."""
        self.console.print(Text(text), soft_wrap=True)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few of the run's outputs."""
        if self.quiet:
            return
        for sample in samples:
            heading = f"  sample at step {step}: {_short(sample['prompt'])}"
            self.console.print(Text(heading, style="dim"), soft_wrap=True)
            if "scores" in sample:
                for text, score in zip(sample["completions"], sample["scores"], strict=True):
                    self.console.print(Text(f"    {score:+.3f}  {_short(text)}"), soft_wrap=True)
            else:
                self.console.print(Text(f"    {_short(sample['completion'])}"), soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(text: str) -> str:
    """One line, without control characters, its end kept where it is too long: what matters of a prompt is last."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH // 2] + " ... " + line[-TEXT_WIDTH // 2 :]
