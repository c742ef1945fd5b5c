"""A disk that fails, or a process that dies, at the Nth call that changes files under a folder.

Python's calls are counted one by one: opening to write, writing, truncating, syncing, renaming, making and removing.
safetensors writes from Rust: its whole file is one call here (strace sees its parts: `test_saves.py`).
"""

import builtins
import contextlib
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

FREES = ("unlink", "rmdir", "rename", "truncate")  # what a full disk still does
RAW_OPEN = io.open


class Disk:
    """`at`: which call, from 1; 0 only counts. `then`: "kill" after that call, "half" in the middle of that write, or
    the name of an errno. `lasting`: every later call fails as well, as on a disk that stays full or read-only."""

    def __init__(
        self, tell: Callable[[str], None], under: str, at: int = 0, then: str = "kill", lasting: bool = False
    ) -> None:
        self.tell, self.under, self.at, self.then, self.lasting = tell, os.path.realpath(under), at, then, lasting
        self.count = 0

    def call(self, name: str, path: Any, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        place = os.path.realpath(path)
        outside = place != self.under and not place.startswith(self.under + os.sep)
        if outside or (name == "mkdir" and os.path.isdir(place)):  # which is there already, and nothing is changed
            return act()
        self.count += 1
        self.tell(f"disk:{name}:{os.path.relpath(place, self.under)}")
        if self.then in ("kill", "half") and self.count == self.at:
            with contextlib.suppress(OSError):  # the call may fail without our help
                (half or act)() if self.then == "half" else act()
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.at and self.fails(name):
            if half is not None:
                half()
            code = getattr(errno, self.then)
            raise OSError(code, os.strerror(code), str(path))
        return act()

    def fails(self, name: str) -> bool:
        if self.then in ("kill", "half") or self.count < self.at:
            return False
        full = self.then == "ENOSPC" and name in FREES
        return self.count == self.at or (self.lasting and not full)

    def install(self) -> None:
        """Put it between this process and its files, for good."""
        for name in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
            self._wrap(name, {"replace": "rename", "remove": "unlink"}.get(name, name))
        fsync = os.fsync
        os.fsync = lambda fd: self.call("fsync", f"/proc/self/fd/{fd}", lambda: fsync(fd))
        builtins.open = io.open = self._opener()
        self._wrap_safetensors()

    def _wrap(self, function: str, name: str) -> None:
        inner = getattr(os, function)

        def outer(path: Any, *rest: Any, **named: Any) -> Any:
            place = path
            if named.get("dir_fd") is not None:
                place = os.path.join(os.readlink(f"/proc/self/fd/{named['dir_fd']}"), path)
            return self.call(name, place, lambda: inner(path, *rest, **named))

        setattr(os, function, outer)

    def _opener(self) -> Any:
        disk = self

        class Raw(io.FileIO):
            """Every write of a buffer above it is one call of the system's."""

            def write(self, data: Any) -> Any:
                view = memoryview(data).cast("B")
                act, half = (lambda end=end: io.FileIO.write(self, view[:end]) for end in (len(view), len(view) // 2))
                return disk.call("write", self.name, act, half)

            def truncate(self, size: int | None = None) -> Any:
                return disk.call("truncate", self.name, lambda: io.FileIO.truncate(self, size))

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return RAW_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = disk.call("open", file, lambda: Raw(os.fspath(file), mode.replace("b", "").replace("t", "")))
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return opened

    def _wrap_safetensors(self) -> None:
        import safetensors.torch

        def save_file(tensors: Any, path: Path, *rest: Any) -> None:
            content = safetensors.torch.save(tensors)

            def half() -> None:
                with RAW_OPEN(path, "wb") as file:
                    file.write(content[: len(content) // 2])

            try:
                self.call("write", path, lambda: inner(tensors, path, *rest), half)
            except OSError as error:  # as its writer tells it
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors.SafetensorError(text) from error

        inner = safetensors.torch.save_file
        safetensors.torch.save_file = save_file
