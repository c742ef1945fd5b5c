"""Where an adapter comes from: the base, data, method and versions that made it, and the card that tells it to people.

An adapter fits only the base it was trained on, and nothing in its tensors shows that it sits on another one of the
same shape. `check_same_base` compares the base's weight files with those on record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

from lowrank_align.durable import write_atomic
from lowrank_align.errors import UserError
from lowrank_align.json_files import read_json

log = logging.getLogger(__name__)

FILE = "provenance.json"
HASH_CACHE = "weights_hash.json"
RACY_SECONDS = 2.0  # a file this fresh may change again within one tick of its clock: not cached
KINDS: dict[str, type] = dict.fromkeys(("base", "base_hash", "method", "template_hash", "adapter_hash"), str)
KINDS |= dict.fromkeys(("parent", "reward_hashes", "config", "versions"), dict)
PACKAGES = ("lowrank_align", "torch", "transformers", "peft", "bitsandbytes")
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")


@dataclass
class Provenance:
    """One run's record. Hashes are SHA-256 in hexadecimal; `parent` is {"run": path, "adapter_hash": hash}."""

    base: str
    base_hash: str
    method: str
    tokenizer_hash: str | None = None
    template_hash: str | None = None
    data_hash: str | None = None
    pretrain_hash: str | None = None  # of `pretrain_data`, where there is one
    parent: dict[str, str] | None = None
    adapter_hash: str | None = None
    answer_prefix: str | None = None  # the text that stands before every answer
    reward_hashes: dict[str, str] | None = None  # of the reward runs that it followed, by path
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=lambda: versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def write_provenance(path: Path, **fields: Any) -> Provenance:
    """Write `provenance.json` into the run's folder `path` from the fields of `Provenance`, less access tokens."""
    provenance = Provenance(**fields)
    provenance.config = _without_secrets(provenance.config)
    write_atomic(_file(path), json.dumps(asdict(provenance), indent=2, ensure_ascii=False) + "\n")
    return provenance


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The record of a run, given its folder or its `adapter/` folder; None where there is none."""
    file = _file(path)
    if not file.exists() and (path / "adapter_config.json").exists():
        file = _file(path.parent)
    if not file.exists():
        return None
    found = _read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object; restore it, or remove it to load a plain PEFT adapter")
    for key, value in found.items():
        if value is not None and not isinstance(value, KINDS.get(key, object)):
            raise UserError(f"{file}: {key}: not {'an object' if KINDS[key] is dict else 'a text'}; restore it")
    return found


def check_same_base(run: Path, base_id: str, base_hash: str) -> None:
    """Raise UserError, naming both bases, when the adapter in `run` was made for another base than this one.

    A plain PEFT adapter (no `provenance.json`) can only be checked by the name it gives, and not at all without one.
    """
    provenance = read_provenance(run)
    if provenance is not None:
        if provenance.get("base_hash") != base_hash:
            made_for = f"{provenance.get('base')} ({_short(provenance.get('base_hash'))})"
            raise UserError(
                f"{run}: made for {made_for}, not for {base_id} ({_short(base_hash)}); load it on its own base"
            )
        return
    file = next((f for f in (run / "adapter_config.json", run / "adapter" / "adapter_config.json") if f.exists()), None)
    config = _read_json(file) if file else None
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not named:
        log.info("%s: does not say which base it was made for; taken as made for %s", run, base_id)
    elif _last_part(named).lower() != _last_part(base_id).lower():
        raise UserError(
            f"{run}: made for {named}, not for {base_id}; "
            f"if those are the same weights, correct base_model_name_or_path in {file}"
        )
    elif named != base_id:
        log.info("%s: made for %s, taken to be the same weights as %s", run, named, base_id)


def weights_hash(model_folder: Path) -> str:
    """SHA-256 over the names and contents of a model's weight files: the same for one model however it is quantised
    at load. With an index, its shards and the index itself; else `model.safetensors`, else every `*.safetensors`.

    Each file's own hash is kept in the cache folder by absolute path, size and time of change.
    """
    return _lines_hash({file.name: _cached_sha256(file) for file in weight_files(Path(model_folder))})


def folder_sha256(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, in the order of the names: what `sha256sum FILES | sha256sum` prints."""
    return _lines_hash({file.name: file_sha256(file) for file in files})


def file_sha256(path: Path) -> str:
    """SHA-256 of one file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """`LOWRANK_ALIGN_CACHE`, or else `lowrank_align` in the platform's cache folder; not made here."""
    if chosen := os.environ.get("LOWRANK_ALIGN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        platform_cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        platform_cache = "~/Library/Caches"
    else:
        platform_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(platform_cache).expanduser() / "lowrank_align"


def versions() -> dict[str, str | None]:
    """Installed versions of what decides a run's numbers; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def model_card(provenance: Provenance | dict[str, Any], metrics: dict[str, float], name: str) -> str:
    """The run's `README.md`: the front matter that PEFT's cards have, how it was made, how to load it, its figures.

    `name` is the run folder's name. Paths are cut down to names, and access tokens left out: cards get published.
    """
    import yaml

    record = provenance if isinstance(provenance, dict) else asdict(provenance)
    base, method, is_reward = _public(record["base"]), record["method"], record["method"] == "reward"
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "tags": [f"base_model:adapter:{base}", "lora", "lowrank_align", method],
    }
    parent = record.get("parent")
    origin = f", starting from the adapter of `{_last_part(parent['run'])}`" if parent else ""
    knobs = {key: _public(value) for key, value in _without_secrets(record.get("config") or {}).items()}
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
            f"# {name}\n",
            f"LoRA adapter for `{base}`, trained with lowrank_align by `{method}`{origin}. {record['created'][:10]}\n",
            f"## Use\n\n```python\n{_loading_code(base, name, is_reward)}```\n",
            f"```\nlowrank-align {_command(base, name, is_reward)}\n```\n",
            *asked_behind(record.get("answer_prefix")),
            *_table("Metrics", "metric", "last value", {k: f"{v:.6g}" for k, v in metrics.items() if v is not None}),
            *_table("Configuration", "knob", "value", {k: v for k, v in knobs.items() if v is not None}),
            *_table("Versions", "package", "version", {k: v for k, v in record["versions"].items() if v}),
            f"SHA-256 of the base's weight files: `{record['base_hash']}`\n",
        ]
    )


def asked_behind(answer_prefix: str | None) -> list[str]:
    """A card's paragraph about the text before every answer; nothing where there is none."""
    if not answer_prefix:
        return []
    text = json.dumps(answer_prefix, ensure_ascii=False)
    return [
        f"It was trained with a text before every answer: `{text}`, behind the chat template's generation prompt or the"
        " plain prompt. lowrank-align puts it in by itself (`prompting.json`); with other programs, put it there.\n"
    ]


def for_publishing(value: Any) -> Any:
    """A value, as deep as it is nested, without this machine's folders and without access tokens."""
    return _public(_without_secrets(value))


def _loading_code(base: str, name: str, is_reward: bool) -> str:
    model_class = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    arguments = f'"{base}", num_labels=1' if is_reward else f'"{base}"'
    return (
        f"from peft import PeftModel\nfrom transformers import {model_class}\n\n"
        f"model = {model_class}.from_pretrained({arguments})\n"
        f'model = PeftModel.from_pretrained(model, "{name}/adapter")\n'
    )


def _command(base: str, name: str, is_reward: bool) -> str:
    task = "score --data rows.jsonl" if is_reward else "generate --prompts prompts.jsonl"
    return f"{task} --model {base} --adapter {name} --out out.jsonl"


def _table(title: str, left: str, right: str, rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"## {title}\n", f"| {left} | {right} |\n| --- | --- |", *lines, ""]


def _public(value: Any) -> Any:
    """A configuration value without the folders of this machine."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    value = SECRET_VALUE.sub("[removed]", value)
    if Path(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith(("~", "..")):
        return _last_part(value)
    return value.replace(str(Path.home()), "~")


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if not SECRET_KEY.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return SECRET_VALUE.sub("[removed]", value) if isinstance(value, str) else value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads, with their index; UserError where it names files elsewhere."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = _read_json(index)
        weight_map = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: holds no weight_map of file names; download the model again")
        shards = sorted(set(weight_map.values()))
        for name in shards:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{index}: names {name}, which is not in {folder}; download the model again")
        return [index, *(folder / name for name in shards)]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors; other weight formats are not read, convert the model first")
    return files


def _cached_sha256(file: Path) -> str:
    real = file.resolve()  # the hub's cache keeps links to blobs
    status, store = real.stat(), cache_folder() / HASH_CACHE
    key, stamp = str(real), [status.st_size, status.st_mtime_ns]
    known = _read_cache(store)
    entry = known.get(key)
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        return entry["sha256"]
    found = file_sha256(real)
    if time.time() - status.st_mtime > RACY_SECONDS:
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(store, json.dumps(_read_cache(store) | {key: {"stamp": stamp, "sha256": found}}, indent=0))
        except (OSError, UserError) as error:  # a cache that cannot be kept costs time only
            log.debug("weights hash not cached: %s", error)
    return found


def _read_cache(store: Path) -> dict[str, Any]:
    try:
        found = json.loads(store.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines_hash(hashes: dict[str, str]) -> str:
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def _file(path: Path) -> Path:
    return path if path.suffix == ".json" else path / FILE


def _read_json(file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); restore it or make it again") from error


def _last_part(name: str) -> str:
    return re.split(r"[\\/]", str(name).rstrip("\\/"))[-1]


def _short(digest: Any) -> str:
    return f"weights {str(digest)[:12]}" if digest else "weights unknown"
