"""The guard by itself, around an application that answers everything: who is let through to it, and with what."""

import asyncio
from typing import Any

import pytest
from lowrank_align.apps.studio.guard import HEADERS, Guard, _own_sites, host_headers

HOSTS = host_headers(["localhost", "127.0.0.1", "[::1]"], 7860)
HOME = {"host": "127.0.0.1:7860"}


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole body and says how long it was; allows everybody everything, as Gradio may."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("half a body")
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    headers = [(b"access-control-allow-origin", b"*"), (b"x-frame-options", b"ALLOWALL")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(size).encode()})


def asked(
    headers: dict[str, str] | list[tuple[str, str]] = HOME,
    path: str = "/gradio_api/queue/join",
    *,
    body: list[bytes] | None = None,
    kind: str = "http",
    signed_in: Any = None,
    max_body_bytes: int = 100,
    hosts: frozenset[str] = HOSTS,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of the answer; for websockets 101 or 403."""
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": kind,
        "method": "POST",
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in pairs],
    }
    chunks = [b""] if body is None else body
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": n < len(chunks) - 1} for n, chunk in enumerate(chunks)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(
        answering, hosts=hosts, max_body_bytes=max_body_bytes, signed_in=signed_in, login_page="the login page"
    )
    try:
        asyncio.run(guard(scope, receive, send))
    except RuntimeError:
        assert sent[0]["status"] == 413
    if kind == "websocket":
        return (101 if sent[0]["type"] == "websocket.accept" else 403), {}, sent[0].get("reason", "")
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, sent[1]["body"].decode()


def test_the_page_itself_is_let_through_with_headers_of_the_guards_own() -> None:
    own = {**HOME, "origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    status, headers, body = asked(own, body=[b"12", b"345"])
    assert (status, body) == (200, "5")
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in headers
    for directive in ("img-src 'self' data: blob:", "connect-src 'self'", "frame-ancestors 'none'"):
        assert directive in headers["content-security-policy"]


@pytest.mark.parametrize("host", ["localhost:7860", "LOCALHOST:7860", "[::1]:7860"])
def test_every_name_of_this_machine_is_served(host: str) -> None:
    assert asked({"host": host})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:7860"},  # a name that is re-bound to 127.0.0.1
        {"host": "127.0.0.1:7861"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:7860.evil.example"},
        {"host": ""},
        {},
        [("host", "127.0.0.1:7860"), ("host", "evil.example")],
        {**HOME, "x-forwarded-host": "evil.example"},
        {**HOME, "origin": "http://evil.example"},
        {**HOME, "origin": "null"},
        {**HOME, "origin": ""},
        {**HOME, "origin": "http://127.0.0.1:8888"},  # another program of this machine
        {**HOME, "origin": "http://localhost:7860"},
        {**HOME, "origin": "file://127.0.0.1:7860"},
        {**HOME, "sec-fetch-site": "cross-site"},
        {**HOME, "sec-fetch-site": "same-site"},
        [("host", "127.0.0.1:7860"), ("origin", "http://127.0.0.1:7860"), ("origin", "http://evil.example")],
    ],
    ids=str,
)
def test_other_hosts_and_pages_are_refused(headers: Any) -> None:
    status, found, body = asked(headers)
    assert status == 403
    assert body.count(".") == 1 and body.endswith(".\n")
    assert found["x-content-type-options"] == "nosniff"
    assert asked(headers, kind="websocket")[0] == 403


def test_websockets_of_the_page_itself_pass() -> None:
    assert asked({**HOME, "origin": "http://127.0.0.1:7860"}, kind="websocket")[0] == 101


def test_a_body_that_is_too_long_is_refused_announced_or_not() -> None:
    assert asked({**HOME, "content-length": "100"}, body=[b"x" * 100])[0] == 200
    for size in ("101", "-1", "1e9", ""):
        assert asked({**HOME, "content-length": size}, body=[b""])[0] == 413, size
    status, _, body = asked(body=[b"x" * 60, b"x" * 40, b"x", b"x" * 1000])
    assert (status, "at most 0 MB" in body) == (413, True)
    assert asked(body=[b"x" * 60, b"x" * 40])[2] == "100"


def test_what_the_page_never_uses_is_not_there() -> None:
    for path in ("/gradio_api/proxy=http://evil.example/", "/monitoring", "/gradio_api/vibe-edit/", "/gradio_api/runs"):
        assert asked(path=path)[0] == 404, path


def test_with_a_password_only_the_login_is_open() -> None:
    """`key=right` stands for the cookie of somebody who gave the password."""

    def signed_in(cookies: Any) -> bool:
        return cookies.get("key") == "right"

    assert asked(path="/login", body=[b"1"], signed_in=signed_in)[2] == "1"
    assert asked(path="/", body=[b"1"], signed_in=signed_in)[2] == "the login page\n"
    assert asked({**HOME, "cookie": "key=right"}, "/", body=[b"1"], signed_in=signed_in)[2] == "1"
    assert asked({"host": "evil.example"}, "/", signed_in=signed_in)[0] == 403
    for path in (
        "/config",
        "/gradio_api/queue/join",
        "/gradio_api/file=/etc/passwd",
        "/assets/index.js",
        "//",
        "/loginx",
    ):
        assert asked(path=path, signed_in=signed_in)[0] == 401, path
        assert asked({**HOME, "cookie": "a=b; key=right"}, path, signed_in=signed_in)[0] == 200, path
        assert asked({**HOME, "cookie": "key=wrong"}, path, signed_in=signed_in)[0] == 401, path
    assert asked(kind="websocket", signed_in=signed_in)[0] == 403


def test_host_headers() -> None:
    """Each with the port, or its own; without it too on the ports that browsers leave out."""
    assert host_headers(["Studio.lan", "10.0.0.2:8443", "::1"], 7860) == {
        "studio.lan:7860",
        "10.0.0.2:8443",
        "[::1]:7860",
    }
    assert host_headers(["studio.lan"], 80) == {"studio.lan:80", "studio.lan"}
    assert host_headers(["[fe80::1]:8443"], 7860) == {"[fe80::1]:8443"}
    assert host_headers(["studio.lan:443"], 7860) == {"studio.lan:443", "studio.lan"}
    assert host_headers(["[fe80::1]:80"], 7860) == {"[fe80::1]:80", "[fe80::1]"}


@pytest.mark.parametrize(("port", "own", "other"), [(443, "https", "http"), (80, "http", "https")])
def test_without_a_port_one_scheme_is_the_page_itself(port: int, own: str, other: str) -> None:
    """What is on the other one's default port is another program."""
    hosts = host_headers([f"studio.lan:{port}"], 7860)
    assert asked({"host": "studio.lan", "origin": f"{own}://studio.lan"}, hosts=hosts)[0] == 200
    assert asked({"host": "studio.lan", "origin": f"{other}://studio.lan"}, hosts=hosts)[0] == 403
    assert asked({"host": "studio.lan:7860"}, hosts=hosts)[0] == 403


def test_no_address_is_fetched_for_somebody() -> None:
    """Gradio's route for files would fetch another server's and hand it on, past the page's policy."""
    for path in (
        "http://evil.example/a.png",
        "HTTPS://evil.example/",
        " http://evil.example/",
        "/http://evil.example",
        "ftp:x",
    ):
        assert asked(path=f"/gradio_api/file={path}")[0] == 404, path
    assert asked(path="/gradio_api/file/https://evil.example/")[0] == 404
    for path in ("/tmp/lowrank-studio-1/a.jsonl", "C:\\Temp\\a.jsonl", "/tmp/a:b.jsonl"):
        assert asked(path=f"/gradio_api/file={path}", body=[b"1"])[0] == 200, path


def test_cookies_are_for_this_site_alone() -> None:
    """And those that other programs of this machine have left beside them hide none."""
    assert _own_sites(b"a=b; Path=/; SameSite=none; Secure") == b"a=b; Path=/; Secure; SameSite=strict"
    assert _own_sites(b"a=b; HttpOnly; Path=/; SameSite=lax") == b"a=b; HttpOnly; Path=/; SameSite=strict"
    for junk in ('{"a": 1}', "a b=c", "=", "[x]", 'b="c'):
        cookie = {**HOME, "cookie": f"{junk}; key=right"}
        assert asked(cookie, "/config", body=[b"1"], signed_in=lambda found: found.get("key") == "right")[0] == 200, (
            junk
        )
