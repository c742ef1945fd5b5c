"""A progress display that keeps what a run tells, and can ask it to stop as a signal would."""

from typing import Any

from lowrank_align.progress import Progress
from lowrank_align.stopping import StopSignals


class Notes(Progress):
    """Keeps the notes; a stop can be asked for at a step."""

    def __init__(self, stop: StopSignals | None = None, at: int = 0) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []
        self.stop, self.at = stop, at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, figures: Any) -> None:
        if self.stop is not None and step == self.at:
            self.stop.asked = True

    @property
    def ladder(self) -> list[str]:
        """What was told of sizes that memory has halved."""
        return [note for note in self.notes if note.startswith("out of memory: ")]
