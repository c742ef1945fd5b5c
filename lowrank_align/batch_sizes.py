"""How many rows go through the base at once: what the settings say, halved for good while memory runs out.

The effective batch stays what it was, since the same rows go through in more parts.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lowrank_align.config import TrainSettings
from lowrank_align.errors import EnvironmentProblem, is_out_of_memory, said_shortly

WHERE_MEMORY_GOES = {"rollout_batch_size": "lower --max-new-tokens or --max-length"}  # for the others:
LESS_MEMORY = "lower --max-length or --rank, or use --gradient-checkpointing"


class BatchSizes:
    """The sizes of a run by the names of their settings; `tell` gets a line for each that is halved."""

    def __init__(self, settings: TrainSettings, device: torch.device, tell: Callable[[str], None]) -> None:
        self.settings, self.device, self.tell = settings, device, tell
        self.now = {"micro_batch_size": settings.micro_batch_size}

    def retry(self, function: Callable[[int], Any], knob: str) -> Any:
        """`function(size)` with the size that the settings' `knob` names; EnvironmentProblem where 1 is too much."""
        self.now.setdefault(knob, getattr(self.settings, knob))
        while True:
            try:
                return function(self.now[knob])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = said_shortly(error)
            if self.now[knob] == 1:
                advice = WHERE_MEMORY_GOES.get(knob, LESS_MEMORY)
                raise EnvironmentProblem(f"out of memory with {knob} 1 ({message}); {advice}")
            self.now[knob] //= 2
            self.tell(f"out of memory: {knob} is now {self.now[knob]}; the same batch again")
            if self.device.type != "cpu":
                getattr(torch, self.device.type).empty_cache()

    def agree(self, said: Iterable[dict[str, int]]) -> None:
        """Take the smallest of the sizes that memory left the processes of the run."""
        all_sizes = list(said)
        for knob in sorted({knob for sizes in all_sizes for knob in sizes}):
            least = min(sizes[knob] for sizes in all_sizes if knob in sizes)
            if least < self.now.get(knob, math.inf):
                self.tell(f"out of memory in another process: {knob} is now {least}")
                self.now[knob] = least
