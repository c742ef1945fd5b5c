"""The processes of one run, as `accelerate launch` or `torchrun` started them, and what they tell each other.

Each holds the whole base and does its share of a step's rows. Gradients are summed over all of them, so an update is
that of one process but for the order of summation; only the first writes. A process alone makes no process group, and
everything here is then what it would be without it.
"""

import atexit
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from lowrank_align.errors import EnvironmentProblem, NumericError, Stopped, UserError

A = TypeVar("A")
B = TypeVar("B")

PATIENCE = timedelta(hours=2)  # the others wait while the first downloads a model, or a person's function scores
OTHERS_LAUNCHED_FOR = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


class Lost(EnvironmentProblem):
    """Another process of the run has ended, however it did."""


class Workers:
    """This process among the `count` of a run; `rank` 0 is the first."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count, self.device = rank, count, device

    @classmethod
    def join(cls, device: torch.device) -> "Workers":
        """Meet the others that the launcher started, for training on `device`; alone where it started none."""
        if launched_processes() == 1:
            return cls()
        for variable, name in OTHERS_LAUNCHED_FOR.items():
            if os.environ.get(variable, "").lower() in ("1", "true"):
                raise UserError(f"accelerate is configured for {name}: take --multi_gpu instead (docs/scaling.md)")
        try:
            state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise EnvironmentProblem(f"the processes do not find each other: {_first_line(error)}") from error
        if state.num_processes != launched_processes():
            raise EnvironmentProblem(
                f"WORLD_SIZE is {launched_processes()}, but nothing says which process this one is; "
                "start with accelerate launch or torchrun"
            )
        atexit.register(_part)
        if state.process_index > 0:
            logging.getLogger("lowrank_align").setLevel(logging.ERROR)
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    # ---- who does what

    def share(self, items: Sequence[A]) -> Sequence[A]:
        """This process's part of the items; together, in the order of the processes, they are all of them."""
        begin, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def deal(self, items: Sequence[A]) -> Sequence[A]:
        """This process's part of items in an order of their own, long to short: one of each handful, like cards."""
        return items[self.rank :: self.count]

    def place(self, at: int) -> int:
        """Where the item at a place of this process's `deal` stood among all."""
        return at * self.count + self.rank

    def map(self, items: Sequence[A], function: Callable[[Sequence[A]], Sequence[B]]) -> list[B]:
        """`function` of all items, a list that every process gets: each calls it on its share, unless that is empty."""
        mine = self.share(items)
        return [result for part in self.each(lambda: list(function(mine)) if mine else []) for result in part]

    # ---- what they tell each other

    def each(self, function: Callable[[], A]) -> list[A]:
        """What `function` gives in each process, in their order; a UserError in one is raised in all.

        `function` itself must not talk to the others. Tensors come back on this process's device.
        """
        if self.count == 1:
            return [function()]
        said = self._said(function)
        found: list[Any] = [None] * self.count
        with _others():
            dist.all_gather_object(found, said)
        return [self._heard(one) for one in found]

    def together(self, function: Callable[[], A]) -> A:
        """`function` in every process, its result here; a UserError in one is raised in all."""
        results: list[A] = []
        self.each(lambda: results.append(function()))
        return results[0]

    def of_first(self, function: Callable[[], A]) -> A:
        """What `function` gives in the first process, which alone calls it; its UserError is raised in all."""
        if self.count == 1:
            return function()
        box = [self._said(function) if self.is_first else None]
        with _others():
            dist.broadcast_object_list(box, device=self.device)
        return self._heard(box[0])  # type: ignore[no-any-return]

    def in_turn(self, function: Callable[[B | None], A], tell: Callable[[A], B]) -> A:
        """`function` in every process, the first before the others: what it makes or finds wrong, they find.

        It gets None in the first; in the others what `tell` says of the first's result.
        """
        results: list[A] = []

        def begin() -> B:
            results.append(function(None))
            return tell(results[0])

        told = self.of_first(begin)
        self.together(lambda: None if self.is_first else results.append(function(told)))
        return results[0]

    def same(self, facts: dict[str, Any]) -> None:
        """UserError where one of the named facts is not the same in every process."""
        said = self.each(lambda: facts)
        for rank, others in enumerate(said):
            for name in facts:
                if others[name] != said[0][name]:
                    error = UserError(f"the {name} of process {rank} is not that of process 0; all must read the same")
                    error.said = True
                    raise error

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Every gradient becomes the sum over the processes; one that none of them has stays None."""
        if self.count == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=parts[0].device)
        flat = torch.cat([*(part.flatten() for part in parts), there])
        with _others():
            dist.all_reduce(flat)
        *sums, there = flat.split([*(part.numel() for part in parts), len(parts)])
        for parameter, total, count in zip(parameters, sums, there.tolist(), strict=True):
            parameter.grad = total.view_as(parameter) if count else None

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What went wrong in here for every process alike, the first says for all (`UserError.said`)."""
        try:
            yield
        except UserError as error:
            shared = any(isinstance(one, UserError) and one.said for one in (error, error.__cause__))
            error.said = not self.is_first and (shared or isinstance(error, Stopped | NumericError))
            raise

    def _said(self, function: Callable[[], Any]) -> tuple[Any, UserError | None]:
        try:
            return send_to_device(function(), "cpu"), None
        except UserError as error:
            return None, error

    def _heard(self, said: Any) -> Any:
        result, error = said
        if error is not None:
            error.said = True
            raise error
        return send_to_device(result, self.device)


def launched_processes(here: bool = False) -> int:
    """How many processes the launcher started, on all machines or only `here`; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE" if here else "WORLD_SIZE") or 1)


def local_rank() -> int | None:
    """Which of the processes on this machine this one is; None where it is alone."""
    return int(os.environ.get("LOCAL_RANK") or 0) if launched_processes() > 1 else None


@contextmanager
def _others() -> Iterator[None]:
    """Lost where the others cannot be reached: gloo raises when one ends, NCCL leaves that to the launcher."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"another process of this run has ended or is out of reach ({_first_line(error)}); "
            "the same command with --resume goes on from the last checkpoint"
        ) from error


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    """Without the place in the library's own source, and what to look for in its log."""
    line = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).partition("\n")[0].partition(" This ")[0]
    return line[:120] or type(error).__name__
