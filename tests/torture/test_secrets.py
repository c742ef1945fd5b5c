"""What no file of a run and no line on the terminal may hold; what is written at all, and never asked for."""
# ruff: noqa: E501 -- messages and templates are long lines

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.browser.running import begin_studio
from tests.serving import Reply, SmallServer, status
from tests.torture.attacks import PAIR, ROW

CACHE = "LOWRANK_ALIGN_CACHE"
Command = Callable[..., Any]

SECTION = "Strangers' files"


SECRETS = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplanted",
    "LOWRANK_JUDGE_KEY": "sk-PLANTED0123456789abcdef",
    "ROLLOUT_KEY": "rk-PLANTED0123456789abcdef",
    "WANDB_API_KEY": "w" * 40,
    "LOWRANK_STUDIO_PASSWORD": "planted-password",
}
FAULT, PROMISE = "a planted token, key or password, in use", "in no file and no line"


class Served(SmallServer):
    """Draws rollouts, and judges; as a hub it has no models."""

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        if path == "/v1/chat/completions":
            return 200, {"choices": [{"message": {"content": "Preferred: A"}}]}
        return super().reply(path, body)


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[Served]:
    made = Served(tiny_llama)
    yield made
    made.close()


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; every secret is in the environment, and the hub's in its file too."""
    file = tmp_path / "hub" / "token"
    file.parent.mkdir()
    file.write_text(SECRETS["HF_TOKEN"])
    for name, value in (SECRETS | {"HF_HOME": str(file.parent), "WANDB_MODE": "offline"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def places_of_secrets(told: list[str], *folders: Path) -> tuple[dict[str, list[str]], str]:
    """Where each of them stands, and a note of all that was searched."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    contents = {str(path): path.read_bytes() for path in files if path.parts[-2:] != ("hub", "token")}
    contents |= {f"output {number}": text.encode() for number, text in enumerate(told)}
    found = {
        name: [place for place, content in contents.items() if secret.encode() in content]
        for name, secret in SECRETS.items()
    }
    return found, f"{len(contents) - len(told)} files and {len(told)} outputs searched"


def test_planted_keys_are_in_no_file_and_no_line(
    tally: Any, command: Command, tiny_llama: Path, planted: Path, server: Served
) -> None:
    """The hub's token, a judge's key, a rollout server's and a tracker's: each is sent where it belongs, once at least,
    and refused there once."""
    Path("rows.jsonl").write_text("".join(json.dumps({**ROW, "prompt": f"{i}. Say: "}) + "\n" for i in range(6)))
    Path("pairs.jsonl").write_text("".join(json.dumps({**PAIR, "prompt": f"{i}. Say: "}) + "\n" for i in range(6)))
    base = ("--model", tiny_llama, "--quantize", "none")
    few = (*base, "--max-steps", "2", "--batch-size", "2", "--rank", "2")
    answers = ("--prompts", "rows.jsonl", *base, "--max-new-tokens", "4")
    judged = ("eval", "--adapter", "dpo", "--against", "sft", *answers, "--judge", server.address, "--judge-model", "m")
    drawn = ("grpo", "--prompts", "rows.jsonl", "--reward", "reward", *few, "--max-new-tokens", "4", "--group-size", "2",
             "--rollout-server", server.address, "--rollout-server-key-env", "ROLLOUT_KEY")  # fmt: skip
    told = []

    def ends(code: int, *argv: object) -> None:
        outcome = command(*argv)
        assert outcome.code == code, outcome.err
        told.append(outcome.out + outcome.err)

    ends(0, "sft", "--data", "rows.jsonl", "--out", "sft", *few)
    ends(0, "reward", "--data", "pairs.jsonl", "--out", "reward", *few)
    tracked = 0 if find_spec("wandb") else 3
    ends(tracked, "dpo", "--data", "pairs.jsonl", "--adapter", "sft", "--out", "tracked", *few, "--report-to", "wandb")
    ends(0, "dpo", "--data", "pairs.jsonl", "--adapter", "sft", "--out", "dpo", *few)
    ends(0, "ppo", "--prompts", "rows.jsonl", "--reward", "reward", "--out", "ppo", *few, "--max-new-tokens", "4")
    ends(0, *drawn, "--out", "grpo")
    ends(0, "generate", *answers, "--out", "answers.jsonl")
    ends(0, "eval", "--adapter", "dpo", "--against", "sft", *answers, "--judge", "reward", "--out", "report")
    ends(0, *judged, "--out", "judged")
    ends(0, "export", "--model", tiny_llama, "--adapter", "sft", "--to", "merged", "--out", "merged")
    ends(0, "data", "import", "pairs.jsonl", "--store", "x.db")
    told.append(command("doctor", "--json").out)
    ends(0, "runs", ".")
    server.trouble = lambda path, body: status(401, f"wrong: {' '.join(SECRETS.values())}")
    ends(2, *judged, "--out", "refused")
    ends(2, *drawn, "--out", "refused")
    told.append(asked_of_the_hub(server))
    found, note = places_of_secrets(told, planted, Path(os.environ[CACHE]))
    tally(SECTION, FAULT, PROMISE, held=sum(not places for places in found.values()), of=len(found), note=note)
    assert not any(found.values()), found
    sent = {name for name, value in SECRETS.items() if f"Bearer {value}" in server.keys}
    assert sent == {"HF_TOKEN", "LOWRANK_JUDGE_KEY", "ROLLOUT_KEY"}


def asked_of_the_hub(server: Served) -> str:
    """The output of a command that asks it for a model; where the hub is, its library reads once."""
    hub = server.address.removesuffix("/v1")
    argv = [sys.executable, "-m", "lowrank_align", "show", "--model", "planted/model", "--data", "rows.jsonl"]
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode in (2, 3) and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stdout + ended.stderr


def test_a_planted_password_is_in_no_file_and_no_line(tally: Any, tiny_base_folder: Path, planted: Path) -> None:
    """Of a studio that somebody signs in to, and somebody else cannot."""
    running = begin_studio(planted)
    try:
        running.wait()
        codes = []
        for password in (SECRETS["LOWRANK_STUDIO_PASSWORD"], "another"):
            form = urlencode({"username": "ada", "password": password}).encode()
            try:
                codes.append(urlopen(f"{running.address}login", form, timeout=30).status)
            except HTTPError as error:
                codes.append(error.code)
        assert codes[0] == 200 and codes[1] >= 400
        running.stop()
    finally:
        running.kill()
    found, note = places_of_secrets([], planted)
    note = f"{note}, of a studio"
    tally(SECTION, FAULT, PROMISE, held=sum(not places for places in found.values()), of=len(found), note=note)
    assert not any(found.values()), found


def test_only_safetensors_and_text_are_written(command: Command, trained: Path) -> None:
    """Every file of a run is what the promise names, by its content."""
    for path in trained.rglob("*"):
        if not path.is_file() or path.suffix in (".png", ".lock") or path.name == ".lock":
            continue
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            assert struct.unpack("<Q", content[:8])[0] < len(content)
            continue
        text = content.decode("utf-8")
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
        else:
            assert path.suffix in (".yaml", ".md"), path
