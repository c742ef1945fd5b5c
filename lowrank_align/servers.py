"""Asking a server that the user names: a judge, a sampler.

Its key comes from an environment variable and stays in memory: it is in no setting, file, log or message, it is not
sent on when a server redirects, and never unencrypted to another machine.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from lowrank_align.errors import UserError

LOCAL = ("localhost", "127.0.0.1", "::1")
MAY_PASS = (408, 429)  # and every 5xx
SHOWN_CHARACTERS = 200


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
            self.parts = urlsplit(address)
            host = self.parts.hostname
        except ValueError:  # [ without ]
            raise UserError(f"{named_by}: no address, as http://127.0.0.1:8000/v1") from None
        if self.parts.username or self.parts.password:
            place = f"the variable {key_variable}" if key_variable else "an environment variable"
            raise UserError(f"{named_by}: a key does not belong into the address; put it into {place}")
        if not host:
            raise UserError(f"{named_by}: {address}: no host in the address")
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        if self._key and self.parts.scheme == "http" and host not in LOCAL:
            raise UserError(
                f"{named_by}: {address}: {key_variable} is sent over https only, or to this machine; use https://"
            )
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def has_key(self) -> bool:
        return bool(self._key)

    def ask(self, path: str, body: dict[str, Any] | None, most_bytes: int, seconds: float | None = None) -> bytes:
        """What it replies at `path` to `body` as JSON, or to a GET without one; NoReply or Refused."""
        seconds = self.timeout_seconds if seconds is None else seconds
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.parts._replace(path=path).geturl(), content, headers)
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return bytes(answer.read(most_bytes))
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
