"""Adapters on disk, in PEFT's own layout: `adapter_config.json` and `adapter_model.safetensors`.

A policy is a CAUSAL_LM adapter; a reward model is a SEQ_CLS adapter with its `score` head saved as a module, so that
`AutoModelForSequenceClassification(num_labels=1)` + `PeftModel` gives the same scores.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lowrank_align.durable import write_atomic, writing
from lowrank_align.errors import NumericError, UserError, nearest
from lowrank_align.json_files import read_json
from lowrank_align.links import stays
from lowrank_align.provenance import check_same_base, folder_sha256
from lowrank_align.skeleton import linear_layers

Kind = Literal["policy", "reward"]
WEIGHTS, CONFIG, REWARD = "adapter_model.safetensors", "adapter_config.json", "reward.json"
PROMPTING = "prompting.json"
LONGEST_PREFIX = 2000  # characters
# Settings of a LoRA that only say how large it is and where it sits. Any other changes the base, loads code, or is
# nothing that a policy or reward of ours has, and has to stand at its default.
TAKEN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_parameters", "modules_to_save", "auto_mapping"),  # the last two are refused by their own rule
}
PATTERNS = ("target_parameters", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
NAME = re.compile(r"\^?(\.\*\\?\.)?[\w.-]+\$?")  # PEFT takes these for regular expressions, and some of those never end
PREFIX = "base_model.model."
HEAD = "score.weight"
# PiSSA, OLoRA, LoftQ and their like rewrite the base's weights when they are put on it.
HARMLESS = {"bias": (None, "none"), "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}


@dataclass
class Saved:
    """An adapter as it lies on disk; tensors by PEFT's names without the prefix, a scalar head's among them."""

    folder: Path  # the run's folder where there is one, else the adapter's
    config: LoraConfig
    tensors: dict[str, Tensor]
    shift: float


def locate(start_from: str | Path, kind: Kind | None = None) -> Path:
    """The adapter folder of a run (`RUN/adapter`) or of plain PEFT; checked without reading the weights.

    `kind` refuses a reward run where a policy is expected, and the other way round.
    """
    given = Path(start_from).expanduser()
    folder = given / "adapter" if (given / "adapter" / CONFIG).is_file() else given
    if not folder.is_dir():
        beside = [path.name for path in given.parent.iterdir() if path.is_dir()] if given.parent.is_dir() else []
        raise UserError(f"{start_from}: no such run or adapter folder{nearest(given.name, beside)}")
    if not (folder / CONFIG).is_file():
        unfinished = " (an unfinished run? --resume it first)" if (given / "checkpoints").is_dir() else ""
        raise UserError(f"{start_from}: holds no {CONFIG}; give a run's folder or a PEFT adapter folder{unfinished}")
    if not (folder / WEIGHTS).is_file():
        other = " (only safetensors are read, never .bin)" if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{start_from}: holds no {WEIGHTS}{other}")
    for file in (folder / CONFIG, folder / WEIGHTS, run_of(folder) / PROMPTING, run_of(folder) / REWARD):
        if not stays(file, run_of(folder)):
            raise UserError(f"{file}: is a link that leads out of {run_of(folder)}; put the file itself there")
    found = _kind(folder)
    if kind is not None and found != kind:
        raise UserError(f"{start_from}: is a {found} run, where a {kind} is expected")
    return folder


def kind_of(start_from: str | Path) -> Kind:
    """Whether a run or adapter scores or speaks; UserError where it is none."""
    return _kind(locate(start_from))


def check_before_load(start_from: str | Path, kind: Kind | None, base_name: str, base_hash: str, config: Any) -> None:
    """Everything that can be known of an adapter without the base in memory; UserError where it does not fit.

    The base's layers come from its `config`, built without weights; of the adapter only the file's header is read.
    """
    folder = locate(start_from, kind)
    check_same_base(run_of(folder), base_name, base_hash)
    lora = _peft_config(folder)
    present = set(_shapes(folder))
    needed = {
        f"{name}.{part}.weight"
        for name in linear_layers(config)
        for part in ("lora_A", "lora_B")
        if check_target_module_exists(lora, name)
    }
    needed |= {HEAD} if lora.task_type == "SEQ_CLS" else set()
    if missing := sorted(needed - present):
        raise UserError(_incomplete(start_from, missing))


def check_targets(targets: list[str], config: Any) -> None:
    """UserError for the first name that no linear layer of the base has: PEFT passes over it while others match."""
    layers = linear_layers(config)
    for target in targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            last_names = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
            known = f"{nearest(target, last_names)} (there are: {', '.join(last_names)})"
            raise UserError(f"target_modules: {target}: no such linear layer{known}")


def check_layers(count: int, config: Any) -> None:
    """UserError where the base has fewer layers than are to be adapted."""
    there = config.get_text_config().num_hidden_layers
    if count > there:
        raise UserError(f"lora_layers: {count} are more than the model has ({there})")


def weights_sha256(start_from: str | Path) -> str:
    """The hash of an adapter's file, for `provenance.json`."""
    return folder_sha256([locate(start_from) / WEIGHTS])


def answer_prefix(start_from: str | Path | None) -> str:
    """The text that a run's method trained with before every answer, "" where there is none.

    It belongs before every answer that is asked for: `Renderer.with_prefix`. UserError where its file is damaged.
    """
    if start_from is None:
        return ""
    file = run_of(locate(start_from)) / PROMPTING
    if not file.is_file():
        return ""
    try:
        found = read_json(file)
        prefix = found["answer_prefix"]
        prefix.encode()  # half a surrogate pair, which JSON can hold and tokenizers refuse
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{file}: holds no text under answer_prefix; restore it from the run") from None
    if not isinstance(prefix, str) or len(prefix) > LONGEST_PREFIX:
        raise UserError(f"{file}: answer_prefix: not a text of at most {LONGEST_PREFIX} characters")
    return prefix


def write_prompting(run: Path, answer_prefix: str) -> None:
    """Write down beside the adapter what has to stand before every answer."""
    write_atomic(run / PROMPTING, json.dumps({"answer_prefix": answer_prefix}, ensure_ascii=False) + "\n")


def size_of(start_from: str | Path) -> dict[str, Any]:
    """An adapter's `rank`, `target_modules` (None where its config has a pattern) and `lora_layers`, as settings."""
    folder = locate(start_from)
    lora = _peft_config(folder)
    targets, places = read_config(folder)["target_modules"], lora.layers_to_transform
    return {
        "rank": lora.r,
        "target_modules": sorted(targets) if isinstance(targets, list) else None,
        "lora_layers": len(places) if isinstance(places, list) else None,
    }


def read(start_from: str | Path, base_name: str, base_hash: str) -> Saved:
    """Read an adapter made for this base; one made for another base, or damaged, is a UserError."""
    folder = locate(start_from)
    run = run_of(folder)
    check_same_base(run, base_name, base_hash)
    config = _peft_config(folder)
    try:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); the file is damaged") from error
    if config.task_type == "SEQ_CLS" and HEAD not in tensors:
        raise UserError(_incomplete(run, [HEAD]))
    return Saved(run, config, tensors, _shift(run / REWARD))


def copy_into(saved: Saved, parameters: dict[str, nn.Parameter]) -> None:
    """Copy every tensor into the freshly injected adapter; a missing, unknown or misshapen one is a UserError."""
    if missing := sorted(parameters.keys() - saved.tensors.keys()):
        raise UserError(_incomplete(saved.folder, missing))
    if unknown := sorted(saved.tensors.keys() - parameters.keys()):
        raise UserError(f"{saved.folder}: unknown tensor {unknown[0]}; the adapter is made for another architecture")
    for key, parameter in parameters.items():
        if saved.tensors[key].shape != parameter.shape:
            got, needed = tuple(saved.tensors[key].shape), tuple(parameter.shape)
            raise UserError(f"{saved.folder}: {key}: shape {got}, this base needs {needed}; made for another base")
        parameter.data.copy_(saved.tensors[key])


def write(
    folder: Path, config: LoraConfig, parameters: dict[str, nn.Parameter], *, base_name: str, as_reward: bool
) -> str:
    """Write an adapter (with its head, if it has one, also when it is no reward: a value model's) and read it back.

    Returns the SHA-256 of the weights file. NumericError where a weight is not finite; nothing is written then.
    """
    tensors = {PREFIX + key: p.detach().float().cpu().contiguous() for key, p in parameters.items()}
    broken = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise NumericError(f"{folder}: {broken} holds NaN or infinity; the adapter is not saved")
    saved = LoraConfig(**config.to_dict())
    saved.base_model_name_or_path, saved.inference_mode = base_name, True
    saved.task_type = "SEQ_CLS" if as_reward else "CAUSAL_LM"
    saved.modules_to_save = ["score"] if as_reward else None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = to_safetensors(tensors, metadata={"format": "pt"})
    write_atomic(folder / WEIGHTS, content)
    write_atomic(folder / CONFIG, json.dumps(saved.to_dict(), default=sorted, indent=2, sort_keys=True))
    again = load_file(folder / WEIGHTS)
    if again.keys() != tensors.keys() or any(not torch.equal(again[k], tensors[k]) for k in tensors):
        raise UserError(f"{folder / WEIGHTS}: reads back differently from what was written; check the disk")
    return hashlib.sha256(content).hexdigest()


def _kind(folder: Path) -> Kind:
    return "reward" if read_config(folder).get("task_type") == "SEQ_CLS" else "policy"


def _incomplete(folder: str | Path, missing: list[str]) -> str:
    what = f"{len(missing)} tensors missing (first: {missing[0]})"
    return f"{folder}: {what}; the adapter is incomplete, or made for another base"


def run_of(folder: Path) -> Path:
    """The run that an adapter's folder, as `locate` gives it, belongs to; a plain PEFT adapter is its own."""
    return folder.parent if folder.name == "adapter" else folder


def _shift(file: Path) -> float:
    """What is subtracted from a reward run's raw scores; 0 for anything else."""
    if not file.is_file():
        return 0.0
    try:
        shift = float(read_json(file)["shift"])
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        shift = math.nan
    if not math.isfinite(shift):
        raise UserError(f"{file}: holds no number under shift; restore it from the reward run")
    return shift


def _peft_config(folder: Path) -> LoraConfig:
    """The adapter's LoRA settings; what would load code or unknown modules, or change the base, is refused."""
    raw = read_config(folder)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{folder}: a {raw.get('peft_type')} adapter; only LoRA is supported")
    to_save = raw.get("modules_to_save")
    asked = sorted(set(to_save if isinstance(to_save, list) else []) - {"score"})
    asked += ["auto_mapping"] if raw.get("auto_mapping") else []
    for key, harmless in HARMLESS.items():
        if (value := raw.get(key)) not in harmless:
            asked.append(f"{key}={value}")
    fields = LoraConfig.__dataclass_fields__
    asked += [key for key, value in raw.items() if key in fields and key not in TAKEN and value not in _defaults(key)]
    for key in PATTERNS:
        value = raw.get(key)
        names = value if isinstance(value, list | dict) else [] if value is None else [value]
        asked += [f"{key} {name!r:.40}" for name in names if not (isinstance(name, str) and NAME.fullmatch(name))]
    if asked:
        raise UserError(f"{folder}: adapter_config.json asks for {', '.join(asked)}, which is not loaded")
    targets = raw.get("target_modules")
    named = isinstance(targets, str | list) and all(isinstance(target, str) for target in targets)
    if not targets or not named or type(raw.get("r")) is not int:
        raise UserError(f"{folder}: adapter_config.json has no target_modules, or no whole number as r (the rank)")
    for key in ("lora_alpha", "lora_dropout"):
        if not isinstance(raw.get(key, 0), int | float) or not math.isfinite(raw.get(key, 0)):  # type: ignore[arg-type]
            raise UserError(f"{folder}: adapter_config.json: {key}: {raw[key]!r:.40} is no number")
    known: dict[str, Any] = {k: v for k, v in raw.items() if k in fields}
    layers = {key.rsplit(".lora_A.", 1)[0]: shape for key, shape in _shapes(folder).items() if ".lora_A." in key}
    if isinstance(targets, str):  # a regular expression: which layers it meant, the tensors tell
        known["target_modules"] = sorted(layers)
    pattern = raw.get("rank_pattern")
    ranks = [raw["r"], *(pattern.values() if isinstance(pattern, dict) else [])]
    largest = max((shape[0] for shape in layers.values() if shape), default=0)
    if any(type(rank) is not int or not 0 < rank <= max(largest, 1) for rank in ranks):
        says = f"says rank {', '.join(f'{rank!r:.20}' for rank in ranks[:3])}, but its tensors have {largest}"
        raise UserError(f"{folder}: adapter_config.json {says}; one of the two is damaged")
    try:
        return LoraConfig(**known | {"modules_to_save": None, "init_lora_weights": True})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: adapter_config.json cannot be used: {error}") from error


def _defaults(key: str) -> list[Any]:
    """What a setting of PEFT's may be without asking for anything."""
    known = LoraConfig.__dataclass_fields__[key]
    default = known.default_factory() if callable(known.default_factory) else known.default
    return [None, False, {}, [], default]


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The tensors of an adapter by PEFT's names without the prefix, from the file's header alone."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return {key.removeprefix(PREFIX): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); the file is damaged") from error


def read_config(folder: Path) -> dict[str, object]:
    """An adapter's settings as they stand in its file; UserError where it is damaged."""
    try:
        config = read_json(folder / CONFIG)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: not a JSON object")
    return config
