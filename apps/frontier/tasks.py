"""One piece of work, the folder that keeps its result, and the hash of everything that decides it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from lowrank_align.durable import write_atomic
from lowrank_align.json_files import read_json

Kind = Literal["start", "policy", "reward", "best_of"]
DONE, START = "done.json", "start"
TRAININGS = "trainings"
LIBRARIES = ("torch", "transformers", "peft")
# Every source of the package decides what comes out, but for these; of the methods, the task's own and what they share.
DECIDES_NOTHING = (
    "apps", "commands", "doctor", "export", "methods", "plan", "ratings", "rounds", "store", "studio", "cli.py",
    "conversation.py", "listing.py", "locks.py", "plots.py", "progress.py", "stopping.py", "__main__.py",
)  # fmt: skip
SHARED_METHODS = ("methods/method.py", "methods/online.py", "methods/grouped.py")
OF_THE_FIGURE = tuple(f"apps/frontier/{name}.py" for name in ("budget", "measuring", "start", "worker"))


@dataclass(frozen=True)
class Ground:
    """What all tasks of a report stand on; all of it decides their results."""

    model: str
    weights: str  # SHA-256 of the base's files
    quantize: str
    device: str
    preset: str | None
    score: str
    prompts: str | None
    demonstrations: str | None
    files_sha256: dict[str, str]  # rows, the score's code, the preset
    budget_tokens: int
    pairs: int
    held_out: int
    max_new_tokens: int
    temperatures: tuple[float, ...]
    looks: int  # how often a training is looked at on its way


@dataclass(frozen=True)
class Task:
    """`spec` is JSON; `start_key` names the start that it goes on from."""

    kind: Kind
    name: str  # for people: "dpo beta=0.1"
    seed: int
    spec: dict[str, Any] = field(default_factory=dict)
    start_key: str | None = None

    def key(self, ground: Ground) -> str:
        """16 hexadecimal characters; another key, another result."""
        method = str(self.spec.get("method", "")).replace("-", "_")
        own = ["methods/sft.py", "methods/reward.py"] if self.kind != "policy" else [f"methods/{method}.py"]
        decides = {
            "task": {"kind": self.kind, "seed": self.seed, "spec": self.spec, "start": self.start_key},
            "ground": asdict(ground),
            "libraries": {name: version(name) for name in LIBRARIES},
            "sources": [source_sha256(name) for name in (*sources(), *SHARED_METHODS, *OF_THE_FIGURE, *own)],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, out: Path, ground: Ground) -> Path:
        """Where its run and its result lie."""
        return _folder(out, self.name, self.seed, self.key(ground))

    def start_folder(self, out: Path) -> Path:
        """Where the start that it goes on from lies."""
        assert self.start_key is not None
        return _folder(out, START, self.seed, self.start_key)


def _folder(out: Path, name: str, seed: int, key: str) -> Path:
    plain = "".join(c if c.isalnum() or c in "._=-" else "_" for c in name)
    return out / TRAININGS / f"{plain}-seed{seed}-{key}"


def read_done(folder: Path) -> dict[str, Any] | None:
    """The task's result; None where it is not finished."""
    try:
        found = read_json(folder / DONE)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_done(folder: Path, result: Mapping[str, Any]) -> None:
    """Last of all: from here on the task is not run again."""
    write_atomic(folder / DONE, json.dumps(result, indent=1) + "\n")


@cache
def sources() -> tuple[str, ...]:
    """The files and folders of the package that decide what a training gives, whatever its method."""
    found = (entry.name for entry in files("lowrank_align").iterdir() if entry.is_dir() or entry.name.endswith(".py"))
    return tuple(sorted(name for name in found if name not in (*DECIDES_NOTHING, "__pycache__", "presets")))


@cache
def source_sha256(name: str) -> str:
    """Of a source file of the package, or of all in a folder of it; of one that is not there, the empty text's."""
    place = files("lowrank_align") if not name.startswith("apps/") else files("lowrank_align.apps")
    path = place.joinpath(name.removeprefix("apps/"))
    found = [path] if path.is_file() else []
    if path.is_dir():
        found = [entry for entry in sorted(path.rglob("*.py"))]  # type: ignore[attr-defined]
    text = "".join(f.read_text("utf-8") for f in found)
    return hashlib.sha256(text.encode()).hexdigest()
