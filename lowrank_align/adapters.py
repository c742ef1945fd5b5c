"""Adapters on disk, in PEFT's own layout: `adapter_config.json` and `adapter_model.safetensors`.

A policy is a CAUSAL_LM adapter; a reward model is a SEQ_CLS adapter with its `score` head saved as a module, so that
`AutoModelForSequenceClassification(num_labels=1)` + `PeftModel` gives the same scores.
"""

import hashlib
import json
import math
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

from lowrank_align.checkpoint import write_atomic, writing
from lowrank_align.errors import NumericError, UserError, nearest
from lowrank_align.provenance import check_same_base, folder_sha256
from lowrank_align.skeleton import linear_layers

Kind = Literal["policy", "reward"]
WEIGHTS, CONFIG, REWARD = "adapter_model.safetensors", "adapter_config.json", "reward.json"
PROMPTING = "prompting.json"
LONGEST_PREFIX = 2000  # characters
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
    needed = {
        f"{name}.{part}.weight"
        for name in linear_layers(config)
        for part in ("lora_A", "lora_B")
        if check_target_module_exists(lora, name)
    }
    needed |= {HEAD} if lora.task_type == "SEQ_CLS" else set()
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            present = {key.removeprefix(PREFIX) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); the file is damaged") from error
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
        found = json.loads(file.read_text(encoding="utf-8"))
        prefix = found["answer_prefix"]
        prefix.encode()  # half a surrogate pair, which JSON can hold and tokenizers refuse
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise UserError(f"{file}: holds no text under answer_prefix; restore it from the run") from None
    if not isinstance(prefix, str) or len(prefix) > LONGEST_PREFIX:
        raise UserError(f"{file}: answer_prefix: not a text of at most {LONGEST_PREFIX} characters")
    return prefix


def write_prompting(run: Path, answer_prefix: str) -> None:
    """Write down beside the adapter what has to stand before every answer."""
    write_atomic(run / PROMPTING, json.dumps({"answer_prefix": answer_prefix}, ensure_ascii=False) + "\n")


def size_of(start_from: str | Path) -> dict[str, Any]:
    """An adapter's `rank`, `target_modules` (None where its config has a pattern) and `lora_layers`, as settings."""
    lora = _peft_config(locate(start_from))
    targets, places = lora.target_modules, lora.layers_to_transform
    return {
        "rank": lora.r,
        "target_modules": sorted(targets) if isinstance(targets, set | list) else None,
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
    with writing(folder / CONFIG):
        saved.save_pretrained(str(folder))
    again = load_file(folder / WEIGHTS)
    if again.keys() != tensors.keys() or any(not torch.equal(again[k], tensors[k]) for k in tensors):
        raise UserError(f"{folder / WEIGHTS}: reads back differently from what was written; check the disk")
    return hashlib.sha256(content).hexdigest()


def _kind(folder: Path) -> Kind:
    return "reward" if _read_config(folder).get("task_type") == "SEQ_CLS" else "policy"


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
        shift = float(json.loads(file.read_text(encoding="utf-8"))["shift"])
    except (ValueError, KeyError, TypeError):
        shift = math.nan
    if not math.isfinite(shift):
        raise UserError(f"{file}: holds no number under shift; restore it from the reward run")
    return shift


def _peft_config(folder: Path) -> LoraConfig:
    """The adapter's LoRA settings; what would load code or unknown modules, or change the base, is refused."""
    raw = _read_config(folder)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{folder}: a {raw.get('peft_type')} adapter; only LoRA is supported")
    to_save = raw.get("modules_to_save")
    asked = sorted(set(to_save if isinstance(to_save, list) else []) - {"score"})
    asked += ["auto_mapping"] if raw.get("auto_mapping") else []
    for key, harmless in HARMLESS.items():
        if (value := raw.get(key)) not in harmless:
            asked.append(f"{key}={value}")
    if asked:
        raise UserError(f"{folder}: adapter_config.json asks for {', '.join(asked)}, which is not loaded")
    if not raw.get("target_modules") or not isinstance(raw.get("r"), int):
        raise UserError(f"{folder}: adapter_config.json has no target_modules, or no whole number as r (the rank)")
    known: dict[str, Any] = {k: v for k, v in raw.items() if k in LoraConfig.__dataclass_fields__}
    try:
        return LoraConfig(**known | {"modules_to_save": None, "init_lora_weights": True})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: adapter_config.json cannot be used: {error}") from error


def _read_config(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: not a JSON object")
    return config
