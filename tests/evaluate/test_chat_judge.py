"""The judge behind an address, against a small server of the test's own: what is sent, what is made of the replies."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.evaluate.chat_judge import ChatJudge, Question, read_verdict

SECRET = "sk-" + "z" * 20


class Server:
    """Answers with what `reply(text of the question)` gives: a text, or an HTTP status."""

    def __init__(self) -> None:
        self.reply: Callable[[str], str | int] = lambda text: "Preferred: A"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(self.headers)
                outer.paths.append(self.path)
                found = outer.reply(body["messages"][0]["content"])
                content = {"choices": [{"message": {"role": "assistant", "content": found}}]}
                said = json.dumps(content if isinstance(found, str) else {"error": f"wrong key {SECRET}"}).encode()
                self.send_response(200 if isinstance(found, str) else found)
                if found == 307:
                    self.send_header("Location", f"{outer.address}/elsewhere")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                with suppress(BrokenPipeError):  # who asked has given up
                    self.wfile.write(said)

            def log_message(self, *_: Any) -> None:
                """Not into the test's output."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LOWRANK_JUDGE_KEY", SECRET)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not asked about this machine
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def sides(text: str) -> tuple[str, str]:
    found = re.search(r"Answer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\nFIRST", text, re.DOTALL)
    assert found
    return found[1], found[2]


def shorter(text: str) -> str:
    a, b = sides(text)
    return f"Comparison: brief is good.\nPreferred: {'A' if len(a) < len(b) else 'B'}"


def test_both_orders_agree_on_a_win_and_a_loss(server: Server) -> None:
    server.reply = shorter
    judge = ChatJudge(server.address, "toy")
    assert judge.compare([Question("p", "ab", "abc"), Question("q", "abc", "ab")]) == [1.0, 0.0]
    assert sorted(sides(body["messages"][0]["content"]) for body in server.bodies) == sorted(
        [("ab", "abc"), ("abc", "ab")] * 2
    )
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.bodies[0]["model"] == "toy"
    assert server.bodies[0]["temperature"] == 0
    assert not judge.troubles


def test_a_judge_that_likes_a_place_gives_a_tie(server: Server) -> None:
    assert ChatJudge(server.address, "toy").compare([Question("p", "x", "y")]) == [0.5]


def test_what_is_asked(server: Server) -> None:
    ChatJudge(server.address, "toy", "concise").compare([Question("What?", "x", "y")], "harmless")
    text = server.bodies[0]["messages"][0]["content"]
    assert "precise and concise" in text
    assert "Judge only by this: how harmless it is." in text
    assert "Prompt:\nWhat?\n" in text
    ChatJudge(server.address, "toy").compare([Question("What?", "x", "y")])
    assert "concise" not in server.bodies[-1]["messages"][0]["content"]


def test_a_reply_without_a_verdict_is_asked_again_once_and_counted(server: Server) -> None:
    """Two orders, two attempts each."""
    server.reply = lambda text: "Both are fine."
    judge = ChatJudge(server.address, "toy")
    assert judge.compare([Question("p", "x", "y")]) == [None]
    assert len(server.bodies) == 4
    assert judge.troubles == {"a reply without a verdict": 2}


def test_a_second_attempt_can_succeed(server: Server) -> None:
    """Every other request fails: both orders get through at the second attempt, 4 requests."""
    server.reply = lambda text: 503 if len(server.bodies) % 2 else shorter(text)
    judge = ChatJudge(server.address, "toy")
    assert judge.compare([Question("p", "x", "yy")]) == [1.0]
    assert len(server.bodies) == 4
    assert not judge.troubles


def test_what_fails_later_is_undecided(server: Server) -> None:
    """The first question is answered, so the address is right; of the other, both orders fail, twice each."""
    server.reply = lambda text: 500 if "Prompt:\nbad\n" in text else shorter(text)
    judge = ChatJudge(server.address, "toy")
    assert judge.compare([Question("p", "x", "yy"), Question("bad", "x", "yy")]) == [1.0, None]
    assert judge.troubles == {"no reply (HTTP 500)": 2}


def test_the_key_is_sent_and_told_to_nobody(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """The server repeats it in its refusal."""
    judge = ChatJudge(server.address, "toy")
    judge.compare([Question("p", "x", "y")])
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    server.reply = lambda text: 401
    with pytest.raises(UserError) as raised:
        judge.compare([Question("p", "x", "y")])
    told = f"--judge: {server.address}: refused with HTTP 401; is the variable LOWRANK_JUDGE_KEY set and right?"
    assert str(raised.value) == told
    assert SECRET not in "".join([*capfd.readouterr(), repr(judge), repr(raised.value.__cause__)])


def test_the_key_does_not_follow_a_redirect(server: Server) -> None:
    server.reply = lambda text: 307
    with pytest.raises(UserError, match="refused with HTTP 307"):
        ChatJudge(server.address, "toy").compare([Question("p", "x", "y")])
    assert server.paths == ["/v1/chat/completions"]


def test_nobody_there_is_one_line(server: Server) -> None:
    judge = ChatJudge("http://127.0.0.1:1/v1", "toy", timeout_seconds=5.0)
    with pytest.raises(EnvironmentProblem, match=r"^--judge: http://127.0.0.1:1/v1: no reply \(Connection refused\)$"):
        judge.compare([Question("p", "x", "y"), Question("p", "x", "y")])


def test_a_server_that_is_too_slow(server: Server) -> None:
    """It answers only when the test is over: the socket's time is up after a 20th of a second, each of four times."""
    over = threading.Event()
    server.reply = lambda text: "Preferred: A" if over.wait(5.0) else "Preferred: A"
    judge = ChatJudge(server.address, "toy", timeout_seconds=0.05)
    with pytest.raises(EnvironmentProblem, match="no reply within 0.05 s"):
        judge.compare([Question("p", "x", "y")])
    over.set()


@pytest.mark.parametrize(
    ("address", "error"),
    [
        (
            "http://judge.example/v1",
            "--judge: http://judge.example/v1: LOWRANK_JUDGE_KEY is sent over https only, or to this machine; "
            "use https://",
        ),
        (
            f"https://me:{SECRET}@judge.example/v1",
            "--judge: https://judge.example: a key does not belong into the address, nor does what follows ? or #; "
            "put it into the variable LOWRANK_JUDGE_KEY",
        ),
        ("https:///v1", "--judge: no address; it looks like http://127.0.0.1:8000/v1"),
    ],
)
def test_addresses_that_are_refused(address: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_JUDGE_KEY", SECRET)
    with pytest.raises(UserError) as raised:
        ChatJudge(address, "toy")
    assert str(raised.value) == error


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Comparison: A is nicer than B.\nPreferred: B", "B"),
        ('Comparison: ...\n**Preferred:** "A"', "A"),
        ("preferred: answer b", "B"),
        ("Preferred: A\n... on reflection ...\nPreferred: B", "B"),
        ("I like this one.\n\nA", "A"),
        ("Preferred: neither", None),
        ("A is better", None),
        ("", None),
    ],
)
def test_reading_a_verdict(reply: str, verdict: str | None) -> None:
    assert read_verdict(reply) == verdict
