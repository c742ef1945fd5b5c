"""A small server that speaks vLLM's protocol and really samples, from a base of its own and the given adapters."""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from lowrank_align.base import Base
from lowrank_align.errors import UserError
from lowrank_align.rollout import sample
from lowrank_align.rollout_server import client
from lowrank_align.trees import Completion, TreeRow

Reply = tuple[int, Any]  # status, and what becomes JSON or is text already
Trouble = Callable[["Handler", Reply], None]  # does what goes wrong, instead of sending the reply


def ready(server: "SmallServer", folder: Path, monkeypatch: Any, reward: str, body: str, attempts: int) -> None:
    """As just started, asked so often without a pause; the current folder is `folder`, with the function `reward`."""
    module, name = reward.split(":")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # where nobody is: it is not asked about this machine
    monkeypatch.setattr(client, "PAUSES_SECONDS", (0.0,) * (attempts - 1))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop(module, None)
    (folder / f"{module}.py").write_text(f"def {name}(prompts, completions):\n    return {body}\n")
    server.reset()


class SmallServer:
    """`trouble(path, body)` may name something that goes wrong; `gives` is how answers name their tokens."""

    def __init__(self, model: Path) -> None:
        self.base = Base.load(str(model), quantize="none", device="cpu")
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.reset()

        class Here(Handler):
            outer = self

        self.http = _Http(("127.0.0.1", 0), Here)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def reset(self) -> None:
        """As if it had just been started, and nobody had asked for anything."""
        self.restart()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.trouble: Callable[[str, dict[str, Any]], Trouble | None] = lambda path, body: None
        self.gives = "token_ids"  # or "token_id:", or "text"
        self.takes_adapters, self.ignores_adapters, self.one_seed = True, False, False

    def restart(self) -> None:
        """Forget every adapter."""
        with self.lock:
            self.loaded: dict[str, str] = {}
            for name in [name for name in self.base.roles if name != "base"]:
                self.base.remove_role(name)

    def paths(self, path: str) -> list[dict[str, Any]]:
        """The bodies of what was asked there."""
        return [body for asked, body in self.asked if asked == path]

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in ("base", *self.loaded)]}
        if path == "/v1/completions":
            return self._complete(body)
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.takes_adapters:
            with self.lock:
                return self._load(body) if path == "/v1/load_lora_adapter" else self._unload(body)
        return 404, {"detail": "Not Found"}

    def _load(self, body: dict[str, Any]) -> Reply:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path).is_dir():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        try:
            self.base.add_role(_role(name), start_from=path)
        except UserError as problem:
            return error(500, str(problem))
        self.loaded[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, Any]) -> Reply:
        name = body["lora_name"]
        if self.loaded.pop(name, None) is None:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        self.base.remove_role(_role(name))
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> Reply:
        count, said, tokenizer = body["n"], body["prompt"], self.base.tokenizer
        ends = body.get("stop_token_ids") or [tokenizer.eos_token_id]
        prompt = tokenizer(said).input_ids if isinstance(said, str) else said
        with self.lock:
            if body["model"] not in self.loaded:
                return error(404, f"The model `{body['model']}` does not exist.")
            with self.base.role("base" if self.ignores_adapters else _role(body["model"])):
                copies = 1 if self.one_seed else count
                ((*drawn,),) = sample(
                    self.base, [prompt], end_ids=ends, max_new_tokens=body["max_tokens"], batch_size=count,
                    generator=torch.Generator().manual_seed(body["seed"]), temperature=body["temperature"],
                    completions_per_prompt=copies,
                )  # fmt: skip
                drawn *= count // copies
                row = TreeRow(prompt, [Completion(one.ids, [True] * len(one.ids)) for one in drawn])
                logps = self.base.token_logps(self.base.collate([row]))  # before the temperature, as vLLM's own
        choices = [self._choice(i, one, logps[i].tolist()) for i, one in enumerate(drawn)]
        return 200, {"object": "text_completion", "choices": choices[::-1]}  # clients go by the index

    def _choice(self, index: int, drawn: Any, logps: Sequence[float]) -> dict[str, Any]:
        ids, tokenizer = drawn.ids, self.base.tokenizer
        as_id = self.gives == "token_id:"
        tokens = [f"token_id:{i}" if as_id else tokenizer.decode([i]) for i in ids]
        return {
            "index": index,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": "stop" if drawn.finished else "length",
            "stop_reason": ids[-1] if drawn.finished else None,
            "logprobs": {"tokens": tokens, "token_logprobs": list(logps[: len(ids)])},
        } | ({"token_ids": ids} if self.gives == "token_ids" else {})

    def close(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    outer: SmallServer

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        with self.outer.lock:
            self.outer.asked.append((self.path, body))
            self.outer.keys.append(self.headers.get("Authorization"))
            trouble = self.outer.trouble(self.path, body)
        (trouble or Handler.send)(self, self.outer.reply(self.path, body))

    def send(self, reply: Reply, *, length: int | None = None) -> None:
        """The reply, or of its body the first `length` bytes although all are promised."""
        content = reply[1].encode() if isinstance(reply[1], str) else json.dumps(reply[1]).encode()
        with suppress(OSError):  # who asked has given up
            self.send_response(reply[0])
            if reply[0] == 307:
                self.send_header("Location", "/v1/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:length])

    def log_message(self, *_: Any) -> None:
        """Not into the test's output."""


class _Http(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Not into the test's output either."""


def error(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "type": "Error", "code": status}}


def _role(name: str) -> str:
    return name.replace("-", "_")


# ---- what can go wrong


def status(code: int, message: str = "it is ill") -> Trouble:
    return lambda handler, reply: handler.send(error(code, message))


def body(text: str) -> Trouble:
    return lambda handler, reply: handler.send((200, text))


def changed(change: Callable[[dict[str, Any]], None]) -> Trouble:
    """The reply with its choices changed."""

    def send(handler: Handler, reply: Reply) -> None:
        if isinstance(reply[1], dict):
            for choice in reply[1].get("choices", []):
                change(choice)
        handler.send(reply)

    return send


def fewer(handler: Handler, reply: Reply) -> None:
    if isinstance(reply[1], dict) and "choices" in reply[1]:
        reply[1]["choices"].pop()
    handler.send(reply)


def cut(handler: Handler, reply: Reply) -> None:
    handler.send(reply, length=40)


def hang_up(handler: Handler, reply: Reply) -> None:
    handler.close_connection = True


def silence(handler: Handler, reply: Reply) -> None:
    handler.outer.over.wait(30)


def drips(handler: Handler, reply: Reply) -> None:
    """A byte at a time, each long before a read's time is up."""
    with suppress(OSError):
        handler.send_response(200)
        handler.end_headers()
        while not handler.outer.over.wait(0.05):
            handler.wfile.write(b" ")


def drips_headers(handler: Handler, reply: Reply) -> None:
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not handler.outer.over.wait(0.05):
            handler.wfile.write(b"x")


SLOW: dict[str, Trouble] = {
    "no reply in time": silence,
    "a reply that drips": drips,
    "headers that drip": drips_headers,
}
PASSING: dict[str, Trouble] = {  # another attempt may help
    "HTTP 500": status(500),
    "HTTP 503": status(503),
    "HTTP 429": status(429, "too many"),
    "connection closed without a reply": hang_up,
    "connection closed within the reply": cut,
    **SLOW,
    "a page instead of JSON": body("<html>no</html>"),
    "JSON of something else": body('{"choices": 7}'),
    "JSON nested too deep": body("[" * 100_000),
    "fewer answers than asked for": fewer,
    "an answer that was broken off": changed(lambda choice: choice.update(finish_reason="abort")),
    "an answer longer than asked for": changed(
        lambda choice: choice.update(token_ids=[7] * 99, finish_reason="length")
    ),
    "no tokens at all": changed(lambda choice: choice.update(token_ids=[], finish_reason="length")),
    "tokens that are no numbers": changed(lambda choice: choice.update(token_ids=["a"])),
}
LASTING: dict[str, Trouble] = {  # the user has to mend it
    "HTTP 400": status(400, "max_tokens is too large"),
    "HTTP 401": status(401, "who are you"),
    "HTTP 404": status(404, "no such model"),
    "a redirect": status(307),
    "tokens outside the vocabulary": changed(lambda choice: choice.update(token_ids=[10**6])),
}
