"""The studio as people start it, and a browser that only reaches this machine and remembers what it was asked."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

START_SECONDS = 120
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# What Gradio's own script says when a page is reloaded while it waits for an answer.
NOISE = ("AbortError", "Connection errored out", "BodyStreamBuffer was aborted", "Failed to fetch")


@dataclass
class Running:
    """A studio in a process of its own, in a folder of its own."""

    address: str
    folder: Path
    process: subprocess.Popen[str]
    output: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium through playwright; skips, saying why, where either is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=quiet)
        yield started
        started.close()


@pytest.fixture(scope="session")
def start_studio(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`start_studio(*flags, folder=None)`: the command, on the embedded base and a free port."""
    started: list[Running] = []

    def start(*flags: str, folder: Path | None = None) -> Running:
        folder = folder or tmp_path_factory.mktemp("studio")
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
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        running = Running(f"http://127.0.0.1:{port}/", folder, process, output)
        started.append(running)
        until = time.monotonic() + START_SECONDS
        while f"open {running.address}" not in output.read_text():
            assert process.poll() is None and time.monotonic() < until, output.read_text()
            time.sleep(0.1)
        return running

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@dataclass
class Seen:
    """What a page did that nobody asked for."""

    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(address, **context)`: a fresh browser window; at the end no request went elsewhere, no error was told.

    Other hosts are blocked, so that what asks for them fails the test on any machine.
    """
    contexts: list[Any] = []
    seen = Seen()

    def open_it(address: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        own = urlsplit(address).netloc

        def route(route: Any) -> None:
            where = urlsplit(route.request.url)
            if where.netloc == own or where.scheme in ("data", "blob"):
                route.continue_()
            else:
                seen.foreign.append(route.request.url)
                route.abort()

        context.route("**/*", route)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda told: seen.errors.append(told.text) if told.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#collect-prompt textarea")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert seen.foreign == []
    assert [error for error in seen.errors if not any(words in error for words in NOISE)] == []
