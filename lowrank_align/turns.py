"""One base, wanted by a training run and by people: whose turn it is.

A run holds the base from its first step to its last and gives way between micro-batches, where no graph is pending. A
person's turn may take many tokens; after it the run gets one micro-batch at least, so that neither starves the other.
"""

import threading
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

    @contextmanager
    def background(self) -> Iterator[None]:
        """Hold the base for a training run, which calls `give_way`. One run at a time: a second is a RuntimeError."""
        with self._condition:
            if self._run is not None:
                raise RuntimeError("another run trains on this base already")
            self._run = threading.get_ident()
            self._condition.wait_for(lambda: not self._taken)
            self._taken, self._run_is_next = True, False
        try:
            yield
        finally:
            with self._condition:
                self._taken, self._run, self._run_is_next = False, None, False
                self._condition.notify_all()

    def give_way(self) -> None:
        """Let whoever waits have one turn. Called by the run between pieces of work; nothing in any other thread."""
        if self._run != threading.get_ident() or not self._asking:
            return
        with self._condition:
            self._taken = False
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._taken and (self._run_is_next or not self._asking))
            self._taken, self._run_is_next = True, False

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
