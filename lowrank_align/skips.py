"""Updates that are not taken: one on NaN would poison every weight, and many in a row mean that nothing is learned."""

from lowrank_align.errors import NumericError

IN_A_ROW = 5  # steps without finite numbers, after which the run stops
IN_A_ROW_OF_FP16 = 25  # the scale of fp16 gradients starts too high and finds its size by such skips


class Skips:
    """How many updates of a run were left out; the run gives up after `steps_allowed` whole steps of them in a row."""

    def __init__(self, steps_allowed: int, updates_per_step: int) -> None:
        self.steps_allowed, self.updates_per_step = steps_allowed, updates_per_step
        self.total = self.in_a_row = 0

    def add(self, step: int, updates: int = 1) -> None:
        """So many updates of this step were left out for one cause; NumericError where it is time to give up."""
        self.total += 1
        self.in_a_row += updates
        if self.in_a_row < self.steps_allowed * self.updates_per_step:
            return
        advice = "begin again with a lower --learning-rate and a new --out"
        if self.in_a_row >= step * self.updates_per_step:
            advice = "not one was taken: look at the model, --adapter and the reward"
        raise NumericError(f"{self.steps_allowed} steps in a row without finite numbers; {advice}")
