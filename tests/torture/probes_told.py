"""Probes for what the page tells of the machine, for formulas in what it exports, and for markup that it hands on."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.torture.page import BESIDE, FORMULAS, MARKUP, PASSWORD, TOKEN, Page, Probe, unless

TOLD, SHEETS, MARKS = "what the page tells", "a formula in an export", "markup, as the page's functions give it"
CALL = '{"fn_index": 1, "data": [{}], "session_hash": "s", "component_id": 1, "fn_name": "x"}'
STATE = ("queue/status", "app_id", "token", "user", "theme.css", "startup-events")
ERRORS = ("call/x/y", "stream/s/r/1/playlist.m3u8", "nowhere", "file=x", "upload_progress")
NOT_THERE = (
    "/monitoring", "/monitoring/summary", "/docs", "/redoc", "/openapi.json", "/gradio_api/openapi.json",
    "/gradio_api/mcp/sse", "/gradio_api/runs", "/gradio_api/dev/reload", "/gradio_api/profiling/x",
)  # fmt: skip


def told_by(*places: str, body: str | None = None) -> Callable[[Page], str]:
    """No path of this machine, no token, no password, no trace, no name and version of the server."""

    def attack(page: Page) -> str:
        own = [str(page.running.folder), str(page.uploads), f"{Path.home()}/", os.getcwd()]
        secrets, found = [*own, TOKEN, PASSWORD, BESIDE, "site-packages", "Traceback"], {}
        for place in places:
            answered = page.ask(place, "GET" if body is None else "POST", body, [("Content-Type", "application/json")])
            told = [word for word in secrets if word in answered.text.replace("\\/", "/")]
            if told or answered.header("server"):
                found[place] = (told, answered.headers)
        return unless(not found, found)

    return attack


def not_there(page: Page) -> str:
    found = {place: page.ask(place).status for place in NOT_THERE}
    return unless(set(found.values()) == {404}, found)


def endpoints(page: Page) -> str:
    """The page offers no list of its functions to programs."""
    found = page.ask("/gradio_api/info").text
    return unless(json.loads(found) == {"named_endpoints": {}, "unnamed_endpoints": {}}, found)


def formula(sign: str) -> Callable[[Page], str]:
    """Everything that can be said begins with it: an export has a JSON object on each line, and no cell."""

    def attack(page: Page) -> str:
        seen = ""
        for kind in ("pairs", "rankings", "unpaired", "demonstrations", "prompts"):
            made = page.press("data-export", data_kind=kind)
            if isinstance(made, str):
                continue  # there are none of the kind
            path = (made["data-file"].get("value") or made["data-file"])["path"]
            answered = page.ask(f"/gradio_api/file={quote(path)}")
            cells = [line for line in answered.text.split("\n") if line and not line.startswith("{")]
            if cells or not path.endswith(".jsonl") or "attachment" not in answered.header("content-disposition"):
                return f"{kind}, {path}, {cells[:1]}, {answered.headers}"
            seen += answered.text
        return unless(json.dumps(sign)[1:-1] + "cmd|" in seen, f"{sign!r} is in no export: nothing was probed")

    return attack


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def in_html(page: Page) -> str:
    """What is shown as HTML (header, sources, messages, hints) has no markup but the page's own."""
    shown = {name for name, part in page.parts.items() if part["type"] in ("html", "markdown", "chatbot")}
    given = {"annotator_name": MARKUP, "chat_input": MARKUP, "chat_system": MARKUP, "collect_reason": MARKUP}
    found, seen = {}, 0
    for element, event in HTML_FROM:
        came = page.press(element, event, **given)
        for name, value in came.items() if isinstance(came, dict) else ():
            wrong = [text for text in texts_in(value) if name in shown and "<img" in text]
            seen += name in shown
            found |= {name: wrong} if wrong else {}
    return unless(not found and seen, found or "nothing was seen")


HTML_FROM = (("chat-send", "click"), ("tab-arena", "select"), ("arena-start", "click"), ("chat-undo", "click"))
PROBES = [
    Probe(TOLD, "settings", told_by("/config", "/", "/gradio_api/info", "/gradio_api/info?all_endpoints=true")),
    Probe(TOLD, "state", told_by("/manifest.json", "/robots.txt", *(f"/gradio_api/{one}" for one in STATE))),
    Probe(TOLD, "errors", told_by("/nowhere", "/pwa_icon/9", *(f"/gradio_api/{one}" for one in ERRORS))),
    Probe(TOLD, "errors of functions", told_by("/gradio_api/run/predict", "/gradio_api/queue/join", body=CALL)),
    Probe(TOLD, "errors of components", told_by("/gradio_api/component_server", "/gradio_api/upload", body=CALL)),
    Probe(TOLD, "watching and documentation", not_there),
    Probe(TOLD, "a list of functions", endpoints),
    *(Probe(SHEETS, f"a text that begins with {sign!r}", formula(sign)) for sign in FORMULAS),
    Probe(MARKS, "an image with a script in names, questions and reasons", in_html),
]
