"""The export's README: what it is, how to load it, how it was made, and how near it is to what was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowrank_align.adapters import WEIGHTS
from lowrank_align.config import METHODS
from lowrank_align.config.resolve import OF_THE_MOMENT
from lowrank_align.export.companions import classifier_pad
from lowrank_align.export.source import HUB_ID, NAMES, Source
from lowrank_align.provenance import file_sha256, for_publishing

GGUF = "model.gguf"
# Settings that name places of one machine; `quantize` and the base stand in the table above.
_PLACES = {"model", "adapter", "out", "quantize"}
_ROWS = {"data", "prompts", "eval_data"}
_SHIFT = (
    "Scores are raw: subtract `shift` in `reward.json` where their zero matters. A head of a classifier has no bias.\n"
)


def card(
    source: Source, name: str, to: str, dtype: Any, report: Mapping[str, Any], notes: list[str], licence: str | None
) -> str:
    """The model card. `report` is `parity.json`, `notes` what a user should know, a sentence each."""
    base, method = source.public_name, source.record.get("method")
    reward = source.kind == "reward"
    front: dict[str, Any] = {
        **({"license": licence.lower()} if licence else {}),
        **({"base_model": source.hub_id} if source.hub_id else {}),  # the hub makes a link of it
        "library_name": "peft" if to == "adapter" else "gguf" if to == "gguf" else "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": ["lowrank_align", *([method] if method else [])],
    }
    if source.hub_id:
        front["tags"].insert(0, f"base_model:{'adapter' if to == 'adapter' else 'finetune'}:{source.hub_id}")
    what = "LoRA adapter for" if to == "adapter" else "LoRA adapter merged into"
    trained = f", trained with lowrank_align by `{method}`" if method else ""
    weights = f" Weights in {NAMES[dtype]}." if to != "adapter" else ""
    adapter = source.adapter / WEIGHTS
    made = {
        "base": base,
        "base's weight files (SHA-256)": source.base_hash,
        "adapter (SHA-256)": file_sha256(adapter),
        "trained on": source.trained_with,
        "chat template (SHA-256)": source.renderer.template_hash(),
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
            f"# {name}\n",
            f"{what} `{base}`{trained}.{weights}\n",
            f"## Use\n\n{_use(source, name, to)}\n",
            *([_SHIFT] if reward else []),
            *([*(f"- {note}" for note in notes), ""] if notes else []),
            "## How near it is to what was trained\n",
            *(f"- {line}" for line in report.get("summary", [])),
            "",
            *_table("How it was made", {key: f"`{value}`" for key, value in made.items() if value}),
            *_training(source),
        ]
    )


def _use(source: Source, name: str, to: str) -> str:
    base, reward = source.public_name, source.kind == "reward"
    kind = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    imports = f"from transformers import AutoTokenizer, {kind}\n"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    if to == "ollama":
        return f"```\nollama create {name.lower()} -f Modelfile\nollama run {name.lower()}\n```"
    if to == "gguf":
        return f"```\nllama-cli -m {GGUF} -cnv\nollama create {name.lower()} -f Modelfile\n```"
    if to == "adapter":
        pad = classifier_pad(source) if reward else None
        classes = f", num_labels=1, pad_token_id={pad}" if reward else ""
        load = f'model = {kind}.from_pretrained("{base}"{classes})\n'
        load += f'model = PeftModel.from_pretrained(model, "{name}")\n'
        return f"```python\nfrom peft import PeftModel\n{imports}\n{tokenizer}{load}```"
    return f'```python\n{imports}\n{tokenizer}model = {kind}.from_pretrained("{name}")\n```'


def _training(source: Source) -> list[str]:
    """The settings that differ from the method's defaults."""
    method, config = source.record.get("method"), source.record.get("config")
    if not config or method not in METHODS:
        return []
    fields = METHODS[method].model_fields
    unused = _PLACES | OF_THE_MOMENT
    knobs = {
        key: value
        for key, value in config.items()
        if key in fields
        and key not in unused
        and value not in (None, fields[key].default)
        and not any(_is_place(key, one) for one in (value if isinstance(value, list) else [value]))
    }
    knobs = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in knobs.items()}
    if not knobs:
        return [f"## Training\n\nWith the default settings of `{method}`.\n"]
    return _table("Training: what differs from the defaults", for_publishing(knobs))


def _is_place(key: str, value: Any) -> bool:
    """Whether a setting's value is a file or folder: of no use to others, unlike a name, a hub id or a function's."""
    if not isinstance(value, str):
        return False
    if key in _ROWS:
        is_file = Path(value).suffix in (".jsonl", ".json", ".parquet", ".gz")
        return is_file or not HUB_ID.fullmatch(value) or Path(value).exists()
    if key == "reward":
        return ":" not in value or any(mark in value for mark in "/\\")
    return any(mark in value for mark in "/\\") or Path(value).suffix in (".yaml", ".yml", ".jinja")


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"## {title}\n", "| | |\n| --- | --- |", *lines, ""]
