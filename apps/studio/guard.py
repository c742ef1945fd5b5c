"""Who may ask the page for anything: an ASGI middleware around the whole of it.

A page on this machine's loopback address is within reach of every web page that is open in the same browser. Gradio
alone answers any Host (so a name that is re-bound to 127.0.0.1 may read everything), and runs cross-site posts whose
type needs no preflight. Here a request has to name a host on the list, and to come from the page itself.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]
SignedIn = Callable[[Mapping[str, str]], bool]  # whether the cookies are somebody's who gave the password

# Gradio's page holds its settings in a script of its own, and its plots compile their expressions.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CROSS_ORIGIN = b"access-control-"  # nobody else may read an answer, whatever Gradio allows

# What this page never uses: fetching other servers' pages, editing the program, recording runs, watching visitors.
NOT_SERVED = (
    "/gradio_api/proxy=",
    "/gradio_api/vibe",
    "/gradio_api/undo-vibe",
    "/gradio_api/dev/",
    "/gradio_api/run-history",
    "/gradio_api/runs",
    "/gradio_api/process_recording",
    "/gradio_api/profiling",
    "/gradio_api/mcp",
    "/gradio_api/deep_link",
    "/monitoring",
    "/openapi.json",
    "/gradio_api/openapi.json",
)
ELSEWHERE = re.compile(r"/gradio_api/file[=/]+\s*\w{2,}:", re.IGNORECASE)  # Gradio would fetch it and hand it on
LOGIN = ("/login", "/login/")  # where the password is sent to
DEFAULT_PORTS = {"80": "http", "443": "https"}  # which browsers leave out of Host


def host_headers(names: Iterable[str], port: int) -> frozenset[str]:
    """The Host headers under which the page is served: each name with its own port, else with this one.

    Those that browsers leave out are left out too: behind a TLS proxy on 443 a request names the host alone.
    """
    found = set()
    for name in names:
        name = name.strip().lower()
        bare = name.strip("[]")
        if ":" in bare and bare.count(":") > 1:  # an IPv6 address
            name, has_port = f"[{bare}]" if "]:" not in name else name, "]:" in name
        else:
            has_port = ":" in name
        whole = name if has_port else f"{name}:{port}"
        alone, _, last = whole.rpartition(":")
        found |= {whole, alone} if last in DEFAULT_PORTS else {whole}
    return frozenset(found)


class Guard:
    """Refuses with one sentence: 403 for another host or origin, 401 without login, 413 for a body that is too long."""

    def __init__(
        self,
        app: App,
        *,
        hosts: frozenset[str],
        max_body_bytes: int,
        signed_in: SignedIn | None = None,
        login_page: str = "",
    ) -> None:
        """`hosts`: Host headers in lower case (see `host_headers`). `signed_in`: None without a password.

        `login_page` is the HTML in the page's place until then: Gradio's own would tell what it protects, with the
        defaults of every public function.
        """
        self._app, self._hosts, self._max_body_bytes = app, hosts, max_body_bytes
        self._signed_in, self._login_page = signed_in, login_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused is not None and refused[0] == 401 and scope["type"] == "http" and scope["path"] == "/":
            await _answer(send, 200, self._login_page, "text/html")
        elif scope["type"] != "http":
            if refused is None:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": refused[1]})  # before accept: 403
        elif refused is not None:
            await _answer(send, *refused)
        else:
            limited = Limited(receive, send, self._max_body_bytes)
            await self._app(scope, limited.receive, limited.send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence, None where the request may pass."""
        headers = _headers(scope)
        hosts = headers.get("host", []) + headers.get("x-forwarded-host", [])
        if len(headers.get("host", [])) != 1 or not all(host.lower() in self._hosts for host in hosts):
            return 403, "This address is not one of the studio's; open it as its terminal says, or see --allow-host."
        host = hosts[0].lower()
        for origin in headers.get("origin", []):
            if origin.lower() not in self._origins(host):
                return 403, "Another page asked for this; only the studio's own page may."
        for site in headers.get("sec-fetch-site", []):
            if site.lower() not in ("same-origin", "none"):
                return 403, "Another page asked for this; type the studio's address into a new tab instead."
        for length in headers.get("content-length", []):
            if not length.isdigit() or int(length) > self._max_body_bytes:
                return 413, _too_long(self._max_body_bytes)
        path = str(scope.get("path", "/"))
        if path.startswith(NOT_SERVED) or ELSEWHERE.match(path):
            return 404, "The studio has no such page."
        if self._signed_in is not None and path not in LOGIN and not self._signed_in(_cookies(headers)):
            return 401, "Sign in first: open the studio's address and give its password."
        return None

    def _origins(self, host: str) -> list[str]:
        """The page's own under this Host: without a port, one scheme's alone, as the other's is another program's."""
        own = [scheme for port, scheme in DEFAULT_PORTS.items() if f"{host}:{port}" in self._hosts]
        return [f"{scheme}://{host}" for scheme in own or DEFAULT_PORTS.values()]


class Limited:
    """A request whose body is cut off at a number of bytes, and its answer with the studio's headers."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send, self._max_bytes = receive, send, max_bytes
        self._bytes, self._refused = 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes <= self._max_bytes:
            return message
        if not self._refused:
            self._refused = True
            await _answer(self._send, 413, _too_long(self._max_bytes))
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._refused:  # it has been answered; what the page says of half a body goes nowhere
            return
        if message["type"] == "http.response.start":
            kept = [
                (name, _own_sites(value) if name.lower() == b"set-cookie" else value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(CROSS_ORIGIN) and name.lower().decode("latin-1") not in HEADERS
            ]
            message = {**message, "headers": [*kept, *_own_headers()]}
        await self._send(message)


async def _answer(send: Send, status: int, text: str, kind: str = "text/plain") -> None:
    body = (text.rstrip("\n") + "\n").encode()
    about = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode())]
    closing = [(b"connection", b"close")] if status == 413 else []  # the rest of the body is not read
    headers = [*about, *closing, *_own_headers()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _own_headers() -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in HEADERS.items()]


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope.get("headers", []):
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())
    return found


def _cookies(headers: Mapping[str, list[str]]) -> dict[str, str]:
    """By name. Other programs of this machine share a browser's cookies with the page, and write them as they like."""
    pairs = (pair.partition("=") for pair in "; ".join(headers.get("cookie", [])).split(";"))
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}


def _own_sites(cookie: bytes) -> bytes:
    """A cookie of Gradio's that no other site's request brings along."""
    return re.sub(rb";\s*samesite=\w+", b"", cookie, flags=re.IGNORECASE) + b"; SameSite=strict"


def _too_long(max_bytes: int) -> str:
    return f"Too large: the studio takes at most {max_bytes // 2**20} MB at once; import larger files in the terminal."
