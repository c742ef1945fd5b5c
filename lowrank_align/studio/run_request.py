"""What the page asks of a run, turned into the settings that `train` takes.

The page names voices and views; only this module makes paths of them. Text from the page sets numbers and choices,
never a file, a model, code or a tracker.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from lowrank_align.config import METHODS, TrainSettings, parse_yaml, resolve
from lowrank_align.config.knobs import kinds
from lowrank_align.errors import UserError, nearest
from lowrank_align.presets import preset_files, read_preset
from lowrank_align.studio.voices import BASE, LIVE

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

KNOBS = (
    "epochs",
    "max_steps",
    "learning_rate",
    "beta",
    "kl_coefficient",
    "group_size",
    "batch_size",
)  # those with a field of their own
OF_THE_STUDIO = ("preset", "device", "dtype", "attention", "chat_template", "thinking")  # a run takes them over
OF_THE_BASE = ("quantize", "dtype", "attention")
OF_THE_PAGE = ("resume", "overwrite")
ALSO_SET = ("target_modules", "loss_weights", "reward_weights")
LOSS = "loss"  # chosen from a list of its own
MORE = "more settings"  # what the page calls the YAML
LONGEST_YAML, LONGEST_NAME = 20_000, 60
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SAMPLES_A_RUN, SAVES_A_RUN = 5, 4  # at least so many, however short the run


@dataclass(frozen=True)
class View:
    """A part of the store: one annotator's, those with a tag, or everything."""

    annotator: str | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Request:
    """A run as the page asks for it."""

    method: str
    name: str
    data: View | Path = View()
    start: str = BASE  # the voice it starts from
    reward: str | None = None  # the reward run to follow, for methods that follow one
    loss: str | None = None  # for methods that have several; None: the default
    knobs: Mapping[str, float | int | None] = field(default_factory=dict)
    more: str = ""  # YAML


@dataclass(frozen=True)
class Knob:
    """One number with a field of its own; None: not set."""

    name: str
    value: float | int | None
    whole: bool
    doc: str


def knobs_of(studio: "Studio", method: str) -> list[Knob]:
    """The method's few numbers that matter, with the values of the model's preset, else the defaults."""
    fields = METHODS[method].model_fields
    preset = preset_of(studio)
    given = read_preset(preset).knobs(method) if preset else {}
    found = []
    for name in KNOBS:
        if name in fields:
            info = fields[name]
            value = given.get(name, info.default)
            found.append(Knob(name, value, float not in kinds(info.annotation), info.description or ""))
    return found


def all_settings(method: str) -> list[tuple[str, str, str]]:
    """(name, default, what it is) of everything that the YAML may set."""
    fields = METHODS[method].model_fields
    names = [name for name in fields if name not in KNOBS and _refused(name, METHODS[method]) is None]
    return [(name, _shown(fields[name].default), " ".join((fields[name].description or "").split())) for name in names]


def follows_reward(method: str) -> bool:
    """Whether the method needs a reward run."""
    return "reward" in METHODS[method].model_fields


def losses_of(method: str) -> list[str]:
    """The losses that the method can take, its default first; empty where it has no choice."""
    info = METHODS[method].model_fields.get(LOSS)
    if info is None:
        return []
    default = info.default[0] if isinstance(info.default, list) else info.default
    annotation = get_args(info.annotation)[0] if isinstance(info.default, list) else info.annotation
    return [default, *(name for name in get_args(annotation) if name != default)]


def preset_of(studio: "Studio") -> str | None:
    """The studio's preset, else the one that was written for its model; None where there is none."""
    if studio.settings.preset:
        return str(studio.settings.preset)
    name = Path(studio.base.name).name.lower()
    if name in preset_files() and read_preset(name).model.rsplit("/", 1)[-1].lower() == name:
        return name
    return None


def settings_of(studio: "Studio", request: Request, rows: Path, count: int) -> TrainSettings:
    """The settings of a run on `count` rows in the file `rows`. UserError for what is wrong or not to be asked."""
    kind = method_settings(request.method)
    more = _read_more(request.more, kind)
    given: dict[str, Any] = {"model": studio.base.name, "quantize": studio.base.quantize, "preset": preset_of(studio)}
    given |= {name: getattr(studio.settings, name, None) for name in OF_THE_STUDIO if name != "preset"}
    if "max_length" in studio.settings.model_fields_set:
        given["max_length"] = studio.settings.max_length
    given |= {"out": str(studio.runs / request.name), kind.rows_field: str(rows), "adapter": _run_of(studio, request)}
    if follows_reward(request.method):
        given["reward"] = _reward_of(studio, request)
    if request.loss and losses_of(request.method):
        given[LOSS] = request.loss
    given |= {name: value for name, value in request.knobs.items() if name in kind.model_fields and value is not None}
    given |= more
    if "auto" not in more and "force" not in more:
        given["auto"] = True
    settings = resolve(kind, given)
    steps = steps_of(settings, count)
    few = {"sample_steps": max(1, steps // SAMPLES_A_RUN), "save_steps": max(1, steps // SAVES_A_RUN)}
    closer = {name: value for name, value in few.items() if name not in more and value < getattr(settings, name)}
    return resolve(kind, given | closer)


def method_settings(method: str) -> type[TrainSettings]:
    """The settings' class; UserError where there is no such method."""
    if method not in METHODS:
        raise UserError(f"{method}: no such method{nearest(str(method), METHODS)} (there are: {', '.join(METHODS)})")
    return METHODS[method]


def steps_of(settings: TrainSettings, count: int) -> int:
    """How many steps a run on `count` rows has."""
    if settings.max_steps is not None:
        return settings.max_steps
    return -(-max(1, round(settings.epochs * count)) // settings.batch_size)


def check_name(name: str) -> str:
    """The name of a run's folder, stripped; UserError where it could be anything else than a plain name."""
    name = name.strip()
    if not name:
        raise UserError("the run needs a name; type one, as dpo-1")
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name) or name.endswith("."):
        raise UserError(f"{name[:LONGEST_NAME]}: no name for a run; use letters, digits, dots, - and _ (as dpo-1)")
    if name in (BASE, LIVE):
        raise UserError(f"{name}: means the bare model here; choose another name")
    return name


def _run_of(studio: "Studio", request: Request) -> str | None:
    if request.start in (BASE, "", None):
        return None
    run = studio.voices.run_of(request.start)
    if run is None:
        known = [name for name in studio.voices.names() if name != LIVE]
        raise UserError(f"{request.start}: no adapter to start from{nearest(request.start, known)}; choose one listed")
    return str(run)


def _reward_of(studio: "Studio", request: Request) -> str:
    known = studio.voices.rewards()
    if not known:
        raise UserError(f"no reward model yet, and {request.method} follows one; train it first (method reward)")
    chosen = request.reward or (known[0] if len(known) == 1 else None)
    if not chosen:
        raise UserError(f"choose a reward model for {request.method} to follow")
    run = studio.voices.run_of(chosen)
    if run is None or chosen not in known:
        raise UserError(f"{chosen}: no reward run{nearest(chosen, known)}; choose one listed")
    return str(run)


def _read_more(text: str, kind: type[TrainSettings]) -> dict[str, Any]:
    if len(text) > LONGEST_YAML:
        raise UserError(f"{MORE}: over {LONGEST_YAML} characters; a configuration is a few lines")
    given = parse_yaml(text, MORE) if text.strip() else {}
    for name in given:
        if name not in kind.model_fields:
            raise UserError(f"{MORE}: {name}: unknown setting{nearest(name, kind.model_fields)}")
        if problem := _refused(name, kind):
            raise UserError(f"{MORE}: {name}: {problem}")
    return given


def _refused(name: str, kind: type[TrainSettings]) -> str | None:
    """Why the page's YAML may not set a setting; None where it may."""
    if name in (*KNOBS, LOSS):
        return "has a field of its own above; set it there"
    if name in OF_THE_BASE:
        return "is the base's, which is loaded already; start the studio with it"
    if name in OF_THE_PAGE:
        return "is not set by hand here; take a new name, or resume a run from the list"
    if name in ALSO_SET:
        return None
    types = kinds(kind.model_fields[name].annotation)
    if all(one in (int, float, bool) or get_origin(one) is Literal for one in types):
        return None
    return "names a file, a place or a program; it is chosen above, or on the command line"


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
