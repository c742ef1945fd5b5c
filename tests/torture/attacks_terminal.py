"""Names and texts that would work the terminal they are shown on."""
# ruff: noqa: E501 -- messages and templates are long lines

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.torture.attacks import BAD, ROW, World, attack, logps


def _named(w: World, name: str, to: str = "runs") -> Path:
    (w.here / to).mkdir(exist_ok=True)
    run = w.here / to / name
    shutil.copytree(w.runs / "sft", run)
    return run


NASTY = "x\x1b[2J\x07\u202ey\nz"


@attack("terminal: a run's name", 0, "")
def _(w: World) -> Sequence[object]:
    _named(w, NASTY)
    return ["runs", "runs"]


@attack("terminal: what run.json and provenance.json say", 0, "")
def _(w: World) -> Sequence[object]:
    run = _named(w, "x")
    said = {"state": "finished", "method": BAD, "started": BAD * 3, "steps": BAD, "summary": {BAD: BAD}}
    (run / "run.json").write_text(json.dumps(said))
    (run / "provenance.json").write_text(json.dumps({"base": BAD, "method": BAD, "parent": {"run": BAD}}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, BAD: 1.0, "loss": 10**400}) + "\n")
    return ["runs", "runs"]


@attack("terminal: settings and figures that are compared", 0, "")
def _(w: World) -> Sequence[object]:
    one, two = _named(w, NASTY), _named(w, "two")
    (one / "config.yaml").write_text(f"method: sft\n{json.dumps('k' + BAD)}: {json.dumps(BAD)}\n[bold]x: '[link=x]y[/link]'\n"
                                     .replace("[bold]x", "'[bold]x'"))  # fmt: skip
    (one / "metrics.jsonl").write_text(json.dumps({"step": 1, f"m{BAD}": 2.0}) + "\n")
    return ["runs", "--compare", one, two]


@attack("terminal: a run that is deleted", 0, "")
def _(w: World) -> Sequence[object]:
    return ["runs", "--delete", _named(w, NASTY), "--yes"]


@attack("terminal: a row", 0, "")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_text(json.dumps({"prompt": f"a{BAD}", "completion": f"b{BAD}"}) + "\n")
    return ["show", "--model", w.tiny, "--data", "rows.jsonl"]


@attack("terminal: rows that are audited", 0, "")
def _(w: World) -> Sequence[object]:
    rows = [{"prompt": f"a{BAD}{i % 2}", "completion": f"b{BAD}\ufffd", f"c{BAD}": BAD} for i in range(4)]
    (w.here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["audit", "--model", w.tiny, "--data", "rows.jsonl", "--eval-data", "rows.jsonl"]


@attack("terminal: a field that is missing beside others", 2, "missing (fields: prompt, chosen, \\x1b")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", BAD: "c"}) + "\n")
    return ["dpo", "--model", w.model, "--data", "rows.jsonl", "--out", "new"]


@attack("terminal: a role", 2, "unknown role")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_text(json.dumps({"messages": [{"role": f"u{BAD}", "content": "x"}]}) + "\n")
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


@attack("terminal: a file's name", 2, "\\x1b[2J\\x07")
def _(w: World) -> Sequence[object]:
    (w.here / NASTY).write_text("{nope\n")
    return ["show", "--model", w.model, "--data", NASTY]


@attack("terminal: names of files in a folder of rows", 2, "\\x1b[2J\\x07")
def _(w: World) -> Sequence[object]:
    (w.here / "rows").mkdir()
    (w.here / "rows" / f"{NASTY}.jsonl").write_text("{nope\n")
    return ["show", "--model", w.model, "--data", "rows"]


@attack("terminal: a neighbour's name in a suggestion", 2, "did you mean abc\\x1bdef.jsonl")
def _(w: World) -> Sequence[object]:
    (w.here / "abc\x1bdef.jsonl").write_text(json.dumps(ROW))
    return ["show", "--model", w.model, "--data", "abcdef.jsonl"]


@attack("terminal: a model's name", 2, "no such model folder")
def _(w: World) -> Sequence[object]:
    return logps(w, Path(f"./{NASTY}"))


@attack("terminal: a tensor's name", 2, "theirs")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    file = run / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"x{BAD}": torch.zeros(1)}, file)
    return logps(w, None, run)


@attack("terminal: a weight's name in a model", 0, "")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    file = model / "model.safetensors"
    save_file(load_file(file) | {f"x{BAD}": torch.zeros(1)}, file, metadata={"format": "pt"})
    return logps(w, model)


@attack("terminal: markup of rich in a row", 0, "")
def _(w: World) -> Sequence[object]:
    row = {"prompt": "[link=http://evil]a[/link]", "completion": "[bold red]b[/] [/nothing]"}
    (w.here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


@attack("terminal: an argument", 2, "no such flag")
def _(w: World) -> Sequence[object]:
    return ["sft", f"--{NASTY}"]
