"""Where chat templates run: a process of their own, which a template that takes too much loses instead of this one.

`ROOM.render(...)` starts it when it is first needed (a tenth of a second) and again after it was lost. It knows nothing
of this process but what each call passes on, as JSON.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from lowrank_align.data.template_worker import CPU_SECONDS
from lowrank_align.errors import EnvironmentProblem

RUN = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
ENVIRONMENT = ("SYSTEMROOT", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # what an interpreter may need to start
WORKER = Path(__file__).with_name("template_worker.py")
KILLED = (-9, -15)  # by somebody, or by the system where memory is short: never by a limit of the worker's own
TOO_LONG = f"takes more than {CPU_SECONDS:.0f} s"


class TemplateFailure(Exception):
    """What a template raised."""


class OverLimit(TemplateFailure):
    """Which limit it went over."""


class Room:
    """One worker for all threads of this process."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def forget(self) -> None:
        """After a fork: the worker is the other process's, and so is whoever had the turn."""
        if self._worker is not None:
            self._worker.returncode = 0  # so that nobody waits for it or complains
        self.__init__()  # type: ignore[misc]

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], *, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text; with `marked` also the characters in the template's generation blocks.

        Raises TemplateFailure for what the template raises, OverLimit among it, and EnvironmentProblem where no process
        can be started, or two were killed.
        """
        values = {"tools": None, "documents": None, **values, "messages": messages}
        request = {"template": template, "values": values, "marked": marked}
        answer = self._ask(json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n")
        if "error" in answer:
            raise (OverLimit if answer.get("limit") else TemplateFailure)(answer["error"])
        return answer["text"], [(start, end) for start, end in answer["spans"]]

    def close(self) -> None:
        """End the worker; the next rendering starts another."""
        with self._turn:
            self._end()

    def _ask(self, request: bytes) -> dict[str, Any]:
        with self._turn:
            answer, code = self._answer(request)
            if code in KILLED:
                answer, code = self._answer(request)
        if code in KILLED:
            why = "something kills it (the system does, where memory is short)"
            raise EnvironmentProblem(f"the chat template's process ended twice: {why}; close what else runs and repeat")
        if code is not None:
            raise OverLimit(_why(code))
        found: dict[str, Any] = json.loads(answer)
        return found

    def _answer(self, request: bytes) -> tuple[bytes, int | None]:
        """The worker's line, and where it gave no whole one, the exit code that it ended with."""
        worker = self._worker = self._worker or _start()
        assert worker.stdin and worker.stdout
        answer = b""
        try:
            with _watched(worker), contextlib.suppress(BrokenPipeError):
                worker.stdin.write(request)
                worker.stdin.flush()
                answer = worker.stdout.readline()
        except BaseException:  # Ctrl-C in between: whatever it still answers is of no use
            worker.kill()
            self._end()
            raise
        return answer, None if answer.endswith(b"\n") else self._end()

    def _end(self) -> int:
        worker, self._worker = self._worker, None
        if worker is None:
            return 0
        assert worker.stdin and worker.stdout
        with contextlib.suppress(OSError):
            worker.stdin.close()
        worker.stdout.close()
        return worker.wait()


def _start() -> subprocess.Popen[bytes]:
    """A worker that knows where Jinja lies, and none of this process's environment, in which there may be secrets."""
    where = {str(Path(str(module.__file__)).parents[1]): None for module in (jinja2, markupsafe)}
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.Popen([sys.executable, "-I", "-c", RUN, str(WORKER), *where], env=environment, **pipes)
    except OSError as error:
        raise EnvironmentProblem(f"no process for the chat template can be started ({error.strerror})") from None


@contextlib.contextmanager
def _watched(worker: subprocess.Popen[bytes]) -> Any:
    """Where the system has no timer that ends a process (Windows), one of ours does."""
    if hasattr(signal, "setitimer"):
        yield
        return
    timer = threading.Timer(CPU_SECONDS, worker.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _why(code: int) -> str:
    if not hasattr(signal, "SIGPROF") or code == -signal.SIGPROF:
        return TOO_LONG
    return f"takes more memory than there is, or breaks the process that it runs in (exit code {code})"


ROOM = Room()
atexit.register(ROOM.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ROOM.forget)
