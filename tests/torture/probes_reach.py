"""Probes from outside: names that are re-bound, other pages, other methods, requests that are not well formed."""

import json
from collections.abc import Callable, Sequence

from tests.torture.page import Answered, Headers, Page, Probe, unless

HOST, ORIGIN, FORM = "a foreign Host, or a name bound to this machine", "a foreign Origin", "a post from another site"
WIRE = "methods, headers and bytes that no browser sends"
PLACES = ("/", "/config", "/gradio_api/info", "/gradio_api/queue/status")


def closed(answered: Answered) -> bool:
    """Refused, and readable by nobody else."""
    shared = [name for name, _ in answered.headers if name.lower().startswith("access-control-")]
    return answered.status in (0, 400, 403) and not shared and "components" not in answered.text


def by_host(*hosts: str, headers: Headers = ()) -> Callable[[Page], str]:
    def attack(page: Page) -> str:
        port = {"PORT": str(page.port), "NEXT": str(page.port + 1)}
        named = [host.format_map(port) for host in hosts]
        given = [(name, value.format_map(port)) for name, value in headers]
        found = [page.ask(place, hosts=named, headers=given) for place in PLACES]
        found.append(page.post("/gradio_api/queue/join", {"data": [], "fn_index": 0}, given, hosts=named))
        return unless(all(map(closed, found)), found)

    return attack


def by_origin(*origins: str) -> Callable[[Page], str]:
    def attack(page: Page) -> str:
        given = [("Origin", origin.format(HOST=page.host, PORT=page.port)) for origin in origins]
        event = page.event("vote-a", "click")["id"]
        found = [page.ask(place, headers=given) for place in PLACES]
        body = {"data": [], "fn_index": event, "session_hash": "s"}
        found += [page.post(f"/gradio_api/{name}", body, given) for name in ("run/predict", "queue/join", "cancel")]
        found += [page.upload("rows.jsonl", b"{}", given), page.ask("/", "OPTIONS", headers=given)]
        return unless(all(map(closed, found)), found)

    return attack


HOSTS: Sequence[str] = (
    "evil.example", "evil.example:{PORT}", "127.0.0.1", "127.0.0.1:{NEXT}", "127.0.0.1:{PORT}.evil.example",
    "localhost.:{PORT}", "localhost.localdomain:{PORT}", "127.0.0.1.nip.io:{PORT}", "evil@127.0.0.1:{PORT}",
    "127.0.0.1:{PORT}@evil.example", "0.0.0.0:{PORT}", "[::]:{PORT}", "[::ffff:127.0.0.1]:{PORT}", "127.1:{PORT}",
    "2130706433:{PORT}", "0x7f000001:{PORT}", "127.0.0.2:{PORT}", "127.0.0.1:0{PORT}", "localhost:{PORT},evil.example",
    "localhost:{PORT} evil.example", "localhost:{PORT}/", "http://localhost:{PORT}", "",
)  # fmt: skip
ORIGINS: Sequence[str] = (
    "http://evil.example", "http://evil.example:{PORT}", "null", "", "http://{HOST}/", "http://{HOST}.evil.example",
    "http://{HOST}@evil.example", "http://evil@{HOST}", "http://127.0.0.1", "http://127.0.0.1:1", "http://127.0.0.2:{PORT}",
    "http://localhost:{PORT}", "http://[::1]:{PORT}", "file://{HOST}", "chrome-extension://{HOST}",
    "http://{HOST}, http://evil.example", "http://{HOST} http://evil.example", "javascript://{HOST}",
)  # fmt: skip


def form(kind: str, body: str) -> Callable[[Page], str]:
    """Types that a browser sends anywhere without asking; and new ones say from where."""

    def attack(page: Page) -> str:
        found = []
        for site in (
            [("Origin", "http://evil.example")],
            [("Sec-Fetch-Site", "cross-site")],
            [("Sec-Fetch-Site", "same-site")],
        ):
            for path in ("run/predict", "queue/join", "reset", "component_server", "upload"):
                found.append(page.ask(f"/gradio_api/{path}", "POST", body, [("Content-Type", kind), *site]))
        return unless(all(map(closed, found)), found)

    return attack


CALL = json.dumps({"data": ["x"], "fn_index": 0, "session_hash": "s"})
PART = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.jsonl"\r\n\r\n{}\r\n--x--\r\n'


def stream(page: Page) -> str:
    """Server-sent events, which another page could read if it were let."""
    places = (
        "/gradio_api/queue/data?session_hash=s",
        "/gradio_api/heartbeat/s",
        "/gradio_api/upload_progress?upload_id=1",
    )
    found = [page.ask(place, headers=[("Origin", "http://evil.example")]) for place in places]
    found += [page.ask(place, headers=[("Sec-Fetch-Site", "cross-site")]) for place in places]
    return unless(all(map(closed, found)), found)


def socket_upgrade(page: Page) -> str:
    upgrade = [
        ("Origin", "http://evil.example"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "MDEyMzQ1Njc4OWFiY2RlZg=="),
    ]
    found = [
        page.wire(
            f"GET {place} HTTP/1.1\r\nHost: {page.host}\r\nConnection: Upgrade\r\n".encode()
            + "".join(f"{name}: {value}\r\n" for name, value in upgrade).encode()
            + b"\r\n"
        )
        for place in ("/", "/queue/join", "/gradio_api/queue/join")
    ]
    return unless(all(map(closed, found)), found)


def logout(page: Page) -> str:
    """A link or an image on another page that would end somebody's session."""
    found = page.ask("/logout", headers=[("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors")])
    return unless(closed(found), found)


def method(name: str) -> Callable[[Page], str]:
    def attack(page: Page) -> str:
        found = [page.ask(place, name) for place in ("/", "/config", "/gradio_api/upload", "/login")]
        echoed = [one for one in found if page.host in one.text]  # TRACE gives back what it was sent
        return unless(all(one.status in (0, 400, 404, 405) for one in found) and not echoed and page.alive(), found)

    return attack


def raw(*sent: str, most: int = 499) -> Callable[[Page], str]:
    def attack(page: Page) -> str:
        found = [page.wire(one.replace("HOST", page.host).encode("latin-1")) for one in sent]
        return unless(all(one.status == 0 or 400 <= one.status <= most for one in found) and page.alive(), found)

    return attack


TWO_LENGTHS = "POST /gradio_api/reset HTTP/1.1\r\nHost: HOST\r\nContent-Length: 2\r\nContent-Length: 30\r\n\r\n{}"
BOTH = (
    "POST /gradio_api/nowhere HTTP/1.1\r\nHost: HOST\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n"
    "Connection: close\r\n\r\n0\r\n\r\nGET /config HTTP/1.1\r\nHost: HOST\r\n\r\n"
)
MANY = "X-Many: 1\r\n" * 20_000

PROBES = [
    *(Probe(HOST, f"host {host or 'empty'}", by_host(host)) for host in HOSTS),
    Probe(HOST, "two hosts, the foreign one second", by_host("127.0.0.1:{PORT}", "evil.example")),
    Probe(HOST, "two hosts, the foreign one first", by_host("evil.example", "127.0.0.1:{PORT}")),
    Probe(HOST, "no host", by_host()),
    Probe(
        HOST, "a foreign host forwarded", by_host("127.0.0.1:{PORT}", headers=[("X-Forwarded-Host", "evil.example")])
    ),
    *(Probe(ORIGIN, f"origin {origin or 'empty'}", by_origin(origin)) for origin in ORIGINS),
    Probe(ORIGIN, "two origins", by_origin("http://{HOST}", "http://evil.example")),
    Probe(FORM, "a form as text", form("text/plain", CALL)),
    Probe(FORM, "a form with parts", form("multipart/form-data; boundary=x", PART)),
    Probe(FORM, "a form with fields", form("application/x-www-form-urlencoded", "data=x&fn_index=0")),
    Probe(FORM, "streams of events", stream),
    Probe(FORM, "a websocket", socket_upgrade),
    Probe(FORM, "a link that signs out", logout),
    *(Probe(WIRE, name, method(name)) for name in ("TRACE", "PUT", "DELETE", "PATCH", "CONNECT", "PROPFIND")),
    Probe(WIRE, "a header of a megabyte", raw(f"GET / HTTP/1.1\r\nHost: HOST\r\nX-Long: {'x' * 2**20}\r\n\r\n")),
    Probe(WIRE, "twenty thousand headers", raw(f"GET / HTTP/1.1\r\nHost: HOST\r\n{MANY}\r\n")),
    Probe(WIRE, "a path of a megabyte", raw(f"GET /{'x' * 2**20} HTTP/1.1\r\nHost: HOST\r\n\r\n")),
    Probe(WIRE, "two lengths", raw(TWO_LENGTHS)),
    Probe(WIRE, "a second request within the first", raw(BOTH)),
    Probe(
        WIRE,
        "lines that are no request",
        raw("\x16\x03\x01\x02\x00", "GET /\r\n\r\n"),
    ),
    Probe(
        WIRE,
        "another server's address",
        raw("GET http://evil.example/config HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"),
    ),
]
