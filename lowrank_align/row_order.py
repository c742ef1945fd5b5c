"""Which rows a step takes: a function of seed and step alone, a new order for each round through the data."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lowrank_align.config import TrainSettings
from lowrank_align.rollout import generator_for


class RowOrder:
    """The steps of a run over `count` rows."""

    def __init__(self, settings: TrainSettings, count: int) -> None:
        self.seed, self.batch_size, self.count = settings.seed, settings.batch_size, count
        by_epochs = max(1, round(settings.epochs * count))
        self.total_steps = settings.max_steps or math.ceil(by_epochs / settings.batch_size)
        self.total_rows = self.total_steps * settings.batch_size if settings.max_steps else by_epochs

    def of_step(self, step: int) -> list[int]:
        """The places of the rows of a step, which counts from 1; the last one may have fewer than a batch."""
        places = range((step - 1) * self.batch_size, min(step * self.batch_size, self.total_rows))
        orders = {epoch: shuffled(self.seed, epoch, self.count) for epoch in {i // self.count for i in places}}
        return [int(orders[i // self.count][i % self.count]) for i in places]


@lru_cache(maxsize=2)  # a step's rows may be the end of one round and the beginning of the next
def shuffled(seed: int, epoch: int, count: int) -> Tensor:
    """(count,) the places of the rows in a round through the data."""
    return torch.randperm(count, generator=generator_for(torch.device("cpu"), seed, epoch, "rows"))
