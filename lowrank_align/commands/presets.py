"""The presets: listed, or one of them as a page."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from lowrank_align.architecture import Architecture
from lowrank_align.config import PresetsSettings
from lowrank_align.errors import UserError
from lowrank_align.plan import GIB, NF4_BYTES
from lowrank_align.presets import (
    Checkable,
    Preset,
    header,
    own_folder,
    preset_files,
    project_files,
    read_preset,
    read_preset_file,
)
from lowrank_align.terminal import make_console, say

KEPT_BYTES = 2  # of a weight that quantisation leaves alone, in 16 bits
LEFT = 45  # columns for a name or a hub id
UNTOLD: tuple[Checkable, ...] = ("licence", "gated")  # what of a preset no file of the model tells


def presets(settings: PresetsSettings) -> None:
    """Print the list, or with a name that preset; with `as_json` as JSON."""
    if settings.name is not None:
        preset = read_preset(settings.name)
        if settings.as_json:
            _print_json(_as_json(preset))
        else:
            _page(preset, make_console())
        return
    found, broken = _all()
    if settings.as_json:
        problems = [{"file": str(file), "problem": problem} for file, problem in broken.items()]
        _print_json({"presets": [_as_json(preset) for preset in found], "broken": problems})
    else:
        _list(found, broken, make_console())


def nf4_bytes(architecture: Architecture) -> float:
    """What the weights take in NF4: the linear layers packed, everything else in 16 bits."""
    linear = sum(layer.parameters for layer in architecture.linear_layers())
    return linear * NF4_BYTES + (architecture.parameters - linear) * KEPT_BYTES


def _all() -> tuple[list[Preset], dict[Path, str]]:
    """Those that can be read, and what is wrong with the other files."""
    found, broken = [], {}
    for file in preset_files().values():
        try:
            found.append(read_preset_file(file))
        except (UserError, OSError) as error:
            broken[file] = str(error)
    return found, broken


# ---- the list


def _list(found: list[Preset], broken: Mapping[Path, str], console: Console) -> None:
    """Two lines a preset, 80 columns wide: no hub id has to be broken."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    ours = project_files()
    say(f"{'preset':<{LEFT}}{'weights':>7}{'NF4 GiB':>9}  {'licence':<10} access")
    say(f"{'  model':<{LEFT}}  ?: not verified\n")
    for preset in sorted(found, key=_by_size):
        figures = preset.architecture
        sizes = (_count(figures.parameters), f"{nf4_bytes(figures) / GIB:.2f}") if figures else ("?", "?")
        mark = "*" if figures and figures.num_experts else " "
        name = f"{preset.name}{_whose(preset, ours)}"
        say(f"{name:<{LEFT}}{sizes[0]:>7}{sizes[1]:>9}{mark} {_short(preset.licence):<10} {_access(preset)}")
        doubtful = " ".join(f"{what}?" for what in preset.unverified if what != "gated")  # the column says it
        say(f"  {preset.model:<{LEFT - 2}}  {doubtful}".rstrip())
    if broken:
        say("")
    for problem in broken.values():
        say(f"not usable: {problem}")
    own = own_folder()
    say(f"\n{len(found)} presets. `lowrank-align presets NAME` shows one, --preset NAME takes it.")
    for names, truth in _unverified(get_args(Checkable)):
        say(f"{names.replace('gated', 'open, gated').replace(',', '?,')}?: {truth}.")
    if any(preset.architecture and preset.architecture.num_experts for preset in found):
        say("*: experts, which no quantisation packs: they stay in 16 bits.")
    say(f"Your own are read from {own}{'' if own.is_dir() else ' (not there yet)'}")


def _by_size(preset: Preset) -> list[tuple[str, float]]:
    """qwen3-8b before qwen3-14b, smollm2-135m before smollm2-1.7b."""
    parts = re.findall(r"([^\d]*)(\d+(?:\.\d+)?)(m\b)?", preset.name)
    return [(text, float(number) / (1000 if millions else 1)) for text, number, millions in parts] or [(preset.name, 0)]


def _whose(preset: Preset, ours: Mapping[str, Path]) -> str:
    if not preset.own:
        return ""
    return " (yours, for the project's)" if preset.name in ours else " (yours)"


def _access(preset: Preset) -> str:
    if preset.gated is None:
        return "?"
    return ("gated" if preset.gated else "open") + "?" * ("gated" in preset.unverified)


def _short(licence: str | None) -> str:
    """`Llama 3.2 Community License` is too long for a column."""
    return "?" if licence is None else licence.replace(" Community License", "").replace(" Terms of Use", "")


def _count(parameters: int) -> str:
    if parameters < 10**6:
        return f"{parameters / 1e3:.0f}K"
    return f"{parameters / 1e6:.0f}M" if parameters < 999_500_000 else f"{parameters / 1e9:.2f}B"


# ---- one of them


def _page(preset: Preset, console: Console) -> None:
    """The file's own first lines (what it is, the commands), then what it states."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)  # a command is one line, however long

    def say_under(name: str, text: str) -> None:
        indent = " " * (len(name) + 1)
        say(textwrap.fill(f"{name} {text}", console.width, subsequent_indent=indent, break_on_hyphens=False))

    whose = " (yours, in place of the project's)" if preset.own and preset.name in project_files() else ""
    say(f"{preset.name}: {preset.model}{whose}\n{preset.file}")
    if lines := header(preset.file):
        say("\n" + "\n".join(lines).strip("\n"))
    say("\nThe model")
    for name, text in _facts(preset).items():
        say_under(f"  {name:<14}", text)
    say("\nSettings")
    for name, values in ({"every command": preset.settings} | preset.methods).items():
        shown = "; ".join(f"{key} {_shown(value)}" for key, value in values.items())
        say_under(f"  {name:<14}", shown or "the defaults")
    if preset.notes:
        say("\nNotes")
    for note in preset.notes:
        say_under("  -", note)
    if preset.unverified:
        say("")
    for names, truth in _unverified(preset.unverified):
        say_under("Unverified:", f"{names}; {truth}.")


def _unverified(names: Sequence[Checkable]) -> Iterator[tuple[str, str]]:
    """The names that a preset could not verify, and where the truth is to be found."""
    told = [name for name in names if name not in UNTOLD]
    untold = [name for name in names if name in UNTOLD]
    if told:
        yield ", ".join(told), "compared with the model whenever it is loaded"
    if untold:
        yield ", ".join(untold), "only its page on the hub says it"


def _facts(preset: Preset) -> dict[str, str]:
    doubtful = {name: " (unverified)" if name in preset.unverified else "" for name in ("licence", "gated", "tokens")}
    access = {True: "gated: accept the licence on its page, then `hf auth login`", False: "open", None: "not known"}
    found = {
        "licence": f"{preset.licence or 'not known'}{doubtful['licence']}",
        "access": f"{access[preset.gated]}{doubtful['gated']}",
    }
    if figures := preset.architecture:
        found |= _figures(figures)
    found["rows"] = "flat (layers with a recurrent state)" if preset.layout == "flat" else "trees"
    tokens = preset.tokens
    found["tokens"] = f"end of turn {tokens.end_of_turn or '?'}, pad {tokens.pad or '?'}{doubtful['tokens']}"
    switch = {None: "no switch", True: "on (--no-thinking turns it off)", False: "off (--thinking turns it on)"}
    return found | {"thinking": switch[preset.thinking]}


def _figures(a: Architecture) -> dict[str, str]:
    window = f", {a.sliding_layers} of them with a window of {a.sliding_window}" if a.sliding_layers else ""
    recurrent = f", {a.recurrent_layers} of them recurrent" if a.recurrent_layers else ""
    experts = f", {a.num_experts} experts ({a.num_experts_per_tok} a token)" if a.num_experts else ""
    tied = "tied" if a.tie_word_embeddings else "not tied"
    return {
        "size": f"{a.parameters:,} weights, {nf4_bytes(a) / GIB:.2f} GiB in NF4",
        "layers": f"{a.num_hidden_layers}{window}{recurrent}{experts}",
        "width": f"{a.hidden_size}, {a.intermediate_size} inside",
        "heads": f"{a.num_attention_heads} of {a.head_dim}, {a.num_key_value_heads} for keys and values",
        "vocabulary": f"{a.vocab_size:,}, head {tied} to the embeddings",
        "context": f"{a.max_position_embeddings:,} tokens",
        "family": a.model_type,
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"


# ---- for machines


def _as_json(preset: Preset) -> dict[str, Any]:
    figures = preset.architecture
    sizes = {"parameters": figures.parameters, "nf4_bytes": round(nf4_bytes(figures))} if figures else {}
    return {"name": preset.name, "file": str(preset.file), "own": preset.own, **preset.model_dump(mode="json"), **sizes}


def _print_json(value: Any) -> None:
    say(json.dumps(value, ensure_ascii=False, indent=2))
