"""SIGINT, SIGTERM and SIGHUP as a wish to stop at the next step boundary, with everything saved."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)


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
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: saving at the end of this step (again: stop at once)", signal.Signals(number).name)


@contextmanager
def ends_interrupt() -> Iterator[None]:
    """What ends a program as Ctrl-C where no `StopSignals` hold: while a run is made ready, with nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ends()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ends() -> list[int]:
    """SIGTERM, and where the system has it SIGHUP, a closed terminal, unless `nohup` said to go on without one."""
    hangups = [getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name)]
    return [signal.SIGTERM, *(one for one in hangups if signal.getsignal(one) != signal.SIG_IGN)]
