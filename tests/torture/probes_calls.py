"""Probes by the page's own functions, called with what no page would send; what is told, and what is exported."""

import json
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from lowrank_align.store import Store
from tests.torture.page import MARKUP, Page, Probe, unless

CALLS = "a function called directly"
HOSTILE = (
    "'; DROP TABLE events; --",
    "Robert'); DELETE FROM records; --",
    '" OR 1=1 --',
    "%s%n%x{0.__class__.__mro__}{settings}",
    "${7*7}{{7*7}}<%= 7*7 %>",
    "../../../../tmp/evil",
    "/etc/passwd",
    "C:\\evil",
    "a/b\x00c",
    "\x1b]0;evil\x07\x1b[2J",
    "\u202egnp.exe",
    MARKUP,
    "__import__('os').system('touch evil')",
    "\ud800",
    "x" * 10_000,
    "!!python/object/apply:os.system ['touch evil']",
)
WRONG: tuple[Any, ...] = (
    None,
    1,
    -1,
    1e308,
    True,
    "",
    "x",
    [],
    [[]],
    {},
    {"path": "/etc/passwd"},
    ["x"] * 100,
    {"__type__": "update", "value": "x"},
    [None] * 5,
    "\x00",
    {"a": {"b": {"c": [[[[]]]]}}},
)
LEAKS = ("Traceback", "site-packages", 'File "', "sqlite3.", "KeyError", "IndexError")


def store_of(page: Page) -> list[Any]:
    """Everything that was ever judged, as it stands."""
    with Store(page.running.folder / "studio.db", create=False) as store:
        return [
            (record.id, who, [(e.id, e.version, e.judgement) for e in store.history(record.id, who)])
            for record in store.all_records()
            for who in store.annotators()
        ]


def files_of(page: Page) -> set[str]:
    """What lies in the studio's folder, but for what a studio puts there."""
    own = ("studio.db", "output.txt")
    return {str(p) for p in page.running.folder.rglob("*") if not p.name.startswith(own)}


def safely(attack: Callable[[Page], Any]) -> Callable[[Page], str]:
    """The attack, after which votes, files and the page are as they were, and nothing was told of the program."""

    def probe(page: Page) -> str:
        votes, files = store_of(page), files_of(page)
        seen = attack(page)
        text = json.dumps(seen, default=str) if not isinstance(seen, str) else seen
        kept = store_of(page)
        wrong = [word for word in LEAKS if word in text]
        wrong += (
            ["votes"] * (kept[: len(votes)] != votes) + sorted(files_of(page) - files) + ["ended"] * (not page.alive())
        )
        return unless(not wrong, (wrong, text[:300]))

    return probe


def texts(page: Page) -> Any:
    """In every field of Collect, and as a name."""
    seen = []
    for text in page.some(HOSTILE, 5):
        who = text[:50].replace("\x00", "")
        seen.append(page.press("collect-paste-add", collect_paste=f"{text} {secrets.token_hex(4)}", annotator_name=who))
        seen.append(page.press("collect-reason", "input", collect_reason=text, collect_tags=[text], annotator_name=who))
        seen.append(page.press("data-search", "submit", data_search=text, data_tags=text, data_annotators=text))
        seen.append(page.press("vote-a", collect_pair=text, annotator_name=who, collect_reason=text))
        seen.append(page.press("vote-undo", collect_pair=text, annotator_name=who))
    return seen


def formats(page: Page) -> str:
    """Nothing that is typed is ever evaluated: it stands in the list as it was typed."""
    typed = "%s {0.__class__} ${7*7} {{7*7}} " + secrets.token_hex(4)
    page.press("collect-paste-add", collect_paste=typed)
    with Store(page.running.folder / "studio.db", create=False) as store:
        prompts = json.dumps([prompt.prompt for prompt in store.queued()])
    return unless(typed in prompts, prompts[-300:])


def wrong_types(page: Page) -> Any:
    """To every function that the page has, a value of another type in every place."""
    seen = []
    for number, event in enumerate(page.some(page.config["dependencies"], 6)):
        if event.get("backend_fn") is False or not event["inputs"]:
            continue
        for value in (WRONG[number % len(WRONG)], WRONG[(number + 7) % len(WRONG)]):
            seen.append(page.run(event, [value] * len(event["inputs"])))
    return [one for one in seen if isinstance(one, str)]


def wrong_counts(page: Page) -> Any:
    event = page.event("vote-a", "click")
    return [page.run(event, data) for data in ([], ["x"], ["x"] * 500, "x", None, {"0": "x"})]


def wrong_numbers(page: Page) -> Any:
    bodies = [{"fn_index": n, "data": [], "session_hash": "s"} for n in (-1, 10**9, "0", None, [], {})]
    return [
        page.post(f"/gradio_api/{way}", body).text
        for body in bodies
        for way in ("run/predict", "queue/join", "call/predict")
    ]


def no_json(page: Page) -> Any:
    bodies = ["", "{", "[" * 50_000, '{"data": ' * 5_000, "\xff\xfe", "null", '{"data": [NaN], "fn_index": 0}']
    kind = [("Content-Type", "application/json")]
    return [page.ask("/gradio_api/run/predict", "POST", body.encode("latin-1"), kind).text for body in bodies]


def others_pair(page: Page) -> Any:
    """A vote under another name on the pair that somebody has before them, and on a record of others."""
    page.press("collect-examples", annotator_name="alice")
    desk = page.press("annotator-name", "change", annotator_name="alice")
    pair = desk["collect-pair"] if isinstance(desk, dict) else desk
    assert isinstance(pair, str) and len(pair) == 32, desk
    buttons = ("vote-a", "vote-undo", "collect-write")
    pairs = (pair, page.notes["record"])
    return [page.press(one, collect_pair=given, annotator_name="mallory") for one in buttons for given in pairs]


def others_entry(page: Page) -> str:
    """Save and delete with an entry that was never opened in this session: what is open is the server's to know."""
    votes = store_of(page)
    event = page.event("data-really", "click")
    chosen = [page.notes["record"], "victim", 1]
    seen = [page.run(event, [chosen, *[None] * (len(event["inputs"]) - 1)]) for _ in range(2)]
    return unless(store_of(page) == votes and all(isinstance(one, str) for one in seen), seen)


def others_session(page: Page) -> str:
    """What belongs to another session's events, by guesses."""
    found = [
        page.ask(f"/gradio_api/queue/data?session_hash={guess}") for guess in ("mine", "0", "", "../s", "undefined")
    ]
    found += [page.ask(f"/gradio_api/call/predict/{guess}") for guess in ("0", secrets.token_hex(16))]
    return unless(not any('"process_' in one.text or "event: complete" in one.text for one in found), found)


def server_functions(page: Page) -> str:
    """Methods of the components, by name."""
    names = (
        "__init__",
        "postprocess",
        "preprocess",
        "get_config",
        "ls",
        "__class__",
        "as_example",
        "move_resource_to_block_cache",
    )
    parts = list(page.parts.values())[:40]
    asked = [
        page.post(
            "/gradio_api/component_server",
            {"session_hash": "s", "component_id": parts[n * 5]["id"], "fn_name": name, "data": "/etc/passwd"},
        )
        for n, name in enumerate(names)
    ]
    return unless(all(one.status in (404, 422, 500) for one in asked) and page.alive(), asked)


def settings(page: Page) -> Any:
    """A run that would name a file, a model, a place or a program; and a name that leads elsewhere."""
    asked: list[dict[str, Any]] = [{"train_yaml": line} for line in YAML]
    asked += [{"train_name": name} for name in ("../evil", "/tmp/evil", "..", "a/b", ".evil", "a" * 100, "a\x00b")]
    asked += [
        {"train_data": data} for data in ("file:../beside.txt", "file:/etc/passwd", "file /etc/passwd", "uploaded")
    ]
    asked += [
        {"train_adapter": "../secret"},
        {"train_adapter": "/tmp"},
        {"train_method": "../x"},
        {"train_loss": "os:system"},
    ]
    asked = [{"train_name": f"probe-{number}"} | one for number, one in enumerate(asked)]
    return [page.press(button, **one) for one in page.some(asked, 5) for button in ("train-check", "train-start")]


YAML = (
    "reward: os:system",
    "score: os:system",
    "model: evil/model",
    "out: /tmp/evil",
    "adapter: ../secret",
    "data: /etc/passwd",
    "resume: true",
    "overwrite: true",
    "chat_template: '{{ 7*7 }}'",
    "device: cuda",
    "report_to: wandb",
    "rank: 1e999",
    "!!python/object/apply:os.system ['touch evil']",
    "a: &a [x]\nb: &b [*a, *a]",
    "preset: ../../beside",
)


def deep_links(page: Page) -> str:
    """Links to a saved state that lead elsewhere."""
    names = [quote(name, safe="") for name in ("../../etc", "..", "/etc/passwd", "a" * 64)]
    places = ("/", "/config", "/gradio_api/deep_link")
    found = [page.ask(f"{place}?deep_link={name}") for name in names for place in places]
    return unless(all("root:x" not in one.text and one.status in (200, 404, 422) for one in found), found)


PROBES = [
    Probe(CALLS, "hostile text in every field", safely(texts)),
    Probe(CALLS, "text that other languages would evaluate", formats),
    Probe(CALLS, "values of wrong types to every function", safely(wrong_types)),
    Probe(CALLS, "too few and too many values", safely(wrong_counts)),
    Probe(CALLS, "functions that there are not", safely(wrong_numbers)),
    Probe(CALLS, "bodies that are no JSON", safely(no_json)),
    Probe(CALLS, "votes on others' pairs", safely(others_pair)),
    Probe(CALLS, "another's entry deleted", others_entry),
    Probe(CALLS, "another's session", others_session),
    Probe(CALLS, "methods of components", server_functions),
    Probe(CALLS, "a run that names files, code and places", safely(settings)),
    Probe(CALLS, "links to a saved state", deep_links),
]
