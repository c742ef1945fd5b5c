"""A running studio, asked by raw requests, and what the probes against it are made of."""

import http.client
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tests.browser.running import Running
from tests.torture.forms import LONG

SECONDS = 60.0
BESIDE = "only-the-owner-may-read-this"  # in files that lie beside the store
TOKEN = "hf_planted0token1that2no3page4tells"
PASSWORD = "correct horse battery"
MARKUP = '<img src=x onerror="window.pwned=1">'
# Each writes its number into the page, or asks another host for it, where it is taken for more than text.
_RUN = "(window.pwned=window.pwned||[]).push(NUMBER)"
MARKUPS = tuple(
    text.replace("RUN", _RUN).replace("NUMBER", str(number))
    for number, text in enumerate(
        (
            '<img src=x onerror="RUN">',
            "<script>RUN</script>",
            '<svg onload="RUN"></svg>',
            '"><img src=x onerror="RUN">',
            '</textarea></title></style><img src=x onerror="RUN">',
            '<a href="javascript:RUN">a link</a>',
            "[a link](javascript:RUN)",
            '<iframe srcdoc="<script>parent.RUN</script>"></iframe>',
            '<details open ontoggle="RUN"><summary>x</summary></details>',
            '<math><mtext><table><mglyph><style><img src=x onerror="RUN">',
            '<img src="http://evil.example/NUMBER.png">',
            "![a picture](http://evil.example/NUMBER.png)",
            '<style>@import "http://evil.example/NUMBER.css";</style>',
            '<link rel=stylesheet href="http://evil.example/NUMBER.css">',
            '<meta http-equiv=refresh content="0;url=http://evil.example/NUMBER">',
            '<form action="http://evil.example/NUMBER"><button>Send</button></form>',
            '<base href="http://evil.example/NUMBER/">',
            "{{constructor.constructor('RUN')()}} ${RUN}",
            "$$\\href{javascript:RUN}{x}$$",
            "\u202e\u2066 written backwards NUMBER \u2069",
        )
    )
)
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "|", "%")
Headers = Iterable[tuple[str, str]]


class Answered(NamedTuple):
    """0 where the connection was closed without an answer."""

    status: int
    headers: list[tuple[str, str]]
    text: str

    def header(self, name: str) -> str:
        return "; ".join(value for key, value in self.headers if key.lower() == name)


@dataclass
class Page:
    """A studio and its raw requests. `canary` hears of every connection that the studio makes to an address of ours."""

    running: Running
    canary: "Canary"
    uploads: Path
    cookies: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.running.address.rstrip("/").rpartition(":")[2])

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    def some(self, attempts: Sequence[Any], of: int) -> Sequence[Any]:
        """All of them in the long form; in the short one each `of`-th."""
        return attempts if LONG else attempts[::of]

    # ---- requests

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: bytes | str | None = None,
        headers: Headers = (),
        hosts: Iterable[str] | None = None,
        until: str = "",
    ) -> Answered:
        """One request as it is written here; `hosts` in place of the page's own; read to its end, or until a word."""
        content = body.encode() if isinstance(body, str) else body
        named = [("Host", host) for host in ([self.host] if hosts is None else hosts)]
        given = [*named, *headers, ("Connection", "close")]
        if self.cookies:
            given.append(("Cookie", self.cookies))
        if content is not None and not any(
            name.lower() in ("content-length", "transfer-encoding") for name, _ in given
        ):
            given.append(("Content-Length", str(len(content))))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given), "", ""]
        return self.wire("\r\n".join(lines).encode("utf-8", "surrogateescape") + (content or b""), until, method)

    def wire(self, sent: bytes, until: str = "", method: str = "GET") -> Answered:
        """Bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as wire:
            with suppress(ConnectionError):  # it was refused before its end
                wire.sendall(sent)
            return read(wire, until, method)

    def post(self, path: str, value: Any, headers: Headers = (), **more: Any) -> Answered:
        return self.ask(path, "POST", json.dumps(value), [("Content-Type", "application/json"), *headers], **more)

    def upload(self, name: str, content: bytes, headers: Headers = (), parts: int = 1) -> Answered:
        line = "x" + secrets.token_hex(8)
        about = f'--{line}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = b"".join(about + content + b"\r\n" for _ in range(parts)) + f"--{line}--\r\n".encode()
        kind = ("Content-Type", f"multipart/form-data; boundary={line}")
        return self.ask("/gradio_api/upload", "POST", body, [kind, *headers])

    def alive(self) -> bool:
        return self.running.process.poll() is None and self.ask("/").status == 200

    # ---- what buttons do

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/config").text)
        return found

    @cached_property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Components by their element's id, or by their number where they have none."""
        return {str(c["props"].get("elem_id") or c["id"]): c for c in self.config["components"]}

    def event(self, element: str, event: str) -> dict[str, Any]:
        """The dependency behind an event of an element."""
        wanted = [self.parts[element]["id"], event]
        found: dict[str, Any] = next(one for one in self.config["dependencies"] if wanted in one["targets"])
        return found

    def name_of(self, component: int) -> str:
        return next(name for name, part in self.parts.items() if part["id"] == component)

    def press(self, element: str, event: str = "click", session: str = "", **given: Any) -> dict[str, Any] | str:
        """What comes of an event, by element; or its error in words. `given`: values by element, dashes underscored."""
        found = self.event(element, event)
        values = {name.replace("_", "-"): value for name, value in given.items()}
        names = [self.name_of(component) for component in found["inputs"]]
        data = [values.get(name, self.parts[name]["props"].get("value")) for name in names]
        answered = self.run(found, data, session)
        if isinstance(answered, str):
            return answered
        return {self.name_of(one): value for one, value in zip(found["outputs"], answered, strict=False)}

    def run(self, event: dict[str, Any], data: Any, session: str = "") -> list[Any] | str:
        """The values that an event's function gives to this data; or its error."""
        session = session or secrets.token_hex(5)
        body = {"data": data, "fn_index": event["id"], "session_hash": session, "event_data": None}
        if event["queue"] is False:
            answered = self.post("/gradio_api/run/predict", body)
            found = json.loads(answered.text) if answered.text.startswith("{") else {"error": answered.text}
            return found["data"] if answered.status == 200 else str(found.get("error") or found)
        joined = self.post("/gradio_api/queue/join", body)
        if joined.status != 200:
            return joined.text
        told = self.ask(f"/gradio_api/queue/data?session_hash={session}", until='"msg":"close_stream"').text
        lines = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: ")]
        ended = next((line for line in lines if line["msg"] == "process_completed"), {"success": False, "output": {}})
        output = ended["output"]
        return list(output["data"]) if ended["success"] else str(output.get("error") or output)


def read(wire: socket.socket, until: str = "", method: str = "GET") -> Answered:
    answer = http.client.HTTPResponse(wire, method=method)
    try:
        answer.begin()
        if not until:
            return Answered(answer.status, answer.getheaders(), answer.read().decode(errors="replace"))
        text = ""
        while until not in text.replace(" ", "") and (line := answer.readline()):
            text += line.decode(errors="replace")
        return Answered(answer.status, answer.getheaders(), text)
    except (http.client.HTTPException, ConnectionError):
        return Answered(0, [], "")
    finally:
        answer.close()


class Canary:
    """A server of ours that counts who connects to it."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.visits = 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        with suppress(OSError):
            while True:
                wire, _ = self._listening.accept()
                self.visits += 1
                wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
                wire.close()

    def close(self) -> None:
        self._listening.close()


@dataclass(frozen=True)
class Probe:
    """An attack that says what came of it: "" where it had no success."""

    group: str
    name: str
    attack: Callable[[Page], str]

    def __str__(self) -> str:
        return self.name


def unless(held: bool, what: object) -> str:
    """An attack's words: what was seen, where the page did not hold."""
    return "" if held else f"{what!s:.500}"
