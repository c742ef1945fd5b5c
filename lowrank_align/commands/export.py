"""`export`: what was trained for other programs, and the proof that it is the same."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_align import adapters, terminal
from lowrank_align.config import ExportSettings, ReadingSettings
from lowrank_align.devices import DTYPES, pick_device
from lowrank_align.durable import write_atomic
from lowrank_align.errors import NumericError, UserError
from lowrank_align.evaluate import parties, proof
from lowrank_align.evaluate.proof import Say
from lowrank_align.export import gguf, merge, ollama
from lowrank_align.export.card import GGUF, card
from lowrank_align.export.companions import classifier_pad, prefix_notes, write_adapter, write_companions
from lowrank_align.export.folder import ExportFolder, check_out, check_room
from lowrank_align.export.source import NAMES, Job, Source, find_source
from lowrank_align.export.verify import WeightCheck, verify_weights
from lowrank_align.loading import load_frozen
from lowrank_align.preset_check import preset_lines
from lowrank_align.presets import read_preset
from lowrank_align.provenance import file_sha256
from lowrank_align.terminal import make_console

PARITY, CARD, SCRATCH = "parity.json", "README.md", "merging"


def export(settings: ExportSettings) -> None:
    """Write the export into OUT, or into OUT.failed with exit code 4 where it is not what was trained."""
    job, converter, notes = _prepare(settings)
    out = Path(settings.out).expanduser().absolute()
    with ExportFolder(out) as folder, _steps() as say:
        say("reading base + adapter")
        reference = proof.read_reference(job)
        model_folder = folder.path / SCRATCH if job.to == "gguf" else folder.path
        model_folder.mkdir(exist_ok=True)
        weights = _write_model(job, model_folder, say)
        facts, doubts = _other_formats(job, folder.path, model_folder, converter, notes, say)
        passed, report = proof.prove(job, model_folder, reference, weights, facts, say)
        if model_folder != folder.path:
            shutil.rmtree(model_folder)
        write_atomic(folder.path / PARITY, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        licence = read_preset(settings.preset).licence if settings.preset else None
        text = card(job.source, out.name, job.to, job.dtype, report, [*notes, *doubts], licence)
        (folder.path / CARD).write_text(text, encoding="utf-8")
        say("sealing")
        folder.mark(**_marker(job, passed))
        place = folder.publish() if passed else folder.fail()
    for line in [*notes, *report["summary"], *doubts]:  # last what may keep the export from being of use
        terminal.say(line)
    if not passed:
        raise NumericError(f"{out}: not what was trained, so it is kept as {place.name} only; see {PARITY} in there")
    terminal.say(f"{settings.out}: {job.to}, checked" + (f"; {ollama.IN_SHORT[job.to]}: see above" if doubts else ""))


# ---- before anything is loaded


def _prepare(settings: ExportSettings) -> tuple[Job, Path | None, list[str]]:
    """Everything a user can have got wrong."""
    pick_device(settings.device)
    source = find_source(settings)
    out = Path(settings.out).expanduser().absolute()
    check_out(out, settings.overwrite, {"the run": source.run, "the base": source.base})
    notes = [*_preset_notes(settings, source), *prefix_notes(source)]
    _refuse_combinations(settings, source)
    converter = gguf.find_converter() if settings.to == "gguf" else None
    if settings.to == "adapter" and source.renamed:
        notes.append("made for the base's language model alone: PEFT must get that part, not the whole that also sees")
    nf4 = settings.as_trained and source.trained_with != "none"
    if settings.as_trained and not nf4:
        notes.append("--as-trained: the run was trained on unquantised weights, which are exported either way")
    elif settings.as_trained and source.trained_with is None:
        notes.append("--as-trained: how the adapter was trained is not on record; taken as NF4")
    dtype = source.own_dtype if settings.dtype == "auto" or settings.to == "adapter" else DTYPES[settings.dtype]
    place = parties.place_for(source, settings.device)
    if place != str(pick_device(settings.device)):
        notes.append("the 16-bit weights do not fit into the GPU: compared on the CPU")
    if settings.to != "adapter":
        size = sum(file.stat().st_size for file in source.base.glob("*.safetensors"))
        copies = 2 if settings.to == "gguf" else 1
        check_room(out, copies * size * dtype.itemsize // source.own_dtype.itemsize)
    return Job(source, settings.to, dtype, nf4, place), converter, notes


def _refuse_combinations(settings: ExportSettings, source: Source) -> None:
    flags = {"--as-trained": settings.as_trained, f"--dtype {settings.dtype}": settings.dtype != "auto"}
    for flag in (flag for flag, given in flags.items() if given and settings.to == "adapter"):
        raise UserError(f"{flag}: is about merged weights; an adapter stays in fp32 beside whichever base")
    if source.kind == "reward":
        if settings.to in ("gguf", "ollama"):
            what = "is a reward model, which does not chat; take --to merged"
            raise UserError(f"--to {settings.to}: {source.run} {what}")
        if settings.to == "merged":
            merge.empty_classifier(source.config if not source.renamed else source.config.get_text_config())
    if settings.as_trained and source.trained_with == "int8":
        raise UserError(
            f"--as-trained: {source.run} was trained on int8 weights, whose arithmetic rounds activations too; "
            "no plain weights are the same"
        )


def _preset_notes(settings: ExportSettings, source: Source) -> list[str]:
    if settings.preset is None:
        return []
    reading = ReadingSettings(model=source.model, preset=settings.preset, data="-", thinking=settings.thinking)
    return preset_lines(reading, source.renderer, source.config)


# ---- the export itself


def _write_model(job: Job, folder: Path, say: Say) -> WeightCheck | None:
    """Weights and what lies beside them; what came of reading the weights back."""
    source = job.source
    if job.is_adapter:
        write_companions(folder, source)
        write_adapter(folder, source)
        return None
    say("loading the base")
    loaded = load_frozen(source.model, quantize="none", device="cpu", dtype=NAMES[source.own_dtype])
    merged = merge.merge(
        loaded.model,
        source.saved,
        job.dtype,
        nf4=job.layers,
        tick=lambda done, total: say(f"merging layer {done} of {total}"),
    )
    job.transposed = merged.transposed
    if source.kind == "reward":
        merged = merge.as_classifier(merged, source.saved, job.dtype, classifier_pad(source))
    say("writing the weights")
    merge.save(merged.model, folder, own_names=bool(source.renamed))
    del loaded, merged
    write_companions(folder, source, job.dtype, states_bos=job.to in ("ollama", "gguf"))
    say("reading the weights back")
    return verify_weights(
        folder,
        source.base,
        source.saved,
        transposed=job.transposed,
        nf4=job.layers,
        renamed=source.renamed,
    )


def _other_formats(
    job: Job, folder: Path, model: Path, converter: Path | None, notes: list[str], say: Say
) -> tuple[dict[str, Any], list[str]]:
    """The Modelfile, and the GGUF file compared with the weights that it was made of.

    What that comparison gave, and why the program that it is for may not read it.
    """
    facts: dict[str, Any] = {}
    doubts: list[str] = []
    if converter is not None:
        say("converting to GGUF")
        gguf.convert(converter, model, folder / GGUF, job.dtype)
        facts["gguf"] = gguf.compare_tensors(folder / GGUF, model, converter)
    if job.to in ("ollama", "gguf"):
        made = ollama.modelfile(job.source, f"./{GGUF}" if converter else ".")
        (folder / ollama.MODELFILE).write_text(made.text, encoding="utf-8")
        notes += made.warnings
        doubts = ollama.import_warnings(model, job.to)
    return facts, doubts


def _marker(job: Job, passed: bool) -> dict[str, Any]:
    source = job.source
    return {
        "state": "passed" if passed else "failed",
        "to": job.to,
        "kind": source.kind,
        "dtype": NAMES[job.dtype],
        "as_trained": job.nf4,
        "base": source.public_name,
        "base_hash": source.base_hash,
        "method": source.record.get("method"),
        "adapter_hash": file_sha256(source.adapter / adapters.WEIGHTS),
        "template_hash": source.renderer.template_hash(),
    }


@contextmanager
def _steps() -> Iterator[Say]:
    """What is being done, on a terminal."""
    console = make_console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update
