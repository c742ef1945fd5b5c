"""Working tasks off, in this process or in several beside each other, with a line for each that is done."""

import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lowrank_align.apps.frontier.tasks import Ground, Task, read_done
from rich.console import Console

from lowrank_align.errors import EnvironmentProblem, Stopped, UserError
from lowrank_align.stopping import StopSignals

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
SECONDS_BETWEEN_LOOKS = 1.0


class Schedule:
    """Runs tasks and counts them; `total` is how many the whole report needs."""

    def __init__(self, ground: Ground, out: Path, workers: int, total: int, console: Console) -> None:
        self.ground, self.out, self.workers, self.total, self.console = ground, out, workers, total, console
        self.done = self.cached = 0
        self.trained_seconds: list[float] = []
        self._began = time.monotonic()

    def run(self, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
        """Results by the tasks' keys; `failed` in one says why there is none.

        Stopped where a signal asked for it: what is finished stays, and the same command goes on from there.
        """
        results, waiting = {}, []
        for task in tasks:
            if (done := read_done(task.folder(self.out, self.ground))) is not None:
                results[task.key(self.ground)] = done
                self.done, self.cached = self.done + 1, self.cached + 1
            else:
                waiting.append(task)
        if waiting:
            results |= self._beside(waiting) if self.workers > 1 else self._here(waiting)
        return results

    def _here(self, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
        from lowrank_align.apps.frontier.worker import run_task

        results = {}
        with one_thread(), StopSignals() as stop:
            for task in tasks:
                self._tell_started([task])
                work = partial(run_task, task, self.ground, self.out)
                results[task.key(self.ground)] = self._settled(task, work)
                if stop.asked:
                    raise self._stopped()
        return results

    def _beside(self, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
        """Never more tasks handed out than there are workers, so that a stop waits for those alone."""
        results: dict[str, dict[str, Any]] = {}
        left = list(tasks)
        running: dict[Future[dict[str, Any]], Task] = {}
        with one_thread(), StopSignals() as stop, _pool(min(self.workers, len(tasks))) as pool:
            while left or running:
                while left and len(running) < self.workers and not stop.asked:
                    task = left.pop(0)
                    running[pool.submit(_in_worker, task, self.ground, self.out)] = task
                    self._tell_started([task])
                if not running:
                    raise self._stopped()
                finished, _ = wait(running, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
                for future in finished:
                    task = running.pop(future)
                    results[task.key(self.ground)] = self._settled(task, future.result)
        return results

    def _settled(self, task: Task, get: Any) -> dict[str, Any]:
        """The result, or why there is none: one method that breaks must not cost the whole figure."""
        try:
            result: dict[str, Any] = get()
        except (Stopped, KeyboardInterrupt):
            raise self._stopped() from None
        except BrokenProcessPool:
            raise EnvironmentProblem(
                f"{task.name}: a worker ended by itself (out of memory?); go on by the same command, fewer --workers"
            ) from None
        except Exception as error:  # a bug of a method, or numbers that are not finite
            if task.kind == "start":
                raise
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            result = {"name": task.name, "seed": task.seed, "failed": " ".join(reason.split())}
        self.done += 1
        self._tell_done(task, result)
        return result

    # ---- words

    def _tell_started(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self.console.print(f"  begins: {task.name}, seed {task.seed}", style="dim", markup=False)

    def _tell_done(self, task: Task, result: dict[str, Any]) -> None:
        if "seconds" in result:
            self.trained_seconds.append(result["seconds"])
        new = self.done - self.cached
        left = (self.total - self.done) * (time.monotonic() - self._began) / max(new, 1)
        line = f"[{self.done}/{self.total}] {task.name}, seed {task.seed}: {words(result)}; {minutes(left)} left"
        self.console.print(line, markup=False, soft_wrap=True)

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.out}: stopped after {self.done} of {self.total}; the same command goes on from there")


def words(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    if "test" in result:
        test = result["test"]
        return f"score {test['score']:+.2f}, KL {test['kl']:.1f} nats, wins {test['wins']:.2f}"
    if "accuracy" in result:
        return f"accuracy {result['accuracy']:.2f}"
    best = result["counts"][-1]
    return f"best of {best['n']}: score {best['score']:+.2f}"


def minutes(seconds: float) -> str:
    """About how long."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# ---- processes


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch in this process, and for workers that are started meanwhile; as before afterwards."""
    import torch

    before, threads = {name: os.environ.get(name) for name in ONE_THREAD}, torch.get_num_threads()
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """End with the parent, however that ends; keep quiet."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _in_worker(task: Task, ground: Ground, out: Path) -> dict[str, Any]:
    from lowrank_align.apps.frontier.worker import run_task

    return run_task(task, ground, out)
