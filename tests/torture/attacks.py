"""What an attack is: it writes files, in a `World`, and gives the command that a user would run on them."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BAD = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eABC\x7f\r"
DEEP = "[" * 100_000 + "]" * 100_000
ROW = {"prompt": "Say: ", "completion": "a word"}
PAIR = {"prompt": "Say: ", "chosen": "a word", "rejected": "no"}
CODE = "open({canary!r}, 'w').write('ran')\n"


class World(NamedTuple):
    """Where an attack is prepared: `here` is the current folder, `outside` holds what must not be read or changed."""

    here: Path
    outside: Path
    model: Path  # a good model's folder
    runs: Path  # with the good runs sft and reward
    canary: Path  # what a payload would write
    tiny: Path  # a model that reads every character

    def pickled(self) -> bytes:
        return pickle.dumps(_Payload(str(self.canary)))

    def code(self) -> str:
        return CODE.format(canary=str(self.canary))

    def a_model(self, **changes: Any) -> Path:
        folder = self.here / "model"
        shutil.copytree(self.model, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def a_run(self, kind: str = "sft", **changes: Any) -> Path:
        """A copy of a good run; `changes` in its adapter's settings."""
        folder = self.here / "theirs"
        shutil.copytree(self.runs / kind, folder)
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    def templated(self, template: str) -> Path:
        folder = self.a_model()
        (folder / "chat_template.jinja").write_text(template)
        return folder


class _Payload:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"echo ran > {self.canary}",)


Attack = Callable[[World], Sequence[object]]
ATTACKS: dict[str, tuple[Attack, int, str]] = {}


def attack(name: str, code: int, says: str) -> Callable[[Attack], Attack]:
    """`says` is part of the line on stderr, or, where the command goes well, empty."""

    def add(function: Attack) -> Attack:
        assert name not in ATTACKS
        ATTACKS[name] = function, code, says
        return function

    return add


def logps(w: World, model: Path | None = None, adapter: object = None, *more: object) -> list[object]:
    """A command that reads model, adapter and rows, and runs the model."""
    with_adapter = ["--adapter", adapter] if adapter else []
    return ["logps", "--model", model or w.model, "--data", "rows.jsonl", "--out", "new.jsonl", "--quantize", "none",
            *with_adapter, *more]  # fmt: skip


def resumed(w: World, change: Callable[[Path], None]) -> Sequence[object]:
    """A run that was stopped, its checkpoint changed, goes on."""
    run = w.a_run()
    change(run / "checkpoints" / "step-2")
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"state": "stopped"}))
    few = ["--max-steps", "2", "--batch-size", "2", "--rank", "2", "--sample-steps", "0", "--learning-rate", "0.01"]
    data = w.runs / "demonstrations.jsonl"
    return ["sft", "--model", w.model, "--data", data, "--out", run, "--quantize", "none", *few, "--resume"]
