"""Probes for files of the machine, uploads that are too much, and addresses that the studio would fetch."""

import gzip
import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from tests.torture.page import BESIDE, SECONDS, TOKEN, Page, Probe, read, unless

FILES, FLOOD, FETCH = (
    "a path to a file of this machine",
    "an upload that is too much, or not what it says",
    "an address for the studio to fetch",
)
ROUTES = (
    "/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/", "/static/", "/assets/", "/svelte/",
    "/custom_component/", "/gradio_api/stream/", "/gradio_api/upload/", "/", "/gradio_api/file=/static/../",
)  # fmt: skip
SIGNS = (BESIDE, TOKEN, "SQLite format 3", "root:x:", "PATH=", "lowrank_align.egg", "max_new_tokens:")
MEGABYTE = 2**20


def files_in(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if file.is_file()}


def told(text: str) -> list[str]:
    """Which secrets are in it."""
    return [sign for sign in SIGNS if sign in text]


def by_path(*names: str) -> Callable[[Page], str]:
    """On every route; names with the page's own places in them."""

    def attack(page: Page) -> str:
        places = {"FOLDER": str(page.running.folder), "UPLOADS": str(page.uploads), "HOME": str(Path.home())}
        found = {}
        for route in ROUTES:
            for name in names:
                answered = page.ask(route + name.format_map(places))
                if answered.status not in (0, 307, 400, 403, 404, 405, 422) or told(answered.text):
                    found[route + name] = answered
        return unless(not found, found)

    return attack


def by_link(page: Page) -> str:
    """A link in the folder of uploads, if somebody could put one there."""
    link = page.uploads / "link.jsonl"
    link.symlink_to(page.running.folder / "studio.db")
    found = page.ask(f"/gradio_api/file={link}")
    link.unlink()
    return unless(found.status == 403 and not told(found.text), found)


def as_upload(*names: str) -> Callable[[Page], str]:
    """The path of a file that nobody has uploaded, in place of an upload and of a text."""

    def attack(page: Page) -> str:
        places = {"FOLDER": str(page.running.folder), "HOME": str(Path.home()), "UPLOADS": str(page.uploads)}
        before, seen = files_in(page.uploads), []
        for name in names:
            given = {"path": name.format_map(places), "orig_name": "rows.txt", "meta": {"_type": "gradio.FileData"}}
            seen += [page.press("collect-upload", "upload", collect_upload=given)]
            seen += [page.press("data-import", "upload", data_import=given)]
            seen += [page.press("train-upload", "upload", train_upload=given)]
            seen += [page.press("collect-reason", "input", collect_reason=given, annotator_name=given)]
        copied = files_in(page.uploads) - before
        return unless(not copied and not told(json.dumps(seen)), (copied, seen))

    return attack


# ---- too much


def too_long(page: Page) -> str:
    announced = page.ask("/gradio_api/upload", "POST", b"", [("Content-Length", str(66 * MEGABYTE))])
    negative = page.ask("/gradio_api/upload", "POST", b"", [("Content-Length", "-1")])
    huge = page.ask("/gradio_api/run/predict", "POST", b"", [("Content-Length", "9" * 30)])
    found = [announced, negative, huge]
    return unless(all(one.status in (400, 413) for one in found) and page.alive(), found)


def endless(page: Page) -> str:
    """Chunk after chunk, whose sum nobody has announced."""
    sent = 0
    with socket.create_connection(("127.0.0.1", page.port), timeout=SECONDS) as wire:
        head = f"POST /gradio_api/run/predict HTTP/1.1\r\nHost: {page.host}\r\nTransfer-Encoding: chunked\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        try:
            while sent < 100:
                wire.sendall(b"100000\r\n" + b"x" * MEGABYTE + b"\r\n")
                sent += 1
        except ConnectionError:
            pass
        answered = read(wire)
    return unless(sent < 100 and answered.status in (0, 400, 413) and page.alive(), (sent, answered))


def many_parts(page: Page) -> str:
    before = files_in(page.uploads)
    answered = page.upload("a.jsonl", b"{}", parts=3000)
    left = files_in(page.uploads) - before
    return unless(answered.status in (400, 413) and not left and page.alive(), (answered, len(left)))


def slow(page: Page) -> str:
    """A hundred bodies that never end: others are answered meanwhile."""
    with ExitStack() as open_wires:
        for _ in range(100):
            wire = open_wires.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=SECONDS))
            wire.sendall(
                f"POST /gradio_api/run/predict HTTP/1.1\r\nHost: {page.host}\r\nContent-Length: 1000\r\n\r\n{{".encode()
            )
        served = page.alive() and isinstance(page.press("collect-reason", "input"), dict)
    return unless(served and page.alive(), "not answered meanwhile")


def at_once(page: Page) -> str:
    """Two hundred requests at the same time."""
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(page.ask("/theme.css").status)) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return unless(statuses == [200] * 200 and page.alive(), statuses)


def named(page: Page) -> str:
    """The name of an upload leads nowhere."""
    for name in (
        "../../evil.jsonl",
        "..\\..\\evil.jsonl",
        "/tmp/evil.jsonl",
        "a/../../evil.jsonl",
        "\x00evil.jsonl",
        "x" * 5000,
    ):
        answered = page.upload(name, b'{"prompt": "p"}\n')
        if answered.status == 200:
            outside = [
                p for p in json.loads(answered.text) if not Path(p).resolve().is_relative_to(page.uploads.resolve())
            ]
            if outside:
                return str(outside)
    return unless(page.alive(), "ended")


def shown(name: str, content: bytes) -> Callable[[Page], str]:
    """A page or a picture with a script in it is saved, never shown, when its address is opened."""

    def attack(page: Page) -> str:
        (path,) = json.loads(page.upload(name, content).text)
        answered = page.ask(f"/gradio_api/file={quote(path)}")
        kind, how = answered.header("content-type"), answered.header("content-disposition")
        safe = how.startswith("attachment") and not any(word in kind for word in ("html", "svg", "xml", "script"))
        return unless(safe and answered.header("x-content-type-options") == "nosniff", answered.headers)

    return attack


def bomb(page: Page) -> str:
    """A small file that unpacks into a gigabyte."""
    content = gzip.compress(b" " * MEGABYTE) * 600
    (path,) = json.loads(page.upload("rows.jsonl.gz", content).text)
    given = {"path": path, "orig_name": "rows.jsonl.gz", "meta": {"_type": "gradio.FileData"}}
    found = page.press("data-import", "upload", data_import=given)
    return unless(isinstance(found, str) and "MB unpacked" in found and page.alive(), found)


# ---- fetched


def fetched(*names: str) -> Callable[[Page], str]:
    """By every route that takes a path, as an upload, and as the name of a file of rows."""

    def attack(page: Page) -> str:
        before, seen = page.canary.visits, []
        for name in (name.format(CANARY=page.canary.address) for name in names):
            places = [
                f"{route}{name}"
                for route in ("/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/proxy=", "/file=")
            ]
            seen += [answered for answered in map(page.ask, places) if answered.status not in (0, 400, 403, 404)]
            given = {"path": name, "url": name, "orig_name": "rows.jsonl", "meta": {"_type": "gradio.FileData"}}
            for element in ("collect-upload", "data-import", "train-upload"):
                came = page.press(element, "upload", **{element: given})
                seen += [came] if isinstance(came, dict) else []
        return unless(page.canary.visits == before and not seen, (page.canary.visits - before, seen))

    return attack


def refused_by_name(page: Page) -> str:
    """What is not of this machine is refused before anybody is asked for its address."""
    given = {"path": "http://evil.example/rows.jsonl", "meta": {"_type": "gradio.FileData"}}
    page.press("data-import", "upload", data_import=given)
    said = page.running.output.read_text()
    route = page.ask("/gradio_api/file=https://evil.example/a.png")
    return unless("the studio fetches nothing" in said and route.text.startswith("The studio has no such page"), route)


DEEP = "../" * 12
PROBES = [
    Probe(
        FILES,
        "the store",
        by_path(
            "{FOLDER}/studio.db",
            "studio.db",
            "./studio.db",
            "{FOLDER}/studio.db.lock",
            "{UPLOADS}/../../{FOLDER}/studio.db",
        ),
    ),
    Probe(FILES, "a copy of the store", by_path("{FOLDER}/studio.db.2026-01-01T000000Z.bak")),
    Probe(FILES, "a run", by_path("{FOLDER}/runs/secret/config.yaml", "runs/secret/config.yaml")),
    Probe(FILES, "a file beside the store", by_path("{FOLDER}/beside.txt", "beside.txt", "{FOLDER}//beside.txt")),
    Probe(
        FILES,
        "the cache",
        by_path("{HOME}/.cache/lowrank_align/weights_hash.json", "~/.cache/lowrank_align/weights_hash.json"),
    ),
    Probe(FILES, "dots", by_path(f"{DEEP}etc/passwd", f"/{DEEP}etc/passwd", "....//....//....//etc/passwd")),
    Probe(
        FILES,
        "dots as entities",
        by_path("%2e%2e/" * 12 + "etc/passwd", "..%2f" * 12 + "etc%2fpasswd", "%252e%252e%252f" * 12 + "etc/passwd"),
    ),
    Probe(
        FILES,
        "dots in other letters",
        by_path("..%5c" * 12 + "etc%5cpasswd", "..%c0%af" * 12 + "etc/passwd", "%uff0e%uff0e/etc/passwd"),
    ),
    Probe(
        FILES,
        "an absolute path",
        by_path(
            "/etc/passwd",
            "//etc/passwd",
            "%2fetc%2fpasswd",
            "/etc/./passwd",
            "/proc/self/environ",
            "/proc/self/cwd/beside.txt",
        ),
    ),
    Probe(
        FILES,
        "an absolute path with an end",
        by_path("/etc/passwd%00.png", "/etc/passwd?x=.css", "/etc/passwd#.css", "/etc/passwd/."),
    ),
    Probe(
        FILES, "a scheme", by_path("file:///etc/passwd", "file:/etc/passwd", "data:text/html,x", "ftp://127.0.0.1/x")
    ),
    Probe(FILES, "a link among the uploads", by_link),
    Probe(
        FILES,
        "a path in place of an upload: the store",
        as_upload("{FOLDER}/studio.db", "{FOLDER}/beside.txt", "{UPLOADS}/../beside.txt"),
    ),
    Probe(
        FILES,
        "a path in place of an upload: the system's",
        as_upload("/etc/passwd", "/proc/self/environ", "{HOME}/.cache/lowrank_align/weights_hash.json"),
    ),
    Probe(FLOOD, "bodies over the cap", too_long),
    Probe(FLOOD, "a body without an end", endless),
    Probe(FLOOD, "three thousand parts", many_parts),
    Probe(FLOOD, "a hundred slow bodies", slow),
    Probe(FLOOD, "two hundred at once", at_once),
    Probe(FLOOD, "names that lead elsewhere", named),
    Probe(FLOOD, "a page with a script", shown("evil.html", b"<script>alert(1)</script>")),
    Probe(
        FLOOD,
        "a picture with a script",
        shown("evil.svg", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'),
    ),
    Probe(FLOOD, "a file that unpacks into much", bomb),
    Probe(
        FETCH,
        "this machine",
        fetched("http://{CANARY}/rows.jsonl", "HTTP://{CANARY}/rows.jsonl", "http:/{CANARY}/x", "//{CANARY}/x"),
    ),
    Probe(
        FETCH,
        "this machine in disguise",
        fetched("http%3A%2F%2F{CANARY}/x", "%20http://{CANARY}/x", "http://evil@{CANARY}/x", "ftp://{CANARY}/x"),
    ),
    Probe(FETCH, "another machine", refused_by_name),
]
