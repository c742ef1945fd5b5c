"""The one training loop: accumulate, clip, step, log, evaluate, save; the same for every method.

Promises: the effective batch never changes (on out-of-memory the micro-batch is halved and the same batch retried), a
non-finite loss, gradient or score is not stepped on, no half of an update is ever saved, and a resumed run goes on
bitwise. Every random draw has a generator seeded by what it is for, so there is no global state to keep.
"""

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from lowrank_align import checkpoint
from lowrank_align.batch_sizes import BatchSizes
from lowrank_align.config import TrainSettings
from lowrank_align.early_stopping import BestSoFar
from lowrank_align.errors import (
    NoNumbers,
    NumericError,
    Stopped,
    UserError,
    is_out_of_memory,
    memory_for,
    said_shortly,
)
from lowrank_align.methods.method import Method
from lowrank_align.methods.metrics import Metrics
from lowrank_align.optimizer import all_finite, allocate_moments, make_optimizer
from lowrank_align.progress import Progress
from lowrank_align.rollout import seed_of
from lowrank_align.row_order import RowOrder
from lowrank_align.runs import METRICS, RunFolder, read_metrics
from lowrank_align.skips import IN_A_ROW, IN_A_ROW_OF_FP16, Skips
from lowrank_align.stopping import StopSignals
from lowrank_align.training_state import State, flatten, unflatten
from lowrank_align.trees import TreeRow, longest_rows

log = logging.getLogger(__name__)

SAMPLE_ROWS = 3
WHAT_IS_LEFT = (
    "what it changed is thrown away; free memory that other programs hold, then --resume from the last checkpoint"
)


class Loop:
    """A method's training on some rows, from the newest checkpoint of its run to the last step."""

    def __init__(
        self,
        method: Method[Any, Any],
        rows: Sequence[TreeRow],
        eval_rows: Sequence[TreeRow],
        run: RunFolder,
        progress: Progress,
        stop: StopSignals,
    ) -> None:
        self.method, self.rows, self.eval_rows = method, rows, eval_rows
        self.settings: TrainSettings = method.settings
        self.run_folder, self.progress, self.stop = run, progress, stop
        self.base, self.workers = method.base, method.workers
        self.sizes = BatchSizes(self.settings, self.base.device, progress.note)
        self.order = RowOrder(self.settings, len(rows))
        self.steps_done = 0
        self.moved = False  # whether an update of the step that runs may have been made
        self.method_before: dict[str, Any] | None = None  # the method's state before the step that runs
        self.best = BestSoFar(self.settings.early_stopping)
        self.look_due = False  # whether the newest step still waits for its evaluation
        half = self.base.compute_dtype == torch.float16 and self.base.device.type == "cuda"
        self.accelerator = Accelerator(
            cpu=self.base.device.type == "cpu",
            mixed_precision="fp16" if half else "no",
            log_with=self.settings.report_to or None,
            project_dir=str(run.path),
        )
        self.skips = Skips(IN_A_ROW_OF_FP16 if half else IN_A_ROW, method.updates_per_step)
        self.optimizer = self.accelerator.prepare(make_optimizer(method))
        updates = self.total_steps * method.updates_per_step
        self.scheduler = get_scheduler(
            self.settings.lr_schedule,
            self.optimizer.optimizer,
            num_warmup_steps=math.floor(self.settings.warmup_ratio * updates) + 1,
            num_training_steps=updates + 1,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "step of the scheduler before the optimizer's": on purpose
            self.scheduler.step()  # the schedule's point 0 has a rate of 0: an update there would train nothing
        method.backward = self.accelerator.backward
        method.tell = progress.note

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.order.total_steps

    def run(self) -> dict[str, float]:
        """Train to the end; the last figures. Stopped where a signal asked for it: everything is saved then."""
        s, start = self.settings, self._resume()
        figures: dict[str, float] = {}
        latest_evaluation: dict[str, float] = {}
        if s.report_to:
            self.accelerator.init_trackers("lowrank_align", config={"method": s.method})
        if start == 0:
            self.method.check_start(self.rows)
        self.base.model.train()
        self.workers.together(lambda: allocate_moments(self.optimizer.optimizer))
        self._preflight()
        self.progress.start(s.method, self.total_steps, start)
        killed_at_its_end = self.best.given_up or start == self.total_steps
        if self.look_due or killed_at_its_end:
            figures = self.workers.of_first(lambda: _logged(self.run_folder.path / METRICS))
        if self.look_due:
            latest_evaluation = self._look(start, figures)
        steps = range(start + 1, self.total_steps + 1)
        for step in steps if not self._stops_early(start) else ():
            self.steps_done = step
            last = step == self.total_steps
            try:
                figures = self._step(step)
            except UserError as error:
                if self.moved:
                    raise
                raise self._as_saved(error, step - 1) from error
            latest_evaluation |= self._look(step, figures)
            stopping_early, asked = self._stops_early(step), self._agree()
            if last or stopping_early or asked or step % s.save_steps == 0:
                self._save(step)
            if stopping_early:
                break
            if asked and not last:
                raise Stopped(f"{self.run_folder.path}: stopped at step {step} of {self.total_steps} and saved; "
                              "the same command with --resume goes on")  # fmt: skip
        for tracker in self.accelerator.trackers:  # not `end_training`, which would end the process group too
            tracker.finish()
        if self.best.value is not None and s.early_stopping:
            self.best.put_back(self._parameters())
            self.progress.note(f"kept the adapter of step {self.best.step}, the best on the held-out rows")
            figures["best_step"] = float(self.best.step)
            latest_evaluation = self.best.evaluation
        return figures | latest_evaluation

    def _preflight(self) -> None:
        """The longest rows first, through forward and backward: what does not fit is known now, not at step 700."""

        def try_out(size: int) -> None:
            self.optimizer.zero_grad()
            with self._dropout_seed("preflight"):
                self.method.preflight(longest_rows(self.rows, size))

        def all_of_it() -> None:
            self.sizes.retry(try_out, "micro_batch_size")
            self.method.preflight_rollouts(self.rows, self.sizes.retry)

        try:
            self.workers.each(all_of_it)
        finally:
            self.optimizer.zero_grad()

    # ---- one step

    def _step(self, step: int) -> dict[str, float]:
        """All optimiser updates of one step (one, or PPO's epochs x minibatches)."""
        began, self.moved, self.method_before = time.perf_counter(), False, self.method.state()
        metrics, losses = Metrics(), []
        norms: list[float] = []
        rows = [self.rows[place] for place in self.order.of_step(step)]
        learning_rate = self.scheduler.get_last_lr()[0]
        try:
            for update, items in enumerate(self.method.round(rows, step, self.sizes.retry)):
                loss, norm = self._update(items, metrics, step, update)
                losses.append(loss)
                norms.append(norm)
        except NoNumbers as problem:  # before the first update
            self._skip_round(str(problem), step)
        figures = {
            "loss": sum(losses) / len(losses) if losses else math.nan,
            **metrics.results(),
            **(self.method.round_metrics() if losses else {}),
            "grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "learning_rate": learning_rate,
            "skipped": float(self.skips.total),
            "seconds": time.perf_counter() - began,
        }
        figures |= self.method.watch(figures) if losses else {}
        self.method_before = None
        return figures

    def _update(self, items: Sequence[Any], metrics: Metrics, step: int, update: int) -> tuple[float, float]:
        """One optimiser step on `items`, in micro-batches of like lengths; loss and gradient norm.

        Of several processes each takes its share; their losses and gradients add up to those of all items.
        """
        items = sorted(items, key=self.method.tokens, reverse=True)  # padding is computed like any token
        mine = self.workers.deal(items)

        def accumulate(size: int) -> tuple[float, Metrics]:
            self.optimizer.zero_grad()
            weight, total, seen = self.method.weight(items), 0.0, Metrics()
            for start in range(0, len(mine), size):
                with self._dropout_seed(step, update, self.workers.place(start)):
                    total += self.method.step(mine[start : start + size], weight, seen).item()
                self.base.turns.give_way()
            return total, seen

        loss, seen = Metrics.joined(self.workers.each(lambda: self.sizes.retry(accumulate, "micro_batch_size")))
        self.moved = True
        metrics.absorb(seen)
        with memory_for(f"within the update of step {step}", WHAT_IS_LEFT):
            norm = self._clip()
            if math.isfinite(loss) and math.isfinite(norm):
                self.optimizer.step()
                self._check_weights(step)
                self.skips.in_a_row = 0
            else:
                if self.accelerator.scaler is not None and math.isfinite(norm):
                    self.accelerator.scaler.update()  # it looks at gradients alone, and would take this step
                elif self.accelerator.scaler is not None:
                    self.optimizer.step()  # the scaler leaves the weights alone and lowers its scale
                self._skip(f"loss {loss:.3g}, gradient norm {norm:.3g}: not finite", step)
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss, norm

    def _clip(self) -> float:
        self.workers.sum_gradients(self._weights())
        norm = self.accelerator.clip_grad_norm_(self._weights(), self.settings.max_grad_norm)
        return float(norm) if norm is not None else 0.0

    def _weights(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _check_weights(self, step: int) -> None:
        """A finite gradient too may throw a weight out of the finite numbers, and only a checkpoint leads back."""
        if not all_finite(self._weights()):
            raise NumericError(
                f"{self.run_folder.path}: the update of step {step} left weights that are not finite, which are not"
                " saved; begin again with a lower --learning-rate and a new --out"
            )

    def _skip(self, what: str, step: int, updates: int = 1) -> None:
        self.progress.note(f"step {step}: {what}, not stepped on")
        try:
            self.skips.add(step, updates)
        except NumericError as enough:
            raise NumericError(f"{self.run_folder.path}: {enough}") from None

    def _skip_round(self, what: str, step: int) -> None:
        """A step that is left out whole; the schedule goes on all the same."""
        self.moved = True  # nothing did, but an error that ends the run here is of this step, not of what it is given
        for _ in range(self.method.updates_per_step):
            self.scheduler.step()
        self._skip(what, step, self.method.updates_per_step)

    def _agree(self) -> bool:
        """Whether any process was asked to stop; all take the smallest of the sizes that memory left them."""
        said = self.workers.each(lambda: (self.stop.asked, dict(self.sizes.now)))
        self.sizes.agree(sizes for _, sizes in said)
        return any(asked for asked, _ in said)

    @contextmanager
    def _dropout_seed(self, *parts: int | str) -> Iterator[None]:
        """LoRA dropout draws from torch's global generator: seed it by place, and give it back as it was."""
        if self.settings.lora_dropout == 0:
            yield
            return
        with torch.random.fork_rng(devices=[self.base.device] if self.base.device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.settings.seed, *parts, "dropout"))
            yield

    # ---- what is looked at on the way

    def _look(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Evaluation, log line and samples of a step that is done, where they are due; what was evaluated.

        What a reward's failure keeps from being evaluated is looked at first when the run is resumed.
        """
        s, last, again = self.settings, step == self.total_steps, self.look_due
        try:
            evaluated = self._evaluate(step) if self.eval_rows and (last or step % s.eval_steps == 0) else {}
        except UserError as error:
            if not again:
                self._log(step, figures)
            self.look_due = True
            raise self._as_saved(error, step) from error
        if again:
            self.run_folder.truncate_metrics(step - 1)  # the line without the evaluation
            self.look_due = False
        if step % s.log_steps == 0 or last or evaluated or again:
            self._log(step, figures | evaluated)
        if s.sample_steps and (last or step % s.sample_steps == 0):
            self._show_samples(step)
        return evaluated

    def _stops_early(self, step: int) -> bool:
        """Whether held-out rows have got no better often enough; of a resumed run, before it was stopped too."""
        if self.best.given_up:
            self.progress.note(f"stopped early at step {step}: no better evaluation {self.best.patience} times")
        return self.best.given_up

    @torch.no_grad()
    def _evaluate(self, step: int) -> dict[str, float]:
        self.method.backward = lambda loss: None
        self.base.model.eval()
        try:
            found = self.method.evaluate(self.eval_rows, self.sizes.retry)
        except NoNumbers as problem:
            self.progress.note(f"step {step}: {problem}: not evaluated")
            self.best.since += 1
            return {}
        finally:
            self.method.backward = self.accelerator.backward
            self.base.model.train()
        name, pick = self.method.monitor
        evaluated = {f"eval_{key}": value for key, value in found.items()}
        self.best.see(found[name] if pick is min else -found[name], step, evaluated, self._parameters())
        return evaluated

    def _log(self, step: int, figures: dict[str, float]) -> None:
        self.run_folder.log_metrics(step, figures)
        self.progress.step(step, figures)
        if self.settings.report_to:
            self.accelerator.log(figures, step=step)

    def _show_samples(self, step: int) -> None:
        if not self.workers.is_first:
            return
        try:
            samples = self.method.samples((self.eval_rows or self.rows)[:SAMPLE_ROWS], step)
        except NoNumbers as problem:
            self.progress.note(f"step {step}: no samples: {problem}")
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.progress.note(f"step {step}: out of memory: no samples ({said_shortly(error)}); lower --sample-tokens")
            return
        self.run_folder.log_samples(step, samples)
        self.progress.samples(step, samples)

    # ---- checkpoints

    def _parameters(self) -> dict[str, Tensor]:
        return {
            f"{role}/{key}": parameter
            for role in self.method.trained
            for key, parameter in self.base.trainable_parameters(role).items()
        }

    def _save(self, step: int) -> None:
        """By the first process; the others wait until it lies there."""
        self.workers.of_first(lambda: self._write(step))

    def _write(self, step: int) -> None:
        values: dict[str, Any] = {
            "step": step,
            "sizes": self.sizes.now,
            "skipped": [self.skips.total, self.skips.in_a_row],
            **self.best.state(),
            "look_due": self.look_due,
            "method": self.method.state() if self.method_before is None else self.method_before,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        state = State({key: p.detach() for key, p in self._parameters().items()}, values)
        state.tensors |= {f"best/{key}": tensor for key, tensor in self.best.weights.items()}
        state.update(flatten("optimizer", self.optimizer.state_dict()))
        checkpoint.save(self.run_folder.checkpoints, step, state, self.settings.keep_checkpoints)

    def _as_saved(self, error: UserError, step: int) -> UserError:
        """The error of, say, a reward function, said after saving the whole steps before it."""
        if step == 0:
            return type(error)(f"{error}; the same command with --resume begins again")
        there = self.run_folder.checkpoints / f"step-{step}"
        self.workers.of_first(lambda: None if checkpoint.verify(there, step) is None else self._write(step))
        return type(error)(
            f"{error}; step {step} of {self.total_steps} is saved, the same command with --resume goes on"
        )

    def _newest(self) -> tuple[Path, State] | None:
        saved = self.run_folder.checkpoints
        found = checkpoint.latest(saved) if self.settings.resume else None
        if found is None and self.settings.resume and checkpoint.any_there(saved):
            self.progress.note(f"none of the checkpoints in {saved} is whole: the run begins again at step 1")
        return found

    def _resume(self) -> int:
        """Take up the newest checkpoint that verifies; the step it was written at, 0 without one."""
        found = self.workers.of_first(self._newest)
        if found is None:
            self.run_folder.truncate_metrics(0)
            return 0
        path, state = found
        for key, parameter in self._parameters().items():
            parameter.data.copy_(state.tensors[key])
        self.optimizer.load_state_dict(unflatten("optimizer", state))
        values = state.values
        self.scheduler.load_state_dict(values["scheduler"])
        if self.accelerator.scaler and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.sizes.now |= values["sizes"]
        self.skips.total, self.skips.in_a_row = values["skipped"]
        best = {k.removeprefix("best/"): t for k, t in state.tensors.items() if k.startswith("best/")}
        self.best.load_state(values, {key: tensor.to(self.base.device) for key, tensor in best.items()})
        self.look_due = values.get("look_due", False)
        self.method.load_state(values["method"])
        self.steps_done = int(values["step"])
        self.run_folder.truncate_metrics(values["step"])
        self.progress.note(f"resumed from {path.name} of {self.total_steps} steps")
        return int(values["step"])


def _logged(metrics: Path) -> dict[str, float]:
    """The figures of the last line that was logged; what was no number is NaN again."""
    lines = read_metrics(metrics)
    return {k: math.nan if v is None else v for k, v in (lines[-1] if lines else {}).items() if k != "step"}
