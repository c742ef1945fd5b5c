"""`plan`: what a run would need, part by part, whether it fits into a card, and which settings would."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from lowrank_align.architecture import Architecture
from lowrank_align.config import METHODS, OnlineSettings, PlanSettings
from lowrank_align.errors import EXIT_DONE, EXIT_ENVIRONMENT, UserError, nearest
from lowrank_align.plan import (
    GIB,
    Plan,
    Prediction,
    Workload,
    as_flags,
    cards,
    fit,
    gib,
    parameters_in_words,
    rolls_out,
    size_bytes,
)
from lowrank_align.presets import Preset, read_preset
from lowrank_align.terminal import make_console, say

PAIRED = ("reward", "dpo", "condition")  # a row of theirs has two completions
LEARNED = {"online-dpo": 2, "expert": 1}  # so many answers of a group; others learn from all


def _roles(method: str) -> list[str]:
    """The adapters that lie in memory, the trained ones first."""
    kind = METHODS.get(method)
    if kind is None:
        return ["policy"]
    trained = ["policy", "value"][: kind.trained_adapters] if kind.speaks else ["reward model"]
    judge = ["reward model"] if issubclass(kind, OnlineSettings) else []
    return [*trained, *["reference"] * kind.has_reference, *judge]


def plan(settings: PlanSettings) -> int:
    """Print the plan; 0 where it fits as asked or no card is known, else 3."""
    preset = read_preset(settings.preset) if settings.preset else None
    architecture = _architecture(settings, preset)
    work = workload_of(settings, preset, architecture)
    budget = size_bytes(settings.gpu) if settings.gpu else _this_gpu()
    found = fit(architecture, work, budget) if budget else None
    if settings.as_json:
        say(json.dumps(_as_json(settings, architecture, work, found), indent=2))
    else:
        _print(settings, architecture, work, found, make_console())
    return EXIT_DONE if found is None or found.fits else EXIT_ENVIRONMENT


def workload_of(settings: PlanSettings, preset: Preset | None, architecture: Architecture) -> Workload:
    """The workload that is asked about: what is not given is the preset's, or the method's default.

    Without data nobody knows the rows: half of a training row is taken to be the prompt. Adapters are counted as in the
    second round: every method goes on from an adapter, whose frozen copy is the reference, and the reward is a run.
    """
    method = settings.method
    defaults = METHODS.get(method)
    knobs = {name: info.default for name, info in defaults.model_fields.items()} if defaults else {}
    knobs |= {"max_new_tokens": 512, "rollout_batch_size": 1} if method == "chat" else {}
    knobs |= preset.knobs(method) if preset else {}
    knobs |= {name: value for name, value in settings.model_dump().items() if value is not None}
    length = min(knobs.get("max_length") or 1024, architecture.max_position_embeddings)
    new_tokens = knobs.get("max_new_tokens") or 0 if rolls_out(method) else 0
    if new_tokens >= length:
        if settings.max_new_tokens or settings.max_length:
            raise UserError(f"max_new_tokens: {new_tokens} leaves no room for a prompt within max_length {length}")
        new_tokens = length // 2
    completion = new_tokens or length // 2
    group_size = (settings.completions or knobs.get("group_size") or 1) if rolls_out(method) else 1
    completions = settings.completions or (2 if method in PAIRED else 1)
    if rolls_out(method):
        completions = LEARNED.get(method, group_size)
    rows = knobs.get("micro_batch_size") or 1
    flat = architecture.needs_flat_rows or (preset is not None and preset.layout == "flat")
    return Workload(
        method=method,
        quantize=settings.quantize,
        dtype=settings.dtype,
        rank=knobs.get("rank") or 16,
        target_modules=_known_layers(knobs.get("target_modules") or (), architecture),
        lora_layers=_known_count(knobs.get("lora_layers"), architecture),
        micro_batch_size=rows,
        prompt_tokens=length - completion,
        completion_tokens=completion,
        completions=completions,
        group_size=group_size,
        max_new_tokens=new_tokens,
        rollout_batch_size=knobs.get("rollout_batch_size") or 1,
        gradient_checkpointing=bool(knobs.get("gradient_checkpointing")),
        optimizer=knobs.get("optimizer") or "adamw",
        adapters=len(_roles(method)),
        trained_adapters=defaults.trained_adapters if defaults else 0,
        layout="flat" if flat else "tree",
    )


def _known_layers(targets: Sequence[str], architecture: Architecture) -> tuple[str, ...]:
    """The last names of the layers to adapt; UserError for one that the model has not, as training has it."""
    known = sorted({layer.name for layer in architecture.linear_layers()})
    names = [target.rsplit(".", 1)[-1] for target in targets]
    for target, name in zip(targets, names, strict=True):
        if name not in known:
            raise UserError(
                f"target_modules: {target}: no such linear layer{nearest(name, known)} (there are: {', '.join(known)})"
            )
    return tuple(names)


def _known_count(lora_layers: int | None, architecture: Architecture) -> int | None:
    if lora_layers and lora_layers > architecture.num_hidden_layers:
        raise UserError(f"lora_layers: {lora_layers} are more than the model has ({architecture.num_hidden_layers})")
    return lora_layers


def _architecture(settings: PlanSettings, preset: Preset | None) -> Architecture:
    """The preset's figures, offline; those of the model's own config where there is none or another model is named."""
    if preset is not None and preset.architecture is not None and settings.model == preset.model:
        return preset.architecture
    from lowrank_align.loading import read_config
    from lowrank_align.skeleton import measure

    return measure(read_config(settings.model), settings.model)


def _this_gpu() -> int | None:
    """What a run may take on this machine's GPU now; None where torch finds none."""
    import torch

    from lowrank_align.preflight import budget_of

    return budget_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


# ---- what is printed


def _print(
    settings: PlanSettings, architecture: Architecture, work: Workload, found: Plan | None, console: Console
) -> None:
    plan_of = found or fit(architecture, work, 0)
    console.print(
        f"{_name(settings)}, {parameters_in_words(architecture.parameters)} parameters: {work.method}", markup=False
    )
    console.print(_in_words(work), markup=False)
    for note in _notes(settings, architecture, plan_of):
        console.print(note, markup=False)
    _print_table(_parts_table(plan_of.prediction), console)
    verdict = _verdict(found) if found else "No GPU here to fit into: --gpu 12GiB asks about one."
    console.print(f"\n{verdict}", markup=False)
    _print_table(_cards_table(architecture, work), console)
    if found is not None and found.budget_bytes >= 4 * GIB:
        rest = f"--gpu {found.budget_bytes // GIB - 1}GiB plans for the rest"
        console.print(f"A display on the same card takes up to 1 GiB of it: {rest}.", markup=False)


def _notes(settings: PlanSettings, architecture: Architecture, plan_of: Plan) -> list[str]:
    """What is planned otherwise than somebody may think."""
    found = []
    if (settings.max_length or 0) > architecture.max_position_embeddings:
        found.append(f"max_length {settings.max_length} is over the model's context; planned for its whole length")
    if plan_of.rough:
        found.append("rough: experts and recurrent layers keep more of a pass than is counted here")
    return found


def _print_table(table: Table, console: Console) -> None:
    """With a blank line before, and no blanks at the ends of lines."""
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    console.print("\n".join(["", *lines]), markup=False, soft_wrap=True)


def _name(settings: PlanSettings) -> str:
    """The preset's name, unless it stands beside another model."""
    if settings.preset is None:
        return settings.model
    of_the_preset = settings.model == read_preset(settings.preset).model
    return settings.preset if of_the_preset else f"{settings.model} with preset {settings.preset}"


def _in_words(work: Workload) -> str:
    base = {"nf4": "NF4", "int8": "int8", "none": work.dtype}[work.quantize]
    if work.method == "chat":
        return f"{base} base, one adapter of rank {work.rank}; answers of {work.max_new_tokens} tokens"
    answers = f"{work.completions} x " if work.completions > 1 else ""
    rows = f"prompt {work.prompt_tokens} + {answers}{work.completion_tokens} tokens"
    *first, last = _roles(work.method)
    adapters = f"{work.adapters} adapters ({', '.join(first)} and {last})" if first else "1 adapter"
    checkpointing = "checkpointed" if work.gradient_checkpointing else "not checkpointed"
    lines = [
        f"{base} base, computed in {work.dtype}; {adapters} of rank {work.rank}, {work.optimizer}",
        f"rows: {rows}; micro-batch {work.micro_batch_size}, {checkpointing}",
    ]
    if work.max_new_tokens:
        lines[-1] += f"; {work.rollout_batch_size} rollouts at once"
    return "\n".join(lines)


def _parts_table(prediction: Prediction) -> Table:
    unit, size = ("GiB", GIB) if prediction.total_bytes >= GIB else ("MiB", 2**20)
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{unit} at the peak of")
    for phase in prediction.phases:
        table.add_column(phase, justify="right")
    columns = [asdict(parts) for parts in prediction.phases.values()]
    for part in columns[0]:
        if any(column[part] for column in columns):
            table.add_row(part.replace("_", " "), *(f"{column[part] / size:.2f}" for column in columns))
    table.add_row("total", *(f"{parts.total / size:.2f}" for parts in prediction.phases.values()))
    return table


def _verdict(found: Plan) -> str:
    budget, needed = gib(found.budget_bytes), gib(found.prediction.total_bytes)
    if found.fits:
        spare = gib(found.budget_bytes - found.prediction.total_bytes)
        tight = " Tight: a plan is good to about a tenth." if found.is_tight else ""
        return f"Fits into {budget}: {needed}, {spare} to spare.{tight}"
    if found.chosen_prediction is None:
        least = gib(found.least_bytes)
        return f"Does not fit into {budget} ({needed}), nor with any settings ({least} at least): take a smaller model."
    fits = gib(found.chosen_prediction.total_bytes)
    return f"Does not fit into {budget} as asked ({needed}). This does ({fits}):\n  {as_flags(found.changes)}"


def _cards_table(architecture: Architecture, work: Workload) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("card", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("with")
    for size, found in cards(architecture, work).items():
        if found.chosen_prediction is None:
            table.add_row(f"{size} GiB", "no", gib(found.least_bytes), "the smallest settings: take a smaller model")
        else:
            verdict, needs = "tight" if found.is_tight else "yes", gib(found.chosen_prediction.total_bytes)
            table.add_row(f"{size} GiB", verdict, needs, as_flags(found.changes) or "the settings above")
    return table


def _as_json(settings: PlanSettings, architecture: Architecture, work: Workload, found: Plan | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "model": settings.model,
        "preset": settings.preset,
        "parameters": architecture.parameters,
        "workload": asdict(work),
        "prediction": _prediction_json((found or fit(architecture, work, 0)).prediction),
    }
    shown |= _plan_json(found) if found is not None else {"budget_bytes": None, "fits": None}
    shown["cards"] = {f"{size}GiB": _plan_json(of_card) for size, of_card in cards(architecture, work).items()}
    return shown


def _prediction_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "total_bytes": prediction.total_bytes,
        "allocated_bytes": prediction.allocated_bytes,
        "peak": prediction.peak,
        "phases": {name: asdict(parts) for name, parts in prediction.phases.items()},
    }


def _plan_json(found: Plan) -> dict[str, Any]:
    chosen = found.chosen_prediction
    return {
        "budget_bytes": found.budget_bytes,
        "fits": found.fits,
        "tight": found.is_tight,
        "rough": found.rough,
        "fits_with": None if chosen is None else found.changes,
        "fits_with_bytes": None if chosen is None else chosen.total_bytes,
    }
