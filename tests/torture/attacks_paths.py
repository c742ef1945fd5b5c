"""Links and archives that lead out of their folder."""

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.torture.attacks import ROW, World, attack, logps, resumed

# ---- links and paths


@attack("link: adapter_model.safetensors to a file outside", 2, "is a link that leads out of")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    file = run / "adapter" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(w.outside / "secret.txt")
    return logps(w, None, run)


@attack("link: adapter_config.json to a file outside", 2, "is a link that leads out of")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    file = run / "adapter" / "adapter_config.json"
    shutil.move(file, w.outside / "x.json")
    file.symlink_to(w.outside / "x.json")
    return logps(w, None, run)


@attack("link: a run's adapter folder outside", 2, "is a link that leads out of")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    shutil.move(run / "adapter", w.outside / "adapter")
    (run / "adapter").symlink_to(w.outside / "adapter")
    return logps(w, None, run)


@attack("link: prompting.json to a file outside", 2, "is a link that leads out of")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "prompting.json").symlink_to(w.outside / "secret.txt")
    return logps(w, None, run)


def linked(place: Path, away: Path) -> None:
    shutil.move(place, away)
    place.symlink_to(away)


@attack("link: a checkpoint's files outside", 0, "")
def _(w: World) -> Sequence[object]:
    """Not taken: the run starts anew."""
    return resumed(w, lambda step: linked(step / "tensors.safetensors", w.outside / "t.safetensors"))


@attack("link: a checkpoint's folder outside", 0, "")
def _(w: World) -> Sequence[object]:
    return resumed(w, lambda step: linked(step, w.outside / "step-2"))


@attack("link: a model's licence to a file outside, exported", 0, "")
def _(w: World) -> Sequence[object]:
    """It is not copied into what gets published."""
    model = w.a_model()
    (model / "LICENSE").symlink_to(w.outside / "secret.txt")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").symlink_to(w.outside / "secret.txt")
    return ["export", "--model", model, "--adapter", w.a_run(), "--to", "adapter", "--out", "exported"]


@attack("link: a run in the runs' folder that leads outside", 0, "")
def _(w: World) -> Sequence[object]:
    (w.here / "runs").mkdir()
    shutil.copytree(w.runs / "sft", w.outside / "run")
    (w.here / "runs" / "x").symlink_to(w.outside / "run")
    return ["runs", "runs"]


@attack("link: --overwrite through a run's linked folder", 0, "")
def _(w: World) -> Sequence[object]:
    """The link goes, what it led to stays."""
    run = w.a_run()
    shutil.rmtree(run / "plots", ignore_errors=True)
    (run / "plots").symlink_to(w.outside)
    few = ["--max-steps", "1", "--batch-size", "2", "--rank", "2", "--sample-steps", "0"]
    data = w.runs / "demonstrations.jsonl"
    return ["sft", "--model", w.model, "--data", data, "--out", run, "--quantize", "none", *few, "--overwrite"]


# ---- archives


def _zip(names: Sequence[str]) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), json.dumps(ROW) + "\n")
    return into.getvalue()


def _tar(w: World) -> bytes:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w:gz") as archive:
        for name in ("../outside/slipped", "/tmp/slipped"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("rows.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, str(w.outside / "secret.txt")
        archive.addfile(link)
    return into.getvalue()


@attack("archive: a zip as rows", 2, "a zip archive; unpack it")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_bytes(_zip(["../outside/slipped", "rows.jsonl"]))
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


@attack("archive: a gzipped tar as rows", 2, "rows.jsonl")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_bytes(_tar(w))
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


@attack("archive: a zip as adapter", 2, "no such run or adapter folder")
def _(w: World) -> Sequence[object]:
    (w.here / "theirs.zip").write_bytes(_zip(["../outside/slipped", "adapter_config.json"]))
    return logps(w, None, "theirs.zip")


@attack("archive: a zip as model", 2, "is a file; --model takes a model folder")
def _(w: World) -> Sequence[object]:
    (w.here / "model.zip").write_bytes(_zip(["../outside/slipped", "config.json"]))
    return logps(w, Path("model.zip"))


@attack("archive: gzip that unpacks to gigabytes", 2, "unpacks to over")
def _(w: World) -> Sequence[object]:

    (w.here / "rows.jsonl").write_bytes(gzip.compress(bytes(2**20), mtime=0) * 600)
    return ["show", "--model", w.model, "--data", "rows.jsonl"]
