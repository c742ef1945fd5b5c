"""Probes of a studio with a password, by somebody who does not have it, or whose browser is on another page."""

import base64
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

from tests.torture.page import PASSWORD, Answered, Headers, Page, Probe, unless

LOCKED = "a way around the password"
PROXY = "a TLS proxy before the page"
PROXIED = "studio.lan:443"  # given as --allow-host
FORM = ("Content-Type", "application/x-www-form-urlencoded")


def sign_in(page: Page, password: str = PASSWORD, headers: Headers = ()) -> Answered:
    return page.ask("/login", "POST", urlencode({"username": "ada", "password": password}), [FORM, *headers])


def cookies(answered: Answered) -> list[str]:
    return [value for name, value in answered.headers if name.lower() == "set-cookie"]


def jar(answered: Answered) -> str:
    return "; ".join(cookie.split(";")[0] for cookie in cookies(answered))


def with_cookies(page: Page, given: str) -> Page:
    return Page(page.running, page.canary, page.uploads, given, page.notes)


def before(page: Page) -> str:
    """Every place, by every method, and in every spelling."""
    places = (
        "/config",
        "/gradio_api/info",
        "/gradio_api/file=/etc/passwd",
        "/theme.css",
        "/gradio_api/token",
        "/logout",
        "//",
        "//config",
        "/login/../config",
        "/login/..;/config",
        "/login%2f..%2fconfig",
        "/login;/config",
        "/./config",
        "/LOGIN",
        "/login/x",
        "/config/",
        "/?deep_link=x",
        "/gradio_api/queue/data?session_hash=s",
        "/gradio_api/login_check",
        "/gradio_api/startup-events",
        "/gradio_api/heartbeat/s",
    )
    found = {place: page.ask(place) for place in places}
    found |= {f"POST {place}": page.ask(place, "POST", b"") for place in places}
    first = page.ask("/")
    told = [word for word in ("components", "dependencies", "vote-a") if word in first.text]
    wrong = {
        place: one for place, one in found.items() if one.status not in (401, 404, 405) and "?deep_link" not in place
    }
    return unless(not wrong and not told, (wrong, told))


def other_proofs(page: Page) -> str:
    """What other programs would take for a password."""
    basic = base64.b64encode(f"ada:{PASSWORD}".encode()).decode()
    given = [("Authorization", f"Basic {basic}"), ("Authorization", f"Bearer {PASSWORD}"), ("X-Gradio-User", "ada"),
             ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-User", "ada"), ("Remote-User", "ada")]  # fmt: skip
    found = [
        page.ask(f"/config?{urlencode({'password': PASSWORD, 'token': PASSWORD})}", headers=[one]) for one in given
    ]
    return unless(all(one.status == 401 for one in found), found)


def forged(page: Page) -> str:
    """Cookies that are guessed, empty or strange."""
    name = cookies(sign_in(page))[0].partition("=")[0]
    values = ("", "None", "null", "undefined", "true", "ada", "0", "a" * 22, "../", '"', "%00", "{}", "[object Object]")
    found = [with_cookies(page, f"{name}={value}").ask("/config") for value in values]
    found += [with_cookies(page, given).ask("/config") for given in ("=", ";;;", "a", f"{name}", "x" * 10_000)]
    return unless(all(one.status == 401 for one in found), found)


def fixed(page: Page) -> str:
    """A session that somebody else has chosen before the password was given."""
    mine = cookies(sign_in(page))[0].partition("=")[0]
    chosen = with_cookies(page, f"{mine}=chosen-by-another")
    answered = sign_in(chosen)
    after = chosen.ask("/config")
    fresh = with_cookies(page, jar(answered)).ask("/config")
    return unless((after.status, fresh.status) == (401, 200) and "chosen-by-another" not in jar(answered), answered)


def flags(page: Page) -> str:
    """No script reads the cookies, and no other site's request brings them along."""
    found = [cookie.lower() for cookie in cookies(sign_in(page))]
    safe = all("httponly" in cookie and "samesite=strict" in cookie and "domain" not in cookie for cookie in found)
    return unless(bool(found) and safe, found)


def junk_beside(page: Page) -> str:
    """Another program of this machine has left its cookies in the same browser: the owner is let in all the same."""
    own = jar(sign_in(page))
    found = [
        with_cookies(page, f"{junk}; {own}").ask("/config")
        for junk in ('a={"b": "c;d"}', "a b=c", "=", "ü=ß", "[x]=(y)")
    ]
    return unless(all(one.status == 200 for one in found), found)


def with_session(page: Page) -> str:
    """Another page asks in a browser that is signed in."""
    inside = with_cookies(page, jar(sign_in(page)))
    headers = ([("Origin", "http://evil.example")], [("Sec-Fetch-Site", "cross-site")], [("Origin", "null")])
    found = [inside.ask(place, headers=one) for one in headers for place in ("/", "/config", "/logout")]
    found += [inside.post("/gradio_api/run/predict", {"data": [], "fn_index": 0}, one) for one in headers]
    found += [inside.ask("/config", hosts=["evil.example"])]
    return unless(all(one.status == 403 for one in found) and inside.ask("/config").status == 200, found)


def login_elsewhere(page: Page) -> str:
    """Another page signs the browser in under a name of its own."""
    found = [
        sign_in(page, headers=[one]) for one in (("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site"))
    ]
    return unless(all(one.status == 403 and not cookies(one) for one in found), found)


def after_logout(page: Page) -> str:
    """The cookie of a session that has ended."""
    inside = with_cookies(page, jar(sign_in(page)))
    was, ended, now = inside.ask("/config"), inside.ask("/logout"), inside.ask("/config")
    return unless((was.status, now.status) == (200, 401), (was, ended, now))


def not_told(page: Page) -> str:
    """The password is in nothing that the studio says, writes or passes on."""
    inside = with_cookies(page, jar(sign_in(page)))
    said = inside.ask("/config").text + inside.ask("/").text + page.running.output.read_text()
    environment = page.running.folder.joinpath("studio.db").read_bytes()
    return unless(PASSWORD not in said and PASSWORD.encode() not in environment, "told")


def through_the_proxy(page: Page) -> str:
    """A browser at https://studio.lan leaves the port out: it signs in, and the page asks that address for the rest."""
    hosts, told = ["studio.lan"], [("X-Forwarded-Proto", "https"), ("Sec-Fetch-Site", "same-origin")]
    own = [("Origin", "https://studio.lan"), *told]
    body = urlencode({"username": "ada", "password": PASSWORD})
    signed = page.ask("/login", "POST", body, [FORM, *own], hosts=hosts)
    found = with_cookies(page, jar(signed)).ask("/config", headers=own, hosts=hosts)
    root = json.loads(found.text).get("root") if found.status == 200 else None
    return unless((signed.status, found.status, root) == (200, 200, "https://studio.lan"), (signed, found))


def beside_the_proxy(page: Page) -> str:
    """Names and pages next to it."""
    names = ("studio.lan:80", f"studio.lan:{page.port}", "evil.studio.lan", "studio.lan.", "studio", "lan", "127.0.0.1")
    found = [page.ask("/config", hosts=[name]) for name in names]
    pages = ("http://studio.lan", "https://studio.lan:8443", "https://evil.studio.lan", "null")
    found += [page.ask("/config", headers=[("Origin", one)], hosts=["studio.lan"]) for one in pages]
    inside = page.ask("/config", headers=[("Origin", "https://studio.lan")], hosts=["studio.lan"])  # no password yet
    return unless(all(one.status == 403 for one in found) and inside.status == 401, (found, inside))


def guessed(page: Page) -> str:
    """A hundred guesses at once, and then the right one: nobody gets in for a minute. (The last of these probes.)"""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: sign_in(page, f"guess {n}").status, range(100)))
    right = sign_in(page)
    statuses = {http.client.BAD_REQUEST}
    return unless(set(found) == statuses and right.status in statuses and not cookies(right), (found, right))


PROBES = [
    Probe(LOCKED, "everything before signing in", before),
    Probe(LOCKED, "other kinds of proof", other_proofs),
    Probe(LOCKED, "forged cookies", forged),
    Probe(LOCKED, "a session chosen by another", fixed),
    Probe(LOCKED, "the cookies' flags", flags),
    Probe(LOCKED, "another program's cookies", junk_beside),
    Probe(LOCKED, "another page in a browser that is signed in", with_session),
    Probe(LOCKED, "another page that signs the browser in", login_elsewhere),
    Probe(LOCKED, "a session that has ended", after_logout),
    Probe(LOCKED, "where the password is told", not_told),
    Probe(PROXY, "the name given, without its port", through_the_proxy),
    Probe(PROXY, "names and pages beside it", beside_the_proxy),
    Probe(LOCKED, "a hundred guesses", guessed),
]
