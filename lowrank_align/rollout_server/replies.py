"""What a completions reply holds: answers as tokens, and the server's log-probabilities of them."""

import json
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from lowrank_align.base import Base
from lowrank_align.config import OnlineSettings
from lowrank_align.data.encoder import panics_told
from lowrank_align.errors import UserError
from lowrank_align.rollout import Rollout
from lowrank_align.servers import NoReply


class Drawn(NamedTuple):
    """An answer, and the server's log-probability of each of its tokens where it gave them."""

    rollout: Rollout
    logps: list[float] | None


class Reader:
    """What a completions reply must hold: `count` answers in the base's vocabulary."""

    def __init__(self, base: Base, settings: OnlineSettings, end_ids: Sequence[int], count: int) -> None:
        self.tokenizer, self.end_ids, self.count = base.tokenizer, end_ids, count
        self.vocabulary = base.model.get_input_embeddings().num_embeddings
        self.name, self.address, self.most_tokens = base.name, settings.rollout_server, settings.max_new_tokens
        self.guessed_ids = False
        self._one = threading.Lock()

    def read(self, prompt: list[int], reply: bytes) -> list[Drawn]:
        """NoReply for what is no such reply, UserError for tokens that the base has not."""
        try:
            choices = sorted(json.loads(reply)["choices"], key=lambda choice: choice["index"])
            found = [self._answer(prompt, choice) for choice in choices]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise NoReply("no reply (not the JSON of a completion)") from None
        if len(found) != self.count:
            raise NoReply(f"{len(found)} answers where {self.count} were asked for")
        return found

    def _answer(self, prompt: list[int], choice: dict[str, Any]) -> Drawn:
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise NoReply("an answer that was broken off")
        said = choice.get("logprobs") or {}
        ids = _ids_of(choice, said)
        if ids is None:
            ids, said = self._guess(choice["text"], ended=reason == "stop"), {}
        strange = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if strange is not None:
            raise UserError(
                f"--rollout-server: {self.address}: answers with token {strange}, and {self.name} has"
                f" {self.vocabulary}; does it serve another model?"
            )
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        if end is None and reason == "stop":  # a server that leaves the end token out
            stop: Any = choice.get("stop_reason")  # a token, or a text
            last: int = stop if stop in self.end_ids else self.end_ids[0]
            ids, end = [*ids, last], len(ids)
        ids = ids if end is None else ids[: end + 1]
        if not 0 < len(ids) <= self.most_tokens:
            raise NoReply(f"an answer of {len(ids)} tokens where at most {self.most_tokens} were asked for")
        return Drawn(Rollout(prompt, ids, end is not None), _logps_of(said, len(ids)))

    def _guess(self, text: str, *, ended: bool) -> list[int]:
        """A text's tokens, which need not be those that were drawn."""
        self.guessed_ids = True
        with self._one, panics_told(self.tokenizer):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*ids[: self.most_tokens - 1], self.end_ids[0]] if ended else ids[: self.most_tokens]


def _ids_of(choice: dict[str, Any], said: dict[str, Any]) -> list[int] | None:
    """The token ids of an answer: vLLM's `token_ids`, or `token_id:17` in place of its tokens (before vLLM 0.10.2)."""
    ids = choice.get("token_ids")
    if ids is None:
        tokens = said.get("tokens") or [""]
        if not all(token.startswith("token_id:") for token in tokens):
            return None
        ids = [int(token.removeprefix("token_id:")) for token in tokens]
    if not all(type(token) is int for token in ids):
        raise TypeError("token ids that are no whole numbers")
    return list(ids)


def _logps_of(said: dict[str, Any], length: int) -> list[float] | None:
    logps = (said.get("token_logprobs") or [])[:length]
    usable = len(logps) == length and all(isinstance(one, int | float) and math.isfinite(one) for one in logps)
    return [float(one) for one in logps] if usable else None


def text_of(base: Base, ids: list[int]) -> str:
    """The text that a server's tokenizer makes these ids of, special tokens put in by itself; UserError without one."""
    with panics_told(base.tokenizer):
        whole = base.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        bare = base.tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
        for text in (whole, bare):
            if base.tokenizer(text).input_ids == ids:
                return str(text)
    raise UserError(
        "--rollout-server-prompts text: a prompt has no text that gives its own tokens again; a server that takes"
        " token ids is needed"
    )
