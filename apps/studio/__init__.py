"""`lowrank-align studio`: collect pairs, chat, train and compare in one local page.

Everything heavy is imported inside `run_studio`: what can be refused is refused at once, then the base is loaded, and
Gradio comes last, in an environment that says nothing to it.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lowrank_align.config import StudioSettings
from lowrank_align.errors import EXIT_DONE, EnvironmentProblem, UserError
from lowrank_align.locks import FileLock

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

log = logging.getLogger(__name__)


def run_studio(settings: StudioSettings) -> int:
    """Serve the page until Ctrl-C or SIGTERM; its exit code."""
    from .serve import PASSWORD, address_of, bind, check_reach

    password = os.environ.pop(PASSWORD, None) or None  # no child process needs it
    check_reach(settings, password)
    store = Path(settings.store).expanduser()
    with contextlib.ExitStack() as held:
        held.enter_context(lock_store(store))
        place = held.enter_context(bind(settings.host, settings.port))
        asked = held.enter_context(asked_to_stop())
        print(f"loading {settings.model} ...", flush=True)
        from lowrank_align.studio.studio import Studio

        studio = held.enter_context(contextlib.closing(Studio.open(settings)))
        if not asked.is_set():
            _serve(studio, settings, place, password, asked, address_of(place, settings.allow_host or ()))
        print("\nending: what trains is saved at the end of its step (again: end at once)", flush=True)
    print("ended; everything that was acknowledged is kept", flush=True)
    return EXIT_DONE


def lock_store(store: Path) -> FileLock:
    """The lock `FILE.db.lock` beside the store, which only one studio at a time may have; commands need none."""
    if store.is_dir():
        raise UserError(f"{store}: is a folder; name a file with --store")
    try:
        store.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{store.parent}: cannot be made: {error.strerror}; choose another --store") from error
    beside = Path(os.path.realpath(store) + ".lock")  # one store, also under the name of a link
    return FileLock(beside, busy=f"{store}: another studio has it open", advice="end that one, or name another --store")


@contextlib.contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second one ends the process at once. In the main thread alone."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            sys.stderr.write("ended at once; the store is whole, a run goes on from its last checkpoint\n")
            os._exit(128 + number)
        asked.set()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(
    studio: "Studio",
    settings: StudioSettings,
    place: Any,
    password: str | None,
    asked: threading.Event,
    address: str,
) -> None:
    from .serve import discard, prepare_environment, serve

    folder = prepare_environment()
    try:
        from huggingface_hub import constants

        from .page import build_page, head, style, theme

        constants.HF_HUB_OFFLINE = True  # the base is here: from now on nothing is asked of anybody
        for line in summary(studio):
            print(line)
        served = serve(
            build_page(studio),
            place,
            allow_hosts=settings.allow_host or (),
            password=password,
            blocked=private_places(settings),
            look={"css": style(), "head": head(), "theme": theme()},
        )
        print(f"open {address}   (Ctrl-C ends the studio)", flush=True)
        if settings.browser:
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        while not asked.wait(0.5) and served.running:  # with a timeout, or Windows would not see Ctrl-C
            continue
        served.close()
    finally:
        discard(folder)


def summary(studio: "Studio") -> list[str]:
    """What was loaded, the memory it takes, what is left, and what the store holds."""
    facts, store = studio.facts(), studio.store
    device, dtype = studio.base.device, str(studio.base.compute_dtype).removeprefix("torch.")
    judged, waiting = store.count(), store.queue_total()
    return [
        f"{facts.model}: {facts.quantize}, {dtype}, one copy on {device}, {_size(facts.base_bytes)}; "
        f"{_size(facts.free_bytes)} are free",
        f"{store.path}: {judged} judgement{'s' * (judged != 1)}, {waiting} prompt{'s' * (waiting != 1)} in the queue",
    ]


def _size(size_bytes: int) -> str:
    from lowrank_align.plan.words import gib

    return gib(size_bytes) if size_bytes >= 2**20 else f"{size_bytes / 2**10:.0f} KiB"


def private_places(settings: StudioSettings) -> list[Path]:
    """What the page never gives out as a file: the store, the runs, the adapters, the model."""
    from lowrank_align.loading import model_folder

    store = Path(settings.store).expanduser()
    files = [store.with_name(store.name + end) for end in ("", "-journal", "-wal", "-shm", ".lock")]
    folders = [Path(settings.runs).expanduser(), *(Path(name).expanduser() for name in settings.adapter or ())]
    return [*files, *folders, model_folder(settings.model)]
