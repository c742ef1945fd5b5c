"""The page on a port, asked by raw requests as attackers make them; and how the command begins and ends."""

import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from lowrank_align.apps.studio import asked_to_stop, lock_store, private_places
from lowrank_align.apps.studio.guard import LOGIN
from lowrank_align.apps.studio.serve import (
    PASSWORD,
    Login,
    Served,
    address_of,
    bind,
    check_reach,
    prepare_environment,
    serve,
)

from lowrank_align.cli import main
from lowrank_align.config import StudioSettings
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.store import Store

SECRET = "what-only-the-owner-may-read"
MAX_BYTES = 4096
WORD = "correct horse battery"


class Answered(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: str


class Page:
    """A served page and its raw requests."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.folder = served, folder
        self.host = served.address.removeprefix("http://").rstrip("/")
        self.cookies = ""

    def ask(self, path: str, method: str = "GET", body: bytes | str | None = None, **headers: str) -> Answered:
        """`headers` with underscores for dashes; without `Host`, the page's own."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookies:
            sent["Cookie"] = self.cookies
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in sent)
            content = body.encode() if isinstance(body, str) else body
            if content is not None and "Content-Length" not in sent:
                sent["Content-Length"] = str(len(content))
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(content)
            found = connection.getresponse()
            return Answered(found.status, found.headers, found.read().decode(errors="replace"))
        finally:
            connection.close()

    def upload(self, name: str, content: bytes, **headers: str) -> Answered:
        line = "x" + secrets.token_hex(8)
        body = (
            f'--{line}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        body += content + f"\r\n--{line}--\r\n".encode()
        return self.ask(
            "/gradio_api/upload", "POST", body, Content_Type=f"multipart/form-data; boundary={line}", **headers
        )

    def shout(self, text: str, **headers: str) -> str:
        """What the page's own function answers, by the same way as a browser's events."""
        content = json.dumps({"data": [text]})
        began = self.ask("/gradio_api/call/shout", "POST", content, Content_Type="application/json", **headers)
        assert began.status == 200, began.body
        return self.ask(f"/gradio_api/call/shout/{json.loads(began.body)['event_id']}").body


def served_page(folder: Path, password: str | None = None) -> Page:
    import gradio as gr

    (folder / "studio.db").write_text(SECRET)
    with gr.Blocks(title="a page", analytics_enabled=False) as demo:
        box, out = gr.Textbox(SECRET, label="of the owner"), gr.Textbox()
        gr.Button("go").click(lambda text: text.upper(), box, out, api_name="shout")
    place = bind("127.0.0.1", 0)
    served = serve(demo, place, password=password, blocked=[folder / "studio.db"], max_upload_bytes=MAX_BYTES)
    return Page(served, folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Without a password."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        found = served_page(tmp_path_factory.mktemp("open"))
        yield found
        found.served.close()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """With a password."""
    found = served_page(tmp_path_factory.mktemp("locked"), WORD)
    yield found
    found.served.close()


# ---- what works


def test_the_page_and_its_events_work(page: Page) -> None:
    answered = page.ask("/")
    assert answered.status == 200
    assert SECRET in answered.body
    assert "img-src 'self' data: blob:" in answered.headers["Content-Security-Policy"]
    assert answered.headers["Referrer-Policy"] == "no-referrer"
    own = {"Origin": page.served.address.rstrip("/"), "Sec_Fetch_Site": "same-origin"}
    assert "HELLO" in page.shout("hello", **own)
    assert page.ask("/", Host=page.host.replace("127.0.0.1", "localhost")).status == 200


def test_an_upload_of_the_page_itself_is_taken_and_given_back(page: Page) -> None:
    answered = page.upload("rows.jsonl", b'{"prompt": "p"}\n', Origin=page.served.address.rstrip("/"))
    assert answered.status == 200, answered.body
    (path,) = json.loads(answered.body)
    assert page.ask(f"/gradio_api/file={path}").body == '{"prompt": "p"}\n'


# ---- other pages and other names


def test_a_name_bound_to_this_machine_reads_nothing(page: Page) -> None:
    port = page.host.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1:1"):
        for path in ("/", "/config", "/gradio_api/info"):
            answered = page.ask(path, Host=host)
            assert (answered.status, SECRET in answered.body) == (403, False), (host, path)
            assert not [name for name in answered.headers if name.lower().startswith("access-control-")]
        preflight = page.ask("/", "OPTIONS", Host=host, Origin=f"http://{host}", Access_Control_Request_Method="POST")
        assert preflight.status == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:3000"])
def test_another_page_can_neither_post_nor_upload_nor_read(page: Page, origin: str) -> None:
    """A post as text/plain needs no preflight, so that a browser sends it from anywhere."""
    calls = [
        ("/gradio_api/component_server", json.dumps({"session_hash": "s", "component_id": 1, "fn_name": "ls"})),
        ("/gradio_api/call/shout", json.dumps({"data": ["x"]})),
        ("/gradio_api/queue/join", json.dumps({"data": ["x"], "fn_index": 0, "session_hash": "s"})),
        ("/gradio_api/reset", json.dumps({"event_id": "e"})),
    ]
    for path, body in calls:
        for site in ({}, {"Sec_Fetch_Site": "cross-site"}):
            assert page.ask(path, "POST", body, Content_Type="text/plain", Origin=origin, **site).status == 403, path
    assert page.upload("rows.jsonl", b"x", Origin=origin).status == 403
    assert page.ask("/config", Origin=origin).status == 403


def test_a_cross_site_request_without_an_origin_is_refused(page: Page) -> None:
    for site in ("cross-site", "same-site"):
        assert page.ask("/gradio_api/heartbeat/s", Sec_Fetch_Site=site).status == 403
        assert page.ask("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 403
    assert page.ask("/", Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate").status == 200


def test_websockets_from_elsewhere_are_refused(page: Page) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }
    assert page.ask("/queue/join", Origin="http://evil.example", **upgrade).status == 403
    assert page.ask("/queue/join", Host="evil.example", **upgrade).status == 403
    assert page.ask("/gradio_api/queue/join", **upgrade).status not in (101, 200)  # there is none at all


# ---- files


def test_no_path_leads_to_a_file_of_the_machine(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page.folder)
    store = page.folder / "studio.db"
    (page.folder / "beside.txt").write_text(SECRET)
    for name in (
        store,
        page.folder / "beside.txt",
        "studio.db",
        "beside.txt",
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        f"file://{store}",
        f"{os.environ['GRADIO_TEMP_DIR']}/../{page.folder.name}/studio.db",
        "http://127.0.0.1:1/",
    ):
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/"):
            answered = page.ask(f"{route}{name}")
            assert answered.status in (400, 403, 404, 405), (route, name, answered.status)
            assert SECRET not in answered.body and "root:" not in answered.body
    assert page.ask("/gradio_api/proxy=http://127.0.0.1:1/").status == 404


def test_only_what_was_uploaded_is_taken_for_an_upload(page: Page) -> None:
    """Also in place of a text: Gradio copies whatever calls itself a file to where it can be asked for."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    before = {file for file in folder.rglob("*") if file.is_file()}
    for path in (str(page.folder / "studio.db"), "/etc/passwd", "http://127.0.0.1:1/x"):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        began = page.ask(
            "/gradio_api/call/shout", "POST", json.dumps({"data": [given]}), Content_Type="application/json"
        )
        came = page.ask(f"/gradio_api/call/shout/{json.loads(began.body)['event_id']}").body
        assert "event: error" in came and "event: complete" not in came, path
    assert {file for file in folder.rglob("*") if file.is_file()} == before


def test_an_uploads_name_leads_nowhere(page: Page) -> None:
    for name in ("../../evil.txt", "..\\..\\evil.txt", "/tmp/evil.txt"):
        answered = page.upload(name, b"x")
        if answered.status == 200:
            (path,) = json.loads(answered.body)
            assert Path(path).resolve().is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve())


def test_uploads_are_capped_also_when_their_length_is_not_told(page: Page) -> None:
    """4 KiB a file; a megabyte more for the form around it."""
    assert page.upload("rows.jsonl", b"x" * MAX_BYTES).status == 200
    assert page.upload("rows.jsonl", b"x" * (MAX_BYTES + 2000)).status == 413
    answered = page.ask("/gradio_api/upload", "POST", b"", Content_Length=str(MAX_BYTES + 2**20 + 1))
    assert (answered.status, "import larger files in the terminal" in answered.body) == (413, True)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with socket.create_connection(page.host.split(":"), timeout=30) as wire:
        wire.sendall(
            f"POST /gradio_api/call/shout HTTP/1.1\r\nHost: {page.host}\r\nTransfer-Encoding: chunked\r\n"
            "Content-Type: application/json\r\n\r\n".encode()
        )
        try:
            for _ in range(20):
                wire.sendall(chunk)
        except OSError:  # it was refused, and hung up, before the end
            assert wire.fileno() > 0
        assert wire.recv(100).startswith(b"HTTP/1.1 413")


def test_nothing_is_watched_recorded_or_shared(page: Page) -> None:
    for path in (
        "/monitoring",
        "/monitoring/summary",
        "/gradio_api/runs",
        "/gradio_api/mcp/",
        "/docs",
        "/openapi.json",
    ):
        assert page.ask(path).status == 404, path


# ---- who may be let in from outside


def settings(**given: Any) -> StudioSettings:
    return StudioSettings(**given)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "studio.lan", "127.0.0.1.evil.example"])
def test_other_machines_need_a_name_and_a_password(host: str) -> None:
    with pytest.raises(
        UserError, match=f"--host {re.escape(host)}: .*--allow-host NAME .* and a password .*{PASSWORD}$"
    ):
        check_reach(settings(host=host), None)
    with pytest.raises(UserError, match="--allow-host NAME"):
        check_reach(settings(host=host), WORD)
    with pytest.raises(UserError, match=PASSWORD):
        check_reach(settings(host=host, allow_host=["studio.lan"]), None)
    with pytest.raises(UserError, match="shorter than 8"):
        check_reach(settings(host=host, allow_host=["studio.lan"]), "short")
    check_reach(settings(host=host, allow_host=["studio.lan"]), WORD)


def test_this_machine_needs_neither() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_reach(settings(host=host), None)
    check_reach(settings(allow_host=["localhost:8080"]), None)
    with pytest.raises(UserError, match="--allow-host studio.lan: lets other machines"):
        check_reach(settings(allow_host=["studio.lan"]), None)


def test_the_address_is_one_that_browsers_may_use() -> None:
    with bind("127.0.0.1", 0) as place:
        assert address_of(place) == f"http://127.0.0.1:{place.getsockname()[1]}/"
    with bind("0.0.0.0", 0) as place:
        port = place.getsockname()[1]
        assert address_of(place, ["studio.lan"]) == f"http://studio.lan:{port}/"
        assert address_of(place, ["studio.lan:443"]) == "https://studio.lan/"


def test_before_login_nothing_is_told_and_no_path_is_open(locked: Page) -> None:
    """Every route that Gradio has, whatever it asks for."""
    import gradio as gr
    from gradio.routes import App

    first = locked.ask("/")
    assert first.status == 200
    assert 'type="password"' in first.body
    assert SECRET not in first.body and "of the owner" not in first.body and "shout" not in first.body
    with gr.Blocks(analytics_enabled=False) as empty:
        described = App.create_app(empty).openapi()["paths"]
    paths = {re.sub(r"\{[^}]*\}", "x", path) for path in described}
    assert {"/config", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/component_server"} <= paths
    for path in paths | {"/gradio_api/file=/etc/passwd", "/nowhere"}:
        if path in ("/", *LOGIN):
            continue
        for method in ("GET", "POST"):
            assert locked.ask(path, method, b"" if method == "POST" else None).status in (401, 404), path
    for path in ("/config", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/login_check", "/theme.css"):
        assert locked.ask(path).status == 401, path


def test_the_password_opens_it(locked: Page) -> None:
    def sign_in(password: str) -> Answered:
        form = urlencode({"username": "ada", "password": password})
        return locked.ask("/login", "POST", form, Content_Type="application/x-www-form-urlencoded")

    wrong = sign_in("guessed")
    assert wrong.status == 400 and not wrong.headers.get_all("Set-Cookie")
    right = sign_in(WORD)
    assert right.status == 200
    locked.cookies = "; ".join(cookie.split(";")[0] for cookie in right.headers.get_all("Set-Cookie") or [])
    try:
        assert SECRET in locked.ask("/").body
        assert "HELLO" in locked.shout("hello")
        assert locked.ask("/config", Origin="http://evil.example").status == 403
    finally:
        locked.cookies = ""
    assert locked.ask("/config").status == 401


def test_guessing_closes_the_login_for_a_minute() -> None:
    """Ten wrong ones at 0 s: at 59 s even the right one is refused, at 60 s it is taken."""
    now = [0.0]
    login = Login(WORD, clock=lambda: now[0])
    assert login("ada", WORD)
    assert not login("  ", WORD)
    assert not any(login("ada", guess) for guess in ("", "x", WORD + " ", WORD.upper(), "\udc80", "1", "2", "3", "4"))
    now[0] = 59.0
    assert not login("ada", WORD)
    now[0] = 60.0
    assert login("ada", WORD)


# ---- beginning and ending


def test_a_taken_port_is_told_with_what_to_do() -> None:
    with bind("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"port {port} of 127.0.0.1: taken.*--port") as caught:
            bind("127.0.0.1", port)
    assert caught.value.exit_code == 3
    bind("127.0.0.1", port).close()


def test_an_address_that_is_not_ours_is_told() -> None:
    with pytest.raises(EnvironmentProblem, match="--host 192.0.2.1 --port 7860: "):
        bind("192.0.2.1", 7860)
    with pytest.raises(EnvironmentProblem, match="no address is known"):
        bind("no such host", 7860)


def test_a_second_studio_on_the_store_is_told_who_has_it(tmp_path: Path) -> None:
    store = tmp_path / "deep" / "mine.db"
    with lock_store(store):
        assert (tmp_path / "deep" / "mine.db.lock").is_file()
        wanted = rf"mine.db: another studio has it open \(pid {os.getpid()}, started 2.*--store"
        (tmp_path / "link.db").symlink_to(store)
        for name in (store, tmp_path / "link.db"):
            with pytest.raises(UserError, match=wanted.replace("mine", name.stem)):
                lock_store(name)
        with Store(store) as other:  # commands may read and write meanwhile
            assert other.count() == 0
    lock_store(store).release()
    with pytest.raises(UserError, match="is a folder"):
        lock_store(tmp_path)


def test_nothing_of_gradios_environment_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"GRADIO_SHARE": "true", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_MCP_SERVER": "true", "PATH": "/bin"}
    monkeypatch.setattr(os, "environ", environment)
    folder = prepare_environment()
    assert environment == {
        "PATH": "/bin",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }
    assert folder.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    folder.rmdir()


def test_store_runs_adapters_and_model_are_never_given_out(tiny_llama: Path, tmp_path: Path) -> None:
    given = settings(model=str(tiny_llama), store=str(tmp_path / "s.db"), runs="runs", adapter=["a/run"])
    assert {tmp_path / "s.db", tmp_path / "s.db-wal", Path("runs"), Path("a/run"), tiny_llama.resolve()} <= set(
        private_places(given)
    )


def test_a_signal_asks_to_stop() -> None:
    before = signal.getsignal(signal.SIGINT)
    with asked_to_stop() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals for other processes")
def test_the_command_serves_refuses_a_second_one_and_ends_on_sigterm(
    tiny_llama: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWRANK_ALIGN_CACHE": str(cache), PASSWORD: WORD}
    environment |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "true", "GRADIO_ALLOWED_PATHS": "/"}
    first = [sys.executable, "-m", "lowrank_align", "studio", "--no-browser", "--port", str(port)]
    first += ["--model", str(tiny_llama), "--quantize", "none", "--store", "one.db"]
    child = subprocess.Popen(
        first, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert child.stdout is not None
        told = []
        for line in child.stdout:
            told.append(line)
            if line.startswith("open "):
                break
        assert told[-1] == f"open http://127.0.0.1:{port}/   (Ctrl-C ends the studio)\n", "".join(told)
        assert any(re.search(r"one copy on \w+, [\d.]+ [KMG]iB; [\d.]+ [MG]iB are free", line) for line in told)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/config")
        assert connection.getresponse().status == 401  # the password in the environment is asked for
        for store, code, words in (("one.db", 2, f"pid {child.pid}"), ("two.db", 3, f"port {port}")):
            assert main(["studio", "--no-browser", "--port", str(port), "--store", store]) == code
            told_second = capsys.readouterr().err
            assert words in told_second and told_second.count("\n") == 1
        child.send_signal(signal.SIGTERM)
        rest = child.stdout.read()
        assert (child.wait(60), "Traceback" in rest) == (0, False), rest
        assert "everything that was acknowledged is kept" in rest
        assert WORD not in "".join(told) + rest
    finally:
        child.kill()
        child.communicate()
    with lock_store(tmp_path / "one.db"), Store(tmp_path / "one.db", create=False) as store:
        assert store.count() == 0
