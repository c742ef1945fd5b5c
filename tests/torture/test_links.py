"""Folders that somebody else made, with links in the places that are written or cleared: nothing outside is touched."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Command = Callable[..., Any]

SECTION = "Strangers' files"


class Place(NamedTuple):
    """`theirs` is a stopped run that a stranger made; `outside` holds what is ours and precious."""

    theirs: Path
    outside: Path
    model: Path
    trained: Path

    def resumed(self, *flags: object) -> Sequence[object]:
        few = ("--max-steps", 2, "--batch-size", 2, "--rank", 2, "--sample-steps", 0, "--learning-rate", 0.01)
        data = self.trained / "demonstrations.jsonl"
        common = ("sft", "--model", self.model, "--data", data, "--out", self.theirs, "--quantize", "none")
        return [*common, *few, *(flags or ("--resume",))]

    def linked(self, name: str, to: str) -> Sequence[object]:
        """The run with its entry `name` as a link, gone on with."""
        entry = self.theirs / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        entry.symlink_to(self.outside / to)
        return self.resumed()


def _locked_anew(p: Place) -> Sequence[object]:
    shutil.rmtree(p.theirs)
    p.theirs.mkdir()
    (p.theirs / ".lock").symlink_to(p.outside / "precious.txt")
    return p.resumed("--overwrite")


def _deleted(p: Place) -> Sequence[object]:
    p.linked(".lock", "precious.txt")
    return ["runs", "--delete", p.theirs, "--yes"]


def _pipe(p: Place) -> Sequence[object]:
    (p.theirs / "metrics.jsonl").unlink()
    os.mkfifo(p.theirs / "metrics.jsonl")
    return p.resumed()


def _rounds(p: Place) -> Sequence[object]:
    out = p.theirs.with_name("rounds")
    out.mkdir()
    (out / "rounds.json").write_text(json.dumps({"settings": {}, "rounds": []}))
    (out / "round-1").symlink_to(p.outside)
    flags = ("--annotator", "pool", "--score", "operator:eq", "--method", "dpo", "--quantize", "none", "--held-out", 0)
    return ["rounds", "--model", p.model, "--prompts", p.trained / "demonstrations.jsonl", "--out", out, *flags]


def _exported(p: Place) -> Sequence[object]:
    p.theirs.with_name(".new.exporting").symlink_to(p.outside)
    out = p.theirs.with_name("new")
    return ["export", "--model", p.model, "--adapter", p.trained / "sft", "--to", "adapter", "--out", out]


def _link(name: str, to: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: place.linked(name, to)


ATTACKS: dict[str, Callable[[Place], Sequence[object]]] = {
    "a run's lock": _link(".lock", "precious.txt"),
    "a new run's lock": _locked_anew,
    "the lock of a run to delete": _deleted,
    "checkpoints": _link("checkpoints", "folder"),
    "adapter": _link("adapter", "folder"),
    "adapter_config.json": _link("adapter/adapter_config.json", "precious.txt"),
    "plots": _link("plots", "folder"),
    "metrics, of a file that is not there": _link("metrics.jsonl", "new.txt"),
    "samples": _link("samples.jsonl", "precious.txt"),
    "a rollout server's adapters": _link("rollout_adapters", "folder"),
    "metrics as a pipe": _pipe,
    "a round": _rounds,
    "an unfinished export": _exported,
}


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
@pytest.mark.parametrize("name", ATTACKS)
def test_links_that_would_be_written_through(
    name: str, tally: Any, command: Command, trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    theirs, outside = tmp_path / "theirs", tmp_path / "outside"
    shutil.copytree(trained / "sft", theirs)
    (theirs / "run.json").write_text(json.dumps(json.loads((theirs / "run.json").read_text()) | {"state": "stopped"}))
    for file in ("step-9/letter.txt", "step-9/manifest.json", "adapter_config.json", ".loss.png.12345678.tmp"):
        (outside / "folder" / file).parent.mkdir(parents=True, exist_ok=True)
        (outside / "folder" / file).write_text("ours")
    (outside / "precious.txt").write_text("ours")
    argv, before = ATTACKS[name](Place(theirs, outside, tiny_llama, trained)), content(outside)
    outcome = command(*argv)
    wrong = [f"changed: {content(outside)}"] * (content(outside) != before)
    wrong += [f"ended with {outcome.code}"] * (outcome.code != 2)
    wrong += [f"said {outcome.err!r}"] * (outcome.err.count("\n") != 1 or ": a link" not in outcome.err)
    tally(SECTION, "made to attack: links where is written", "nothing outside, one line", held=int(not wrong), of=1)
    assert not wrong, wrong


def test_a_run_on_another_disk_goes_on(command: Command, trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """OUT itself may be a link."""
    theirs, elsewhere = tmp_path / "theirs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs.symlink_to(elsewhere)
    place = Place(theirs, elsewhere, tiny_llama, trained)
    assert command(*place.resumed("--overwrite")).code == 0
    assert command(*place.resumed("--resume")).code == 0
    assert (elsewhere / "adapter" / "adapter_config.json").is_file()
