"""The one thread in which the base does what people ask, a short bit at a time, beside a training run."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lowrank_align.base import Base
from lowrank_align.rollout import inference

log = logging.getLogger(__name__)

T = TypeVar("T")
AHEAD, COLLECT, CHAT, NOW = 1, 2, 3, 4  # what is more urgent goes first
AHEAD_AFTER_SECONDS = 0.25  # what nobody waits for yet lets the page answer first
# While a run trains, people have the base for some times what the run's last piece took, within these bounds.
SECONDS_A_TURN, LEAST_SECONDS_A_TURN, TIMES_THE_RUN = 6.0, 1.0, 4.0


class Ticket:
    """A piece of work that the speaker was given. `error` holds what it raised, `result` what it returned."""

    def __init__(self, work: Iterator[Any], urgency: int, told: bool = False) -> None:
        self.work, self.urgency, self.told = work, urgency, told
        self.done = threading.Event()
        self.cancelled = False
        self.error: BaseException | None = None
        self.result: Any = None
        self._when_done: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self.not_before = time.monotonic() + AHEAD_AFTER_SECONDS
        self.served = 0  # bits done: of equally urgent work, the least served goes first

    @property
    def ready(self) -> bool:
        """Whether it may be worked on now."""
        return self.urgency > AHEAD or self.cancelled or time.monotonic() >= self.not_before

    def cancel(self) -> None:
        """No further bit of it is done; what it has open is closed in the speaker's thread."""
        self.cancelled = True

    def when_done(self, function: Callable[[], None]) -> None:
        """Call it when the work has ended, in the speaker's thread; at once where it has."""
        with self._lock:
            if not self.done.is_set():
                self._when_done.append(function)
                return
        function()

    def end(self) -> None:
        """Mark it as ended, however it did, and tell whoever asked to know."""
        with self._lock:
            self.done.set()
        for function in self._when_done:
            try:
                function()
            except Exception:
                log.exception("what was to follow a finished piece of work failed")

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until it has ended, however it did; False where the time was over before."""
        return self.done.wait(timeout_seconds)


class Speaker:
    """Works for people, one bit of one piece of work at a time, in turns with whoever trains."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._condition = threading.Condition()
        self._tickets: list[Ticket] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)
        self._thread.start()

    def start(self, work: Iterator[Any], urgency: int = COLLECT, *, told: bool = False) -> Ticket:
        """Take up a generator whose every `next` is a short bit of work on the base (a token, a batch of scores).

        What it raises stands in the ticket, and in the log unless whoever asked is `told`.
        """
        ticket = Ticket(work, urgency, told)
        with self._condition:
            if self._closing:
                raise RuntimeError("the studio is closing")
            self._tickets.append(ticket)
            self._condition.notify_all()
        return ticket

    def call(self, function: Callable[[], T]) -> T:
        """Do it in the speaker's thread, before anything else, and give back what it returns or raises."""
        if threading.current_thread() is self._thread:
            return function()

        def once() -> Iterator[T]:
            yield function()

        ticket = self.start(once(), NOW, told=True)
        while not ticket.wait(1.0):
            if not self._thread.is_alive():
                raise RuntimeError("the speaker's thread has ended")
        if ticket.error is not None:
            raise ticket.error
        result: T = ticket.result
        return result

    def wake(self) -> None:
        """Something that waits has become urgent."""
        with self._condition:
            self._condition.notify_all()

    @property
    def busy(self) -> bool:
        """Whether anything is under way or waits."""
        return bool(self._tickets)

    def close(self) -> None:
        """End the thread after the bit that it is at; what waits is cancelled."""
        with self._condition:
            self._closing = True
            for ticket in self._tickets:
                ticket.cancel()
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not any(ticket.ready for ticket in self._tickets):
                    if self._closing and not self._tickets:
                        return
                    waits = [ticket.not_before - time.monotonic() for ticket in self._tickets]
                    self._condition.wait(max(0.001, min(waits)) if waits else None)
            with self._base.turns.foreground(), inference(self._base):
                of_the_run = TIMES_THE_RUN * self._base.turns.run_seconds
                until = time.monotonic() + min(SECONDS_A_TURN, max(LEAST_SECONDS_A_TURN, of_the_run))
                while (ticket := self._next()) is not None and time.monotonic() < until:
                    self._bit_of(ticket)

    def _next(self) -> Ticket | None:
        with self._condition:
            ready = [ticket for ticket in self._tickets if ticket.ready]
            return max(ready, key=lambda t: (t.cancelled, t.urgency, -t.served), default=None)

    def _bit_of(self, ticket: Ticket) -> None:
        try:
            if ticket.cancelled:
                close = getattr(ticket.work, "close", None)
                if close is not None:
                    close()
                self._end(ticket)
                return
            ticket.result = next(ticket.work)
            ticket.served += 1
        except StopIteration:
            self._end(ticket)
        except BaseException as error:  # whoever asked is told; the speaker goes on
            ticket.error = error
            if not ticket.told:
                log.error("a piece of the studio's work failed", exc_info=error)
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        with self._condition:
            self._tickets.remove(ticket)
        ticket.end()
