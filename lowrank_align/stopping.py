"""SIGINT, SIGTERM and SIGHUP as a wish to stop at the next step boundary, with everything saved."""

import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


class StopSignals:
    """`asked` turns true at the first signal; a second one interrupts at once. Other threads set it by hand."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_ends()):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _without_terminal()
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: saving at the end of this step (again: stop at once)", signal.Signals(number).name)


@contextlib.contextmanager
def ends_interrupt() -> Iterator[None]:
    """What ends a program as Ctrl-C where no `StopSignals` hold: while a run is made ready, with nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _without_terminal()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ends()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ends() -> list[int]:
    """SIGTERM, and where the system has it SIGHUP, a closed terminal, unless `nohup` said to go on without one."""
    if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, HANGUP]


def _without_terminal() -> None:
    """What is printed to a terminal that is closed would be an error, and end the run before it is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        with contextlib.suppress(OSError):  # closed by the user
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
    os.close(nowhere)
