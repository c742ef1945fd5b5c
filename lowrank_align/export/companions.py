"""What lies beside the weights: config, tokenizer, chat template, generation settings, licence, a reward's shift.

The base's own files are copied as they are, with few edits. In the form that the installed transformers would write
them, older readers (Ollama, vLLM with transformers 4) miss the position encoding's base and take 10,000 in silence.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_align import adapters, provenance
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.messages import Message
from lowrank_align.errors import UserError
from lowrank_align.export.source import NAMES, Source
from lowrank_align.json_files import read_json
from lowrank_align.links import stays
from lowrank_align.provenance import for_publishing

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "spiece.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template*",
)  # fmt: skip
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def write_companions(folder: Path, source: Source, dtype: Any = None, *, states_bos: bool = False) -> None:
    """Write everything but weights and README into `folder`; with `dtype` those of a whole model, else an adapter's.

    `states_bos` says in the tokenizer's settings whether it adds a BOS token, for readers that cannot try it.
    """
    for pattern in (*TOKENIZER_FILES, *LICENCES, *(() if source.renamed else PROCESSORS)):
        for file in source.base.glob(pattern):
            if file.is_file() and stays(file, source.base):  # exports get published
                shutil.copyfile(file, folder / file.name)  # not copy: the hub's cache is read-only
    if (templates := source.base / "additional_chat_templates").is_dir():
        inside = [file.name for file in templates.glob("*.jinja") if stays(file, source.base)]
        leave_out = shutil.ignore_patterns("*") if not inside else lambda _, names: set(names) - set(inside)
        shutil.copytree(templates, folder / templates.name, ignore=leave_out, copy_function=shutil.copyfile)
    _write_tokenizer_settings(folder, source, states_bos)
    if dtype is not None:
        _edit(folder / CONFIG, _model_config(source, _read(folder / CONFIG), dtype))
        if source.kind == "policy":
            _edit(folder / GENERATION, _generation(source))
    for name in (adapters.REWARD, adapters.PROMPTING):
        if (source.run / name).is_file():
            shutil.copyfile(source.run / name, folder / name)


def write_adapter(folder: Path, source: Source) -> None:
    """The adapter itself, byte by byte, with the base's public name and a record that names no folders."""
    shutil.copyfile(source.adapter / adapters.WEIGHTS, folder / adapters.WEIGHTS)
    config = _read(source.adapter / adapters.CONFIG)
    _edit(folder / adapters.CONFIG, config | {"base_model_name_or_path": source.public_name})
    if source.record:
        record = for_publishing(source.record)
        _edit(folder / provenance.FILE, record | {"base": source.public_name})


def classifier_pad(source: Source) -> int | None:
    """The token a classifier is padded with. It reads its score at the last token that is not this one, so an end
    token cannot serve: then another special token that texts do not use, or None (one text at a time)."""
    renderer = source.renderer
    tokenizer, ends = renderer.tokenizer, set(renderer.end_ids)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return int(tokenizer.pad_token_id)
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    free = {i: text for i, text in added.items() if i not in ends | {tokenizer.bos_token_id, tokenizer.unk_token_id}}
    named = [i for word in ("pad", "reserved", "unused") for i, text in sorted(free.items()) if word in text.lower()]
    return named[0] if named else None


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _model_config(source: Source, written: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The base's `config.json` with what the export changes, and positions in the older form beside the newer."""
    config = dict(written) if source.renamed else _read(source.base / CONFIG)
    config.pop("_name_or_path", None)  # a folder of whoever saved it
    name = LONG_NAMES[NAMES[dtype]]
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
            _state_positions(part)
    if "torch_dtype" not in config:
        config["dtype"] = name
    config["architectures"] = written["architectures"]
    if source.kind == "reward":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": written["pad_token_id"]}
    return config


def _state_positions(config: dict[str, Any]) -> None:
    """transformers 5 keeps the rotary settings in one entry, older readers look for them at the top."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get("full_attention"), dict):  # one set a kind of layer
        if "rope_theta" in (local := rope.get("sliding_attention") or {}):
            config.setdefault("rope_local_base_freq", local["rope_theta"])
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}


def _generation(source: Source) -> dict[str, Any]:
    """The base's generation settings, which stop where our rollouts do and at what else the base stops at."""
    file = source.base / GENERATION
    found = _read(file) if file.is_file() and stays(file, source.base) else {}
    if found.pop("_from_model_config", False):  # else transformers reads config.json in this file's place
        found = {key: value for key, value in found.items() if key.endswith("_token_id")}
    own = found.get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    ends = list(dict.fromkeys([*source.renderer.end_ids, *own]))
    bos = source.renderer.tokenizer.bos_token_id
    if bos is not None:
        found.setdefault("bos_token_id", bos)
    return found | {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": source.renderer.pad_id}


def _write_tokenizer_settings(folder: Path, source: Source, states_bos: bool) -> None:
    """The template that was trained with, where it is not the tokenizer's own, and a classifier's pad token.

    A template that leaves out the BOS token which the tokenizer adds to texts gets it: training put it there too.
    """
    renderer, tokenizer = source.renderer, source.renderer.tokenizer
    file = folder / TOKENIZER
    settings = _read(file) if file.is_file() else {}
    before = dict(settings)
    opening = "{{- bos_token }}" if _lacks_bos(source) else ""
    if opening or renderer.answer_prefix or renderer.template_source != "the model's own":
        text = opening + _asking_behind(renderer.template.text, renderer.answer_prefix)
        (folder / TEMPLATE).write_text(text, encoding="utf-8")
        if "chat_template" in settings:
            settings["chat_template"] = text
    pad = classifier_pad(source) if source.kind == "reward" else None
    if pad is not None and pad != tokenizer.pad_token_id:
        settings["pad_token"] = tokenizer.convert_ids_to_tokens(pad)
    if states_bos:
        settings["add_bos_token"] = adds_bos(tokenizer)
    if settings != before:
        _edit(file, settings)


def prefix_notes(source: Source) -> list[str]:
    """What a user of the export should know about the text before every answer, if there is one."""
    renderer = source.renderer
    if not renderer.answer_prefix:
        return []
    text = json.dumps(renderer.answer_prefix, ensure_ascii=False)
    notes = [f"answers stand behind {text}: the chat template ends with it; behind a plain prompt, put it there"]
    asked = [Message(role="user", content="?")]
    whole = renderer.template.render(asked, {}, open_turn=True) + renderer.answer_prefix
    ids = renderer.prompt_ids(Row(Shape.prompts, asked, [], where="export"))
    bos = adds_bos(renderer.tokenizer) and not whole.startswith(renderer.tokenizer.bos_token)
    found = renderer.plain_ids(whole)
    if ids != ([renderer.tokenizer.bos_token_id] if bos else []) + found:
        notes.append("other programs cut the text before the answer into other tokens than training did")
    return notes


def _asking_behind(template: str, prefix: str) -> str:
    """A chat template that writes `prefix` behind its generation prompt; Jinja reads a text as JSON writes it."""
    if not prefix:
        return template
    text = json.dumps(prefix, ensure_ascii=False)
    return template.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + text + " }}{% endif %}"


def _lacks_bos(source: Source) -> bool:
    tokenizer = source.renderer.tokenizer
    trial = source.renderer.template.render([Message(role="user", content="?")], {}, open_turn=True)
    return adds_bos(tokenizer) and not trial.startswith(tokenizer.bos_token)


def _edit(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file)
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object")
    return found
