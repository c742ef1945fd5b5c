"""Files made to attack: none runs code, none reads or writes outside its folder, none works the terminal or is endless.

Each of `attacks_*.py` writes one and gives the command that a user would run on it. Whatever comes of it, an audit
hook of the interpreter has seen no code started, no connection and no file outside opened.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.torture import (  # noqa: F401 -- they enter their attacks
    attacks_paths,
    attacks_settings,
    attacks_stores,
    attacks_templates,
    attacks_terminal,
    attacks_texts,
    attacks_weights,
)
from tests.torture.attacks import ATTACKS, ROW, World

Command = Callable[..., Any]

SECTION = "Strangers' files"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SECRET = "do-not-read-me-7c1f"

SEEN: list[str] = []
WATCHED: dict[str, Any] = {"on": False, "outside": ""}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not WATCHED["on"]:
        return
    if (
        event
        in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.bind", "pickle.find_class")
        or event == "subprocess.Popen"
        and "template_worker.py" not in str(arguments)
    ):
        SEEN.append(f"{event} {arguments}")
    elif event == "open" and str(arguments[0]).startswith(WATCHED["outside"]):
        SEEN.append(f"open {arguments[0]}")
    elif event == "import" and arguments[0] in ("evil", "modeling_llama"):
        SEEN.append(f"import {arguments[0]}")


@pytest.fixture(scope="session", autouse=True)
def hook() -> None:
    sys.addaudithook(_hook)  # for good: the interpreter never takes one back


@pytest.fixture
def world(
    tmp_path: Path, trained: Path, tiny_llama: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    here, outside = tmp_path / "here", tmp_path / "outside"
    here.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (here / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield World(here, outside, tiny_llama, trained, tmp_path / "canary", tiny_base_folder)
    WATCHED["on"] = False


@pytest.fixture
def quick_templates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half a second for a template in place of ten: the limit is the worker's own, so it gets one with another."""
    if "template" not in request.node.callspec.params["name"]:
        yield
        return
    from lowrank_align.data import template_room

    run = template_room.RUN.replace("run_path(sys.argv[1], run_name='__main__')", "run_path(sys.argv[1])")
    run += "; w = _['main'].__globals__; w['CPU_SECONDS'] = 0.5; w['main']()"
    template_room.ROOM.close()
    monkeypatch.setattr(template_room, "RUN", run.replace("runpy.run_path", "_ = runpy.run_path"))
    yield
    template_room.ROOM.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_files_made_to_attack(
    name: str, tally: Any, command: Command, world: World, quick_templates: None, caplog: pytest.LogCaptureFixture
) -> None:
    make, code, says = ATTACKS[name]
    argv = make(world)
    outside = {path: path.stat().st_mtime_ns for path in world.outside.rglob("*")}
    SEEN.clear()
    WATCHED.update(on=True, outside=str(world.outside))
    outcome = command(*argv)
    WATCHED["on"] = False
    told = outcome.out + outcome.err
    wrong = list(SEEN)
    wrong += ["code ran"] * world.canary.exists()
    wrong += [f"changed outside: {sorted(outside)}"] * (
        outside != {p: p.stat().st_mtime_ns for p in world.outside.rglob("*")}
    )
    wrong += ["control characters on the terminal"] * bool(CONTROL.search(told))
    wrong += ["said what it should not know"] * (SECRET in told)
    wrong += [f"wrote what it should not know: {path}" for path in world.here.rglob("*")
              if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes()]  # fmt: skip
    wrong += [f"ended with {outcome.code}: {outcome.err}"] * (outcome.code != code)
    wrong += [f"said {outcome.err!r}, not {says!r}"] * (says not in outcome.err)
    wrong += [f"more than a line: {outcome.err}"] * (code != 0 and outcome.err.count("\n") != 1)
    kind = name.partition(":")[0]
    tally(SECTION, f"made to attack: {kind}" if ":" in name else "made to attack: pickles",
          "no code, nothing outside, nothing endless, one line", held=int(not wrong), of=1)  # fmt: skip
    assert not wrong, wrong


def test_there_are_enough_of_them() -> None:
    assert len(ATTACKS) >= 40
