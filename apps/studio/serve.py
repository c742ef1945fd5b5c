"""The page on a port: behind the guard, with nothing left to Gradio's defaults or its environment variables."""

import errno
import hmac
import inspect
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from lowrank_align.config import StudioSettings
from lowrank_align.errors import EnvironmentProblem, UserError

from .guard import Guard, host_headers

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)

FOLDER = "lowrank-studio-"
PASSWORD = "LOWRANK_STUDIO_PASSWORD"
PASSWORD_CHARACTERS = 8
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MAX_UPLOAD_BYTES = 64 * 2**20
FORM_BYTES = 2**20  # what a form puts around the file in it
WRONG_PASSWORDS, WRONG_WITHIN_SECONDS = 10, 60.0
START_SECONDS, STOP_SECONDS = 30.0, 5.0


def check_reach(settings: StudioSettings, password: str | None) -> None:
    """UserError where somebody else than this machine could reach the page, and it is not said who and by what."""
    names = settings.allow_host or []
    beyond = [name for name in names if not is_loopback(_without_port(name))]
    if is_loopback(settings.host) and not beyond:
        return
    missing = [] if names else ["--allow-host NAME (the name or address under which they open it)"]
    if not password:
        missing.append(f"a password in the environment variable {PASSWORD}")
    if missing:
        what = f"--host {settings.host}" if not is_loopback(settings.host) else f"--allow-host {beyond[0]}"
        raise UserError(f"{what}: lets other machines reach the studio; that also needs {' and '.join(missing)}")
    if password is not None and len(password) < PASSWORD_CHARACTERS:
        raise UserError(f"{PASSWORD}: shorter than {PASSWORD_CHARACTERS} characters; take a longer one")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; names other than localhost may lead anywhere."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; EnvironmentProblem where the port is taken or the address is not ours. Port 0 is any."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere the option would let two programs share the port
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
            place.listen()
        except BaseException:
            place.close()
            raise
    except socket.gaierror as error:
        raise EnvironmentProblem(f"--host {host}: no address is known for it") from error
    except OverflowError as error:
        raise UserError(f"--port {port}: must be 65535 at most") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise EnvironmentProblem(
                f"port {port} of {host}: taken, perhaps by another studio; name a free one with --port"
            ) from error
        raise EnvironmentProblem(f"--host {host} --port {port}: {error.strerror}; choose others") from error
    return place


def prepare_environment() -> Path:
    """Before Gradio is first imported: none of its variables set but ours. The folder of its uploads and downloads."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):  # by a studio that was killed
        pid = left.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            discard(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-")).resolve()  # for this user alone
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return folder


class Login:
    """Whether a name and a password are right. After ten wrong ones within a minute, all are."""

    def __init__(self, password: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._password, self._clock = password.encode(), clock
        self._wrong: list[float] = []

    def __call__(self, name: str, password: str) -> bool:
        now = self._clock()
        self._wrong = [at for at in self._wrong if now - at < WRONG_WITHIN_SECONDS]
        if len(self._wrong) >= WRONG_PASSWORDS:
            return False
        if name.strip() and hmac.compare_digest(password.encode(errors="replace"), self._password):
            return True
        self._wrong.append(now)
        if len(self._wrong) == WRONG_PASSWORDS:
            log.warning("%d wrong passwords within a minute: nobody can sign in for a minute", WRONG_PASSWORDS)
        return False


class Served:
    """A page that is being served, in a thread of its own, until `close`."""

    def __init__(self, server: Any, thread: threading.Thread, demo: "gr.Blocks", address: str) -> None:
        self._server, self._thread, self._demo = server, thread, demo
        self.address = address

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """No more requests; open streams end."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would list every page that is still open
        self._demo.is_running = False
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)


def serve(
    demo: "gr.Blocks",
    place: socket.socket,
    *,
    allow_hosts: Sequence[str] = (),
    password: str | None = None,
    blocked: Sequence[Path] = (),
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    look: Mapping[str, Any] | None = None,
) -> Served:
    """Serve the page on a socket of `bind`'s. `blocked`: files and folders that are never given out; `look`: css, head
    and theme. Needs `prepare_environment` before Gradio is imported, to owe nothing to its variables."""
    import uvicorn

    guard = _guarded(demo, place, allow_hosts, password, blocked, max_upload_bytes, look or {})
    server = uvicorn.Server(
        uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, name="page", daemon=True)
    thread.start()
    until = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            raise EnvironmentProblem(f"port {place.getsockname()[1]}: the page could not be served there; see above")
        time.sleep(0.01)
    return Served(server, thread, demo, address_of(place, allow_hosts))


def _guarded(
    demo: "gr.Blocks",
    place: socket.socket,
    allow_hosts: Sequence[str],
    password: str | None,
    blocked: Sequence[Path],
    max_upload_bytes: int,
    look: Mapping[str, Any],
) -> Guard:
    """The page as an application, with every option of Gradio's said, behind the guard."""
    import gradio as gr
    from fastapi import FastAPI
    from gradio import processing_utils
    from gradio.routes import App

    host, port = place.getsockname()[:2]
    parent = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        parent,
        demo,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        auth=Login(password) if password else None,
        root_path="",
        allowed_paths=[],
        blocked_paths=[str(path.absolute()) for path in blocked],
        show_error=False,
        max_file_size=max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **_where_known(gr.mount_gradio_app, run_history=False),
        **look,
    )
    demo.has_launched = True  # mounted, not launched: else Gradio would take any path of this machine for an upload
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    page = next(inner for route in parent.routes if isinstance(inner := getattr(route, "app", None), App))

    def signed_in(cookies: Mapping[str, str]) -> bool:
        names = (f"access-token-{page.cookie_id}", f"access-token-unsecure-{page.cookie_id}")
        return any(cookies.get(name) in page.tokens for name in names)

    return Guard(
        parent,
        hosts=host_headers([*LOOPBACK_NAMES, *allow_hosts], port),
        max_body_bytes=max_upload_bytes + FORM_BYTES,
        signed_in=signed_in if password else None,
        login_page=(files(__package__) / "static" / "login.html").read_text(encoding="utf-8"),
    )


async def _fetch_nothing(url: str) -> NoReturn:
    """In place of Gradio's download of an address that somebody gives as a file."""
    raise PermissionError(f"{url[:80]}: the studio fetches nothing")


def address_of(place: socket.socket, allow_hosts: Sequence[str] = ()) -> str:
    """What to open: this machine's own name for it, or the first allowed one where the socket is for others."""
    host, port = place.getsockname()[:2]
    if not is_loopback(host) and allow_hosts:
        found = min(host_headers(allow_hosts[:1], port), key=len)
        return f"https://{found}/" if allow_hosts[0].endswith(":443") else f"http://{found}/"
    shown = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"


def _where_known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that this version of Gradio has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def discard(folder: Path) -> None:
    """Remove what was uploaded and offered for download."""
    shutil.rmtree(folder, ignore_errors=True)


def _without_port(name: str) -> str:
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0] if name.count(":") == 1 else name
