"""The studio as people start it, and a browser that only reaches this machine and remembers what it was asked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.browser.running import Running, begin_studio, chromium

# What Gradio's own script says when a page is reloaded while it waits for an answer.
NOISE = ("AbortError", "Connection errored out", "BodyStreamBuffer was aborted", "Failed to fetch")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium through playwright; skips, saying why, where either is missing."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def start_studio(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`start_studio(*flags, folder=None)`: the command, on the embedded base and a free port."""
    started: list[Running] = []

    def start(*flags: str, folder: Path | None = None) -> Running:
        running = begin_studio(folder or tmp_path_factory.mktemp("studio"), *flags)
        started.append(running)
        running.wait()
        return running

    yield start
    for running in started:
        running.kill()


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
