"""The server: it gets the policy's adapter, and is asked for completions until it gives them or is given up.

The adapter is written into the run's folder and loaded under a name made of its own hash; what was loaded before goes.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.config import OnlineSettings
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.provenance import folder_sha256
from lowrank_align.rollout_server.replies import Drawn, Reader, text_of
from lowrank_align.runs import SERVED
from lowrank_align.servers import NoReply, Refused, Server

PAUSES_SECONDS = (1.0, 4.0, 16.0)  # between attempts
CHECK_SECONDS = PARTING_SECONDS = 5.0
AT_ONCE = 64  # prompts; the server does the batching
REPLY_BYTES = 2**27
LOADABLE = "vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=true vllm serve MODEL --enable-lora --max-lora-rank RANK"

T = TypeVar("T")


class RolloutServer:
    """The server of `--rollout-server`. UserError where its key is missing or would be sent unencrypted."""

    def __init__(self, settings: OnlineSettings) -> None:
        s = self.settings = settings
        variable = s.rollout_server_key_env
        self.server = Server(
            str(s.rollout_server), named_by="--rollout-server", key_variable=variable,
            timeout_seconds=s.rollout_server_seconds,
        )  # fmt: skip
        if variable and not self.server.has_key:
            raise UserError(f"--rollout-server-key-env: the variable {variable} is not set")
        self.folder = Path(s.out).expanduser().absolute() / SERVED
        self.loaded = ""  # the name of the adapter that the server holds for us
        self.guessed_ids = False  # whether an answer came as text alone
        self._path = self.server.parts.path.rstrip("/") or "/v1"
        self._over = threading.Event()  # a request has failed for good: the others need no other attempt
        self._one = threading.Lock()

    def check(self) -> None:
        """That it is there, before a model is loaded."""
        try:
            self.server.ask(f"{self._path}/models", None, REPLY_BYTES, CHECK_SECONDS)
        except NoReply as problem:
            raise EnvironmentProblem(f"--rollout-server: {self.server.address}: {problem}; is it running?") from None
        except Refused as refused:
            if refused.code in (401, 403):
                raise self._refusal(refused) from None  # others have no such page

    def sample(
        self,
        base: Base,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        end_ids: Sequence[int],
        completions_per_prompt: int,
        between: Callable[[], None] = lambda: None,
    ) -> list[list[Drawn]]:
        """Completions of every prompt under the role `policy`, in the order of the prompts.

        `between` is called now and then while the server works. EnvironmentProblem where it gives none after several
        attempts, UserError where it refuses.
        """
        self._over.clear()
        self._publish(base)
        reader = Reader(base, self.settings, end_ids, completions_per_prompt)
        asked = [text_of(base, ids) if self.settings.rollout_server_prompts == "text" else ids for ids in prompts]
        with ThreadPoolExecutor(min(AT_ONCE, len(prompts))) as pool:
            running = [
                pool.submit(self._answers, prompt, said, seed, reader)
                for prompt, said, seed in zip(prompts, asked, seeds, strict=True)
            ]
            waiting = set(running)
            while waiting and not self._over.is_set():
                done, waiting = wait(waiting, timeout=0.25, return_when=FIRST_EXCEPTION)
                if any(one.exception() for one in done):
                    self._over.set()
                between()
            pool.shutdown(cancel_futures=self._over.is_set())
        self.guessed_ids |= reader.guessed_ids
        failed = [error for one in running if not one.cancelled() and (error := one.exception())]
        if failed:
            raise next((error for error in failed if not isinstance(error, _GivenUp)), failed[0])
        return [one.result() for one in running]

    def close(self) -> None:
        """Leave nothing behind, in the server or on the disk; a server that is gone holds nobody up."""
        for adapter in self.folder.glob("lowrank-*"):
            self._unload(adapter.name)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.loaded = ""

    # ---- the adapter

    def _publish(self, base: Base) -> None:
        """Have the server hold the policy as it is now, and only that. The same bytes have the same name."""
        temporary = self.folder / f".tmp-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            base.save_role("policy", temporary)
            name = name_of(temporary)
            try:
                temporary.rename(self.folder / name)
            except OSError:  # there from before, or by another process of the run
                if not (self.folder / name).is_dir():
                    raise
                if name_of(self.folder / name) != name:
                    shutil.rmtree(self.folder / name)
                    temporary.rename(self.folder / name)
        except OSError as error:
            reason = error.strerror or str(error)
            raise EnvironmentProblem(f"{self.folder}: could not write the server's adapter: {reason}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if name != self.loaded:
            self._load(name)
            for older in self.folder.glob("lowrank-*"):  # a killed run's too
                if older.name != name:
                    self._unload(older.name)
            self.loaded = name

    def _load(self, name: str) -> None:
        body = {"lora_name": name, "lora_path": str(self.folder / name)}
        try:
            self._ask("/load_lora_adapter", body, lambda reply: reply)
        except Refused as refused:
            if not (refused.code == 400 and "already" in refused.said):  # of this name, so of these bytes
                raise self._refusal(refused, f"it must see {self.folder} and take adapters ({LOADABLE})") from None

    def _unload(self, name: str) -> None:
        """One attempt; a server that has forgotten the adapter, or is gone, is no problem."""
        with contextlib.suppress(NoReply, Refused):
            self.server.ask(f"{self._path}/unload_lora_adapter", {"lora_name": name}, REPLY_BYTES, PARTING_SECONDS)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    # ---- asking

    def _answers(self, prompt: list[int], said: list[int] | str, seed: int, reader: Reader) -> list[Drawn]:
        s = self.settings
        body: dict[str, Any] = {
            "model": self.loaded, "prompt": said, "n": reader.count, "seed": seed, "max_tokens": s.max_new_tokens,
            "temperature": s.temperature, "top_p": 1.0, "logprobs": 1,
        }  # fmt: skip
        if isinstance(said, list):  # vLLM's own: nothing but the temperature changes what is drawn, and our ends end
            body |= {
                "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": list(reader.end_ids),
                "return_token_ids": True, "return_tokens_as_token_ids": True,
            }  # fmt: skip
        ask = partial(self._ask, "/completions", body, partial(reader.read, prompt))
        try:
            try:
                return ask()
            except Refused as refused:
                if refused.code != 404:
                    raise
                with self._one:  # it was started anew
                    self._load(self.loaded)
                return ask()
        except Refused as refused:
            raise self._refusal(refused) from None

    def _ask(self, path: str, body: dict[str, Any] | None, read: Callable[[bytes], T]) -> T:
        """What `read` makes of the reply, after as many attempts as there are pauses, and one."""
        for pause in (*PAUSES_SECONDS, None):
            try:
                return read(self.server.ask(self._path + path, body, REPLY_BYTES))
            except NoReply as problem:
                what = f"{problem}{f': {problem.said}' if problem.said else ''}"
            if pause is None:
                break
            if self._over.wait(pause):
                raise _GivenUp(what)
        raise EnvironmentProblem(f"--rollout-server: {self.server.address}: {what}, {len(PAUSES_SECONDS) + 1} times")

    def _refusal(self, refused: Refused, hint: str = "") -> UserError:
        if refused.code in (401, 403):
            variable = self.settings.rollout_server_key_env
            hint = f"is the variable {variable} right?" if variable else "it wants a key: --rollout-server-key-env"
        said = f" ({refused.said})" if refused.said else ""
        return UserError(
            f"--rollout-server: {self.server.address}: refused with {refused}{said}{f'; {hint}' if hint else ''}"
        )


def name_of(folder: Path) -> str:
    """What an adapter's folder is called in the server: the same bytes, the same name."""
    return f"lowrank-{folder_sha256([folder / adapters.WEIGHTS, folder / adapters.CONFIG])[:16]}"


class _GivenUp(EnvironmentProblem):
    """Not asked again because another request has failed for good; that one is told."""
