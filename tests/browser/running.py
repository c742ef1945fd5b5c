"""The studio as people start it, in a process of its own, and Debian's chromium to look at it with."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 120
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Running:
    """A studio in a process of its own, in a folder of its own."""

    address: str
    folder: Path
    process: subprocess.Popen[str]
    output: Path

    def wait(self) -> None:
        """Until the page is served."""
        until = time.monotonic() + START_SECONDS
        while f"open {self.address}" not in self.output.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.output.read_text()
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill(self) -> None:
        """Where it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def begin_studio(folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Running:
    """The command, on the embedded base and a free port; `wait` until it is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = folder / "output.txt"
    command = [sys.executable, "-m", "lowrank_align", "studio", "--preset", "tiny", "--no-browser"]
    process = subprocess.Popen(
        [*command, "--port", str(port), *flags],
        cwd=folder,
        stdout=output.open("a"),
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
    )
    return Running(f"http://127.0.0.1:{port}/", folder, process, output)


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, through playwright; skips, saying why, where either is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=quiet)
        yield started
        started.close()
