"""Asking a server that the user names: a judge, a sampler.

Its key comes from an environment variable and stays in memory: it is in no setting, file, log or message, it is not
sent on when a server redirects, and never unencrypted to another machine.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lowrank_align.errors import UserError

LOCAL = ("localhost", "127.0.0.1", "::1")
MAY_PASS = (408, 429)  # and every 5xx
SHOWN_CHARACTERS = 200
CHUNK_BYTES = 2**20


def check_address(address: str, key_place: str) -> SplitResult:
    """The address in its parts; ValueError where it is none, or may hold a key, which belongs into `key_place`."""
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # [ without ], a port of six digits
        is_address = False
    if not is_address:
        raise ValueError("no address; it looks like http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{shown_address(address)}: a key does not belong into the address, nor does what follows ? or #; "
            f"put it into {key_place}"
        )
    return parts


def shown_address(address: str) -> str:
    """For a message: all of an address that `check_address` lets pass, else its scheme and host."""
    try:
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "http://..."
    bare = parts._replace(netloc=host, query="", fragment="").geturl() == address
    return address if bare else f"{parts.scheme}://{host}"


class NoReply(Exception):
    """Nothing that could be read; another attempt may help. `said`: the server's own words, where it had some."""

    def __init__(self, problem: str, said: str = "") -> None:
        super().__init__(problem)
        self.said = said


class Refused(Exception):
    """A reply that no other attempt will better: its HTTP status, and what the server says of it."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"HTTP {code}")
        self.code, self.said = code, said


class Server:
    """The server at `address`, which the flag `named_by` names; its key is in the variable `key_variable`, if any."""

    def __init__(self, address: str, *, named_by: str, key_variable: str | None, timeout_seconds: float) -> None:
        """UserError where the address is none, holds a key, or where a key would go over the net unencrypted."""
        self.address, self.timeout_seconds = address, timeout_seconds
        try:
            self.parts = check_address(address, f"the variable {key_variable}" if key_variable else "a variable")
        except ValueError as error:
            raise UserError(f"{named_by}: {error}") from None
        local = self.parts.hostname in LOCAL
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        if self._key and self.parts.scheme == "http" and not local:
            raise UserError(
                f"{named_by}: {address}: {key_variable} is sent over https only, or to this machine; use https://"
            )
        direct = [urllib.request.ProxyHandler({})] if local else []  # a proxy would get the key unencrypted
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)

    @property
    def has_key(self) -> bool:
        return bool(self._key)

    def ask(self, path: str, body: dict[str, Any] | None, most_bytes: int, seconds: float | None = None) -> bytes:
        """What it replies at `path` to `body` as JSON, or to a GET without one; NoReply or Refused.

        Of a long reply the first `most_bytes`. In a thread of its own: a socket's time limit is for each of its reads,
        and a server that drips has as many as it likes.
        """
        seconds = self.timeout_seconds if seconds is None else seconds
        reply: Future[bytes] = Future()

        def work() -> None:
            try:
                reply.set_result(self._ask(path, body, most_bytes, seconds))
            except BaseException as error:
                reply.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return reply.result(seconds)
        except TimeoutError:
            raise NoReply(f"no reply within {seconds:g} s") from None

    def _ask(self, path: str, body: dict[str, Any] | None, most_bytes: int, seconds: float) -> bytes:
        until = time.monotonic() + seconds
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.parts._replace(path=path).geturl(), content, headers)
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                found = bytearray()
                while len(found) < most_bytes and (part := answer.read1(min(most_bytes - len(found), CHUNK_BYTES))):
                    found += part
                    if time.monotonic() > until:  # nobody waits any more
                        raise TimeoutError
                return bytes(found)
        except urllib.error.HTTPError as error:
            said = self._said(error)
            if error.code in MAY_PASS or error.code >= 500:
                raise NoReply(f"no reply (HTTP {error.code})", said) from None
            raise Refused(error.code, said) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise NoReply(f"no reply within {seconds:g} s") from None
            raise NoReply(f"no reply ({getattr(reason, 'strerror', None) or reason})") from None
        except (http.client.HTTPException, ValueError) as error:  # ValueError: a host's name that cannot be one
            raise NoReply(f"no reply (not HTTP: {type(error).__name__})") from None

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The message in an error's body, in one line of plain characters; none that repeats the key."""
        try:
            found: Any = json.loads(error.read(2**16))
            found = found.get("error", found)
            text = str(found.get("message") or found.get("detail") or "") if isinstance(found, dict) else str(found)
        except (ValueError, AttributeError, OSError, http.client.HTTPException, RecursionError):
            return ""
        if self._key and self._key in text:
            return ""
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the key along to wherever the server points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None
