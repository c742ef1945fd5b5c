"""One base, wanted by a training run and by people: whose turn it is.

A run holds the base from its first step to its last and gives way between micro-batches, where no graph is pending. A
person's turn may take many tokens; after it the run gets one micro-batch at least, so that neither starves the other.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Who may use the base now. Threads that never ask (a program with one thread) pay a comparison a micro-batch."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._taken = False
        self._run: int | None = None  # the thread that trains
        self._asking = 0  # people who wait
        self._run_is_next = False
        self._run_since = 0.0
        self.run_seconds = 0.0  # how long the run had the base before it last gave way

    @contextmanager
    def background(self) -> Iterator[None]:
        """Hold the base for a training run, which calls `give_way`. One run at a time: a second is a RuntimeError."""
        with self._condition:
            if self._run is not None:
                raise RuntimeError("another run trains on this base already")
            self._run = threading.get_ident()
            self._condition.wait_for(lambda: not self._taken)
            self._taken, self._run_is_next = True, False
            self._run_since = time.monotonic()
        try:
            yield
        finally:
            with self._condition:
                self._taken, self._run, self._run_is_next = False, None, False
                self._condition.notify_all()

    def give_way(self, at_least_seconds: float = 0.0) -> None:
        """Let whoever waits have one turn. Called by the run between pieces of work; nothing in any other thread.

        `at_least_seconds`: not before the run has had the base so long, where its pieces are short (tokens).
        """
        if self._run != threading.get_ident() or not self._asking:
            return
        self.run_seconds = time.monotonic() - self._run_since
        if self.run_seconds < at_least_seconds:
            return
        with self._condition:
            self._taken = False
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._taken and (self._run_is_next or not self._asking))
            self._taken, self._run_is_next = True, False
            self._run_since = time.monotonic()

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """Use the base for something that a person waits for. Not re-entrant."""
        with self._condition:
            self._asking += 1
            self._condition.wait_for(lambda: not self._taken and not self._run_is_next)
            self._asking -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._run_is_next = self._run is not None
                self._condition.notify_all()
