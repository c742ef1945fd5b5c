"""A running studio, attacked: from other pages and machines, by paths, floods, its own functions, and in a browser."""

import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowrank_align.cli import main
from lowrank_align.store import Completion, Judgement, Record, Store
from tests.browser.running import begin_studio
from tests.torture import probes_calls, probes_files, probes_locked, probes_reach, probes_told
from tests.torture.page import BESIDE, FORMULAS, MARKUPS, PASSWORD, TOKEN, Canary, Page, Probe

Tally = Callable[..., None]
SECTION = "The page"
PROMISES = {
    probes_reach.HOST: "refused, nothing read",
    probes_reach.ORIGIN: "refused, nothing read or changed",
    probes_reach.FORM: "refused, nothing changed",
    probes_reach.WIRE: "refused, the page goes on",
    probes_files.FILES: "refused, nothing of it told",
    probes_files.FLOOD: "refused or harmless, the page goes on",
    probes_files.FETCH: "nothing is fetched",
    probes_calls.CALLS: "one line or nothing; votes, files and page as they were",
    probes_told.TOLD: "no path, token, password or trace",
    probes_told.SHEETS: "JSON Lines, in which it is text",
    probes_told.MARKS: "it is text",
    probes_locked.LOCKED: "closed",
    probes_locked.PROXY: "let in under the name that was given, and under no other",
}
LAN = "an address that other machines reach, without a password"
LOCK = "LOWRANK_STUDIO_PASSWORD"


def fill(path: Path) -> str:
    """A store whose every text is markup or a formula; the id of a record."""
    texts = [*MARKUPS, *(f"{sign}cmd|' /C calc'!A1" for sign in FORMULAS)]
    with Store(path) as store, store.batch():
        for number, text in enumerate(texts):
            prompt = [{"role": "user", "content": text}]
            record = Record(
                "pair", prompt, (Completion(f"{text} a", source=text), Completion(f"{text} b", source=text))
            )
            store.add(record)
            said = Judgement("preferred", ranks=(1.0, 2.0), reason=text, tags=(text,), edits={1: f"{text} c"})
            store.judge(record.id, text if number < len(MARKUPS) else "victim", said)
        store.enqueue([[{"role": "user", "content": f"{text} in the queue"}] for text in texts])
        victim = Record("pair", "whose?", (Completion("mine"), Completion("yours")))
        store.add(victim)
        store.judge(victim.id, "victim", Judgement("tie"))
    return victim.id


@pytest.fixture(scope="module")
def pages(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Page]]:
    """Two studios, `open` and `locked` by a password behind a TLS proxy's name, begun at the same time."""
    begun, canary, found = {}, Canary(), {}
    for name, more in {"open": {}, "locked": {LOCK: PASSWORD}}.items():
        folder, uploads = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("tmp")
        record = fill(folder / "studio.db")
        (folder / "runs" / "secret").mkdir(parents=True)
        for place in ("beside.txt", "runs/secret/config.yaml", "studio.db.2026-01-01T000000Z.bak"):
            (folder / place).write_text(BESIDE)
        environment = {"HF_TOKEN": TOKEN, "TMPDIR": str(uploads)} | more
        flags = ("--max-new-tokens", "8", *["--allow-host", probes_locked.PROXIED] * (name == "locked"))
        begun[name] = (begin_studio(folder, *flags, environment=environment), uploads, record)
    try:
        for name, (running, uploads, record) in begun.items():
            running.wait()
            (folder,) = uploads.glob("lowrank-studio-*")
            found[name] = Page(running, canary, folder, notes={"record": record})
        yield found
    finally:
        canary.close()
        for running, _, _ in begun.values():
            running.kill()


def run(probe: Probe, page: Page, tally: Tally) -> None:
    try:
        came = probe.attack(page)
    except Exception as error:  # counted, and told by pytest
        tally(SECTION, probe.group, PROMISES[probe.group], held=0, of=1, note=f"{probe}: {error!r:.100}")
        raise
    tally(
        SECTION,
        probe.group,
        PROMISES[probe.group],
        held=int(not came),
        of=1,
        note=f"{probe}: {came:.100}" if came else "",
    )
    assert not came


OPEN = [*probes_reach.PROBES, *probes_files.PROBES, *probes_calls.PROBES, *probes_told.PROBES]


@pytest.mark.parametrize("probe", OPEN, ids=str)
def test_probe(probe: Probe, pages: dict[str, Page], tally: Tally) -> None:
    run(probe, pages["open"], tally)


@pytest.mark.parametrize("probe", probes_locked.PROBES, ids=str)
def test_probe_of_a_password(probe: Probe, pages: dict[str, Page], tally: Tally) -> None:
    run(probe, pages["locked"], tally)


def own_addresses() -> list[str]:
    """The machine's name and addresses, but for those that only itself reaches."""
    name = socket.gethostname()
    try:
        found = {str(address[4][0]) for address in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    return [name, *sorted(one for one in found if not one.startswith("127.") and one != "::1")]


REACHED = (
    "0.0.0.0",
    "::",
    "[::]",
    "0",
    "0.0.0.0.",
    "00.00.00.00",
    "0x0",
    "::0",
    "0:0:0:0:0:0:0:0",
    "::ffff:0.0.0.0",
    "192.168.1.5",
    "10.0.0.5",
    "fe80::1",
    "studio.lan",
    "localhost.",
    "localhost.localdomain",
    "127.0.0.1.nip.io",
    "127.0.0.1.",
    "",
    " ",
)
ALLOWED = ("studio.lan", "*", "0.0.0.0", "10.0.0.5:80", "localhost.")


@pytest.mark.parametrize(
    "given",
    [*(("--host", one) for one in (*REACHED, *own_addresses())), *(("--allow-host", one) for one in ALLOWED)],
    ids=str,
)
def test_a_reachable_address_without_a_password_is_refused(
    given: tuple[str, str],
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before anything is loaded or opened: exit code 2 and one line, with no password, an empty one and a short one."""
    monkeypatch.chdir(tmp_path)
    other = ["--allow-host", "studio.lan"] if given[0] == "--host" else []
    seen = []
    for password in (None, "", "short"):
        monkeypatch.delenv(LOCK, raising=False)
        if password is not None:
            monkeypatch.setenv(LOCK, password)
        code = main(["studio", "--no-browser", *given, *other])
        said = capsys.readouterr()
        seen.append(code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out)
    held = all(seen) and not os.listdir(tmp_path)
    tally(
        SECTION, LAN, "exit code 2 and one line, nothing opened", held=int(held), of=1, note="" if held else str(given)
    )
    assert held


def test_random_hosts_and_paths(pages: dict[str, Page], times: Callable[[int, int], int], tally: Tally) -> None:
    """The page's own host with letters changed, and paths put together from what leads out of a folder."""
    page, draw, rounds, wrong = pages["open"], random.Random(4), times(40, 3000), []
    pieces = [
        "..",
        "%2e%2e",
        "/",
        "%2f",
        "\\",
        "etc",
        "passwd",
        "beside.txt",
        "file=",
        "gradio_api",
        str(page.running.folder),
        "%00",
        "~",
    ]
    for number in range(rounds):
        host = list(page.host)
        host[draw.randrange(len(host))] = draw.choice("0123456789.:abcxyz@[]%-")
        if number % 2 and "".join(host) != page.host:
            answered = page.ask("/config", hosts=["".join(host)])
            held = answered.status in (0, 400, 403) and "components" not in answered.text
        else:
            path = draw.choice(["/gradio_api/file=", "/", "/static/"]) + "".join(
                draw.choices(pieces, k=draw.randrange(1, 14))
            )
            answered = page.ask(path)
            held = BESIDE not in answered.text and "root:x" not in answered.text and answered.status < 500
        wrong += [] if held else [("".join(host), answered)]
    tally(SECTION, "hosts and paths by chance", "refused", held=rounds - len(wrong), of=rounds)
    assert not wrong, wrong[0]
    assert page.alive()


def test_the_page_goes_on(pages: dict[str, Page]) -> None:
    """After all of that both still serve, and what is typed is still kept."""
    for page in pages.values():
        assert page.running.process.poll() is None and page.alive()
    page, word = pages["open"], f"a prompt {os.getpid()}"
    assert isinstance(page.press("collect-paste-add", collect_paste=word), dict)
    with Store(page.running.folder / "studio.db", create=False) as store:
        assert word in str(store.queued()[-1].prompt)
