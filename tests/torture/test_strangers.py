"""Files made to attack: none runs code, none reads or writes outside its folder, none works the terminal, none is endless.

Every entry of `ATTACKS` writes one and gives the command that a user would run on it. Whatever comes of it, an audit hook
of the interpreter has seen no code started, no connection and no file outside opened.
"""
# ruff: noqa: E501 -- messages and templates are long lines

import io
import json
import os
import pickle
import re
import shutil
import sqlite3
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

Command = Callable[..., Any]

SECTION = "Strangers' files"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SECRET = "do-not-read-me-7c1f"
BAD = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eABC\x7f\r"
ROW = {"prompt": "Say: ", "completion": "a word"}
PAIR = {"prompt": "Say: ", "chosen": "a word", "rejected": "no"}
CODE = "open({canary!r}, 'w').write('ran')\n"


class World(NamedTuple):
    """Where an attack is prepared: `here` is the current folder, `outside` holds what must not be read or changed."""

    here: Path
    outside: Path
    model: Path  # a good model's folder
    runs: Path  # with the good runs sft and reward
    canary: Path  # what a payload would write
    tiny: Path  # a model that reads every character

    def pickled(self) -> bytes:
        return pickle.dumps(_Payload(str(self.canary)))

    def code(self) -> str:
        return CODE.format(canary=str(self.canary))

    def a_model(self, **changes: Any) -> Path:
        folder = self.here / "model"
        shutil.copytree(self.model, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def a_run(self, kind: str = "sft", **changes: Any) -> Path:
        """A copy of a good run; `changes` in its adapter's settings."""
        folder = self.here / "theirs"
        shutil.copytree(self.runs / kind, folder)
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    def templated(self, template: str) -> Path:
        folder = self.a_model()
        (folder / "chat_template.jinja").write_text(template)
        return folder


class _Payload:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"echo ran > {self.canary}",)


Attack = Callable[[World], Sequence[object]]
ATTACKS: dict[str, tuple[Attack, int, str]] = {}


def attack(name: str, code: int, says: str) -> Callable[[Attack], Attack]:
    """`says` is part of the line on stderr, or, where the command goes well, empty."""

    def add(function: Attack) -> Attack:
        assert name not in ATTACKS
        ATTACKS[name] = function, code, says
        return function

    return add


def logps(w: World, model: Path | None = None, adapter: object = None, *more: object) -> list[object]:
    """A command that reads model, adapter and rows, and runs the model."""
    with_adapter = ["--adapter", adapter] if adapter else []
    return ["logps", "--model", model or w.model, "--data", "rows.jsonl", "--out", "new.jsonl", "--quantize", "none",
            *with_adapter, *more]  # fmt: skip


# ---- pickles


@attack("adapter_model.bin", 2, "only safetensors are read, never .bin")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter" / "adapter_model.bin").write_bytes(w.pickled())
    return logps(w, None, run)


@attack("adapter_model.bin beside the safetensors", 0, "")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (run / "adapter" / name).write_bytes(w.pickled())
        (run / name).write_bytes(w.pickled())
    return logps(w, None, run)


@attack("adapter .safetensors that is a pickle", 2, "cannot be read (Error while deserializing header")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(w.pickled())
    return logps(w, None, run)


@attack("pytorch_model.bin", 2, "no *.safetensors; other weight formats are not read")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(w.pickled())
    return logps(w, model)


@attack("model.safetensors that is a pickle", 2, "cannot be loaded as a causal language model")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    (model / "model.safetensors").write_bytes(w.pickled())
    return logps(w, model)


@attack("a checkpoint's state as a pickle", 0, "")
def _(w: World) -> Sequence[object]:
    """The checkpoint does not verify, so the run starts anew."""
    run = w.a_run()
    step = run / "checkpoints" / "step-2"
    (step / "tensors.safetensors").write_bytes(w.pickled())
    (run / "adapter" / "adapter_model.safetensors").unlink()
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"state": "stopped"}))
    config = ["--max-steps", "2", "--batch-size", "2", "--rank", "2", "--sample-steps", "0", "--learning-rate", "0.01"]
    data = w.runs / "demonstrations.jsonl"
    return ["sft", "--model", w.model, "--data", data, "--out", run, "--quantize", "none", *config, "--resume"]


@attack("rows as a pickle", 2, "rows.jsonl:1: not UTF-8")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_bytes(w.pickled())
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


# ---- safetensors


def header(entries: str, data: bytes = b"", size: int | None = None) -> bytes:
    text = entries.encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


LYING = {
    "a header of 2**63 bytes": header("{}", size=2**63),
    "a header longer than the file": header("{}", size=10**6),
    "a header of 200 MB that is not there": header("{}", size=200_000_000),
    "offsets beyond the file": header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}', bytes(8)),
    "offsets that overlap": header(
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        bytes(12),
    ),
    "a shape that its bytes do not fill": header(
        '{"a": {"dtype": "F32", "shape": [99999999, 9], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "a shape whose size overflows": header(
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "a negative offset": header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', bytes(8)),
    "one name twice": header(
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        bytes(8),
    ),
    "100,000 deep": header("[" * 100_000),
    "no UTF-8": struct.pack("<Q", 2) + b"\xff\xfe",
}


def _lying(name: str, content: bytes) -> None:
    @attack(f"adapter: {name}", 2, "theirs")
    def _(w: World) -> Sequence[object]:
        run = w.a_run()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(content)
        return logps(w, None, run)

    @attack(f"model: {name}", 2, "cannot be loaded as a causal language model" if name != "one name twice" else "model")
    def _(w: World) -> Sequence[object]:
        model = w.a_model()
        (model / "model.safetensors").write_bytes(content)
        return logps(w, model)


for _name, _content in LYING.items():
    _lying(_name, _content)


# ---- an adapter's settings

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "auto_mapping": ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, "asks for auto_mapping"),
    "an unknown PEFT type": ({"peft_type": "EVIL"}, "a EVIL adapter; only LoRA is supported"),
    "another PEFT type": ({"peft_type": "PROMPT_TUNING"}, "only LoRA is supported"),
    "a PEFT type that is no text": ({"peft_type": ["LORA"]}, "only LoRA is supported"),
    "a module to import (megatron_core)": (
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        "asks for megatron_config, megatron_core, which is not loaded",
    ),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "asks for lm_head"),
    "a changed base (PiSSA)": ({"init_lora_weights": "pissa"}, "asks for init_lora_weights=pissa"),
    "a changed base (layer_replication)": ({"layer_replication": [[0, 2], [0, 2]]}, "asks for layer_replication"),
    "trained tokens": ({"trainable_token_indices": [1]}, "asks for trainable_token_indices"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "asks for loftq_config"),
    "an expression without end in rank_pattern": ({"rank_pattern": {"((a+)+)+$": 2}}, "asks for rank_pattern"),
    "an expression without end in alpha_pattern": ({"alpha_pattern": {"(.*a){99}": 2}}, "asks for alpha_pattern"),
    "an expression without end in exclude_modules": (
        {"exclude_modules": "((.+)+)+\\d{99}"},
        "asks for exclude_modules",
    ),
    "an expression without end in layers_pattern": ({"layers_pattern": "((a+)+)+"}, "asks for layers_pattern"),
    "a rank of a billion": ({"r": 10**9}, "says rank 1000000000, but its tensors have 2"),
    "a rank of a billion for one layer": ({"rank_pattern": {"q_proj": 10**9}}, "says rank 2, 1000000000"),
    "a negative rank": ({"r": -2}, "says rank -2"),
    "a rank that is no number": ({"r": "2; import os"}, "no whole number as r"),
    "a base one folder up": ({"base_model_name_or_path": "../.."}, "made for ../.., not for"),
    "a base of an absolute path": ({"base_model_name_or_path": "/etc/passwd"}, "made for /etc/passwd, not for"),
    "a base at a URL": (
        {"base_model_name_or_path": "http://127.0.0.1:9/evil/model.git"},
        "made for http://127.0.0.1:9",
    ),
    "a base of control characters": ({"base_model_name_or_path": f"x{BAD}"}, "made for x\\x1b"),
    "a base that is an object": ({"base_model_name_or_path": {"a": [1]}}, "made for {'a': [1]}"),
    "targets that are a number": ({"target_modules": 7}, "has no target_modules"),
    "targets that are no names": ({"target_modules": [7, {}]}, "has no target_modules"),
    "settings of wrong types": ({"lora_alpha": "x", "lora_dropout": []}, "theirs"),
}


def _settings(name: str, changes: dict[str, Any], says: str) -> None:
    @attack(f"adapter_config.json: {name}", 2, says)
    def _(w: World) -> Sequence[object]:
        run = w.a_run(**changes)
        (w.here / "evil.py").write_text(w.code())
        if "base_model_name_or_path" in changes:
            (run / "provenance.json").unlink()
        return logps(w, None, run)


for _name, (_changes, _says) in SETTINGS.items():
    _settings(_name, _changes, _says)


@attack("adapter_config.json: targets as an expression without end", 0, "")
def _(w: World) -> Sequence[object]:
    """It is never evaluated: which layers it meant, the tensors tell."""
    return logps(w, None, w.a_run(target_modules="(((((.+)+)+)+)+)+\\d"))


@attack("adapter_config.json of 100,000 levels", 2, "not readable as JSON (nested too deep)")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "adapter" / "adapter_config.json").write_text("[" * 100_000 + "]" * 100_000)
    return logps(w, None, run)


@attack("adapter_config.json of 100 MB", 2, "not readable as JSON (over 64 MB)")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    with open(run / "adapter" / "adapter_config.json", "r+b") as file:
        file.truncate(100_000_000)
    return logps(w, None, run)


# ---- a model's settings

MODELS: dict[str, tuple[dict[str, Any], int, str]] = {
    "auto_map with code in the folder": (
        {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}},
        0,
        "",
    ),
    "a type of its own with code in the folder": (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        2,
        "config.json cannot be used",
    ),
    "code of another repository": (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil/repo--evil.Evil"}},
        2,
        "config.json cannot be used",
    ),
    "trust_remote_code asked for by the file": (
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}, "trust_remote_code": True},
        2,
        "config.json cannot be used",
    ),
    "attention code from the hub": ({"attn_implementation": "evil/kernel"}, 2, "attention code from the hub"),
    "a billion layers": ({"num_hidden_layers": 10**9}, 2, "num_hidden_layers: 1000000000, more than any model has"),
    "layers that are no number": ({"num_hidden_layers": "many"}, 2, "config.json cannot be used"),
    "a quantiser of its own": ({"quantization_config": {"quant_method": "evil"}}, 2, "already quantised"),
    "an architecture of control characters": ({"model_type": f"x{BAD}"}, 2, "config.json cannot be used"),
}


def _model(name: str, changes: dict[str, Any], code: int, says: str) -> None:
    @attack(f"config.json: {name}", code, says)
    def _(w: World) -> Sequence[object]:
        model = w.a_model(**changes)
        for file in (
            "evil.py",
            "modeling_llama.py",
            "configuration_llama.py",
            "__init__.py",
            "setup.py",
            "conftest.py",
        ):
            (model / file).write_text(w.code())
        (w.here / "evil.py").write_text(w.code())
        return logps(w, model)


for _name, (_changes, _code, _says) in MODELS.items():
    _model(_name, _changes, _code, _says)


@attack("tokenizer_config.json: a tokenizer with code in the folder", 0, "")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    file = model / "tokenizer_config.json"
    asked = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "trust_remote_code": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    (model / "evil.py").write_text(w.code())
    return logps(w, model)


@attack("tokenizer_config.json: a class that is only code", 2, "")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    (model / "tokenizer.json").unlink()
    (model / "evil.py").write_text(w.code())
    return logps(w, model)


@attack("model folder: an adapter that transformers would load by itself", 2, "an adapter lies beside it")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    (model / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": str(w.outside), "r": 1, "target_modules": ["q_proj"]}
        )
    )
    (model / "adapter_model.bin").write_bytes(w.pickled())
    return logps(w, model)


def _index(name: str, target: Callable[[World], str], says: str) -> None:
    @attack(f"model.safetensors.index.json: {name}", 2, says)
    def _(w: World) -> Sequence[object]:
        model = w.a_model()
        shutil.move(model / "model.safetensors", w.outside / "x.safetensors")
        names = load_names(w.outside / "x.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target(w))}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        return logps(w, model)


def load_names(file: Path) -> list[str]:
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    return [name for name in json.loads(file.read_bytes()[8 : 8 + size]) if name != "__metadata__"]


_index("a shard two folders up", lambda w: "../outside/x.safetensors", "which is not in")
_index("a shard at an absolute path", lambda w: str(w.outside / "x.safetensors"), "which is not in")
_index("a shard that is a number", lambda w: 7, "holds no weight_map of file names")  # type: ignore[arg-type, return-value]
_index("a shard of control characters", lambda w: f"x{BAD}", "which is not in")


# ---- templates

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TEMPLATES = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}" + TURNS,
    "a power without end": "{{ 10 ** (10 ** 10) }}" + TURNS,
    "text without end": "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}"
    + TURNS,
    "a text of terabytes": "{{ 'x' * 10 ** 13 }}" + TURNS,
    "a text that doubles": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}" + TURNS,
    "a list that doubles": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s }}" + TURNS,
    "comparing what doubles": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}" + TURNS,
    "a width of billions": "{{ '%9999999999d' % 1 }}" + TURNS,
    "a width of billions by format": "{{ '{:>9999999999}'.format('x') }}" + TURNS,
    "padding by a filter": "{{ 'x' | center(9999999999) }}" + TURNS,
    "indenting by a filter": "{{ ('x\n' * 9999) | indent(99999999) }}" + TURNS,
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}" + TURNS,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n < 90 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}"
    "{{ f(0) }}" + TURNS,
    "a loop that calls itself": "{% for x in range(9) recursive %}{{ loop(range(9)) if loop.depth < 90 }}{% endfor %}"
    + TURNS,
    "endless on one conversation alone": "{% if messages[0]['content'] == 'Say: ' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + TURNS,
    "__class__": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TURNS,
    "__class__ by attr": "{{ ('' | attr('__class__')).mro() }}" + TURNS,
    "cycler's globals": "{{ cycler.__init__.__globals__.os.system('echo ran > CANARY') }}" + TURNS,
    "lipsum's globals": "{{ lipsum.__globals__['os'].popen('echo ran > CANARY').read() }}" + TURNS,
    "joiner's globals": "{{ joiner['__init__']['__globals__']['os'].system('echo ran > CANARY') }}" + TURNS,
    "format's attributes": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}" + TURNS,
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}" + TURNS,
    "a namespace's insides": "{{ namespace(__class__=1) }}" + TURNS,
    "raise_exception's globals": "{{ raise_exception.__globals__['__builtins__'] }}" + TURNS,
    "strftime_now's globals": "{{ strftime_now.__globals__.sys }}" + TURNS,
    "an include": "{% include 'OUTSIDE/secret.txt' %}" + TURNS,
    "an import": "{% import 'OUTSIDE/secret.txt' as x %}{{ x }}" + TURNS,
    "extending": "{% extends 'OUTSIDE/secret.txt' %}" + TURNS,
    "control characters in its complaint": "{{ raise_exception('" + BAD + "') }}" + TURNS,
    "an answer of control characters": TURNS + "\x1b[2J{{ '\\x9b31m' }}",
}
SLOW = {"an endless loop", "a power without end", "comparing what doubles", "a macro that calls itself twice",
        "a loop that calls itself", "endless on one conversation alone", "text without end"}  # fmt: skip
WORKING = {"an answer of control characters", "format_map"}


def _template(name: str, text: str) -> None:
    def filled(w: World) -> str:
        return text.replace("CANARY", str(w.canary)).replace("OUTSIDE", str(w.outside))

    code, says = (0, "") if name in WORKING else (2, "the chat template")

    @attack(f"template of a model: {name}", code, says)
    def _(w: World) -> Sequence[object]:
        messages = [{"role": "user", "content": "Say: "}, {"role": "assistant", "content": "a word"}]
        (w.here / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        return ["show", "--model", w.templated(filled(w)), "--data", "rows.jsonl"]

    if name in ("an endless loop", "cycler's globals", "an include"):

        @attack(f"--chat-template: {name}", code, says)
        def _(w: World) -> Sequence[object]:
            (w.here / "t.jinja").write_text(filled(w))
            return ["show", "--model", w.model, "--data", "rows.jsonl", "--chat-template", "t.jinja"]


for _name, _text in TEMPLATES.items():
    _template(_name, _text)


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


@attack("link: a checkpoint's files outside", 0, "")
def _(w: World) -> Sequence[object]:
    """Not taken: the run starts anew."""
    return _resumed(w, lambda step: _linked(step / "tensors.safetensors", w.outside / "t.safetensors"))


@attack("link: a checkpoint's folder outside", 0, "")
def _(w: World) -> Sequence[object]:
    return _resumed(w, lambda step: _linked(step, w.outside / "step-2"))


def _linked(place: Path, away: Path) -> None:
    shutil.move(place, away)
    place.symlink_to(away)


def _resumed(w: World, change: Callable[[Path], None]) -> Sequence[object]:
    run = w.a_run()
    change(run / "checkpoints" / "step-2")
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"state": "stopped"}))
    few = ["--max-steps", "2", "--batch-size", "2", "--rank", "2", "--sample-steps", "0", "--learning-rate", "0.01"]
    data = w.runs / "demonstrations.jsonl"
    return ["sft", "--model", w.model, "--data", data, "--out", run, "--quantize", "none", *few, "--resume"]


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
    import gzip

    (w.here / "rows.jsonl").write_bytes(gzip.compress(bytes(2**20), mtime=0) * 600)
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


# ---- YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "a billion laughs": (LAUGHS, "aliases (*name) are not taken"),
    "!!python/object/apply": ("seed: !!python/object/apply:os.system ['echo ran > CANARY']\n", "not valid YAML"),
    "!!python/object/new": ("seed: !!python/object/new:os.system ['echo ran > CANARY']\n", "not valid YAML"),
    "!!python/name": ("seed: !!python/name:os.system\n", "not valid YAML"),
    "!!python/module": ("? !!python/module:evil\n: 1\n", "not valid YAML"),
    "100 MB": ("#" * 100_000_000, "over 1 MB"),
    "100,000 deep": ("seed: " + "[" * 100_000, "nested too deep"),
    "control characters in a key": ('"' + BAD.encode("unicode_escape").decode() + '": 1\n', "unknown setting"),
    "control characters in a value": ('quantize: "\\e[2J"\n', "quantize: input should be"),
    "another document": ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    "a merge key": ("<<: {seed: 1}\nrank: x\n", "rank: input should be"),
}


def _yaml(name: str, text: str, says: str) -> None:
    @attack(f"--config: {name}", 2, says)
    def _(w: World) -> Sequence[object]:
        (w.here / "c.yaml").write_text(text.replace("CANARY", str(w.canary)))
        (w.here / "evil.py").write_text(w.code())
        return ["sft", "--model", w.model, "--data", "rows.jsonl", "--out", "new", "--config", "c.yaml"]

    @attack(f"preset: {name}", 2, "theirs.yaml")
    def _(w: World) -> Sequence[object]:
        (w.here / "theirs.yaml").write_text(
            "model: m\n" * (name != "100,000 deep") + text.replace("CANARY", str(w.canary))
        )
        return ["sft", "--preset", "theirs.yaml", "--data", "rows.jsonl", "--out", "new"]


for _name, (_text, _says) in YAMLS.items():
    _yaml(_name, _text, _says)


@attack("--config: a reward function", 2, "reward: evil:reward is Python code, which no file may name; give --reward")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code() + "def reward(prompts, completions): return [0.0] * len(prompts)\n")
    (w.here / "c.yaml").write_text("reward: [evil:reward]\n")
    return ["ppo", "--model", w.model, "--prompts", "rows.jsonl", "--out", "new", "--config", "c.yaml"]


@attack("--config: an exact score", 2, "score: evil:reward is Python code")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code())
    (w.here / "c.yaml").write_text("score: evil:reward\n")
    return ["frontier", "--model", w.model, "--out", "new", "--config", "c.yaml"]


@attack("--config: a judge that is code", 2, "judge: evil:reward is Python code")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code())
    (w.here / "c.yaml").write_text("judge: [evil:reward]\n")
    return ["eval", "--model", w.model, "--prompts", "rows.jsonl", "--config", "c.yaml"]


@attack("--config: a judge at an address", 2, "judge: http://127.0.0.1:9/v1 is an address")
def _(w: World) -> Sequence[object]:
    """It would get the prompts, and the key in LOWRANK_JUDGE_KEY."""
    (w.here / "c.yaml").write_text("judge: ['http://127.0.0.1:9/v1']\njudge_model: m\nagainst: base\n")
    return ["eval", "--model", w.model, "--prompts", "rows.jsonl", "--config", "c.yaml"]


@attack(
    "--config: a server to draw rollouts, and a key to send it",
    2,
    "rollout_server: http://127.0.0.1:9/v1 is an address",
)
def _(w: World) -> Sequence[object]:
    (w.here / "c.yaml").write_text("rollout_server: http://127.0.0.1:9/v1\nrollout_server_key_env: HF_TOKEN\n")
    return ["ppo", "--model", w.model, "--prompts", "rows.jsonl", "--reward", w.runs / "reward", "--out", "new",
            "--config", "c.yaml"]  # fmt: skip


@attack("preset: a reward function", 2, "is said on the command line, not in a preset")
def _(w: World) -> Sequence[object]:
    (w.here / "evil.py").write_text(w.code())
    (w.here / "theirs.yaml").write_text("model: m\nmethods:\n  ppo:\n    reward: [evil:reward]\n")
    return ["ppo", "--preset", "theirs.yaml", "--prompts", "rows.jsonl", "--out", "new"]


# ---- JSON beside a run

DEEP, HUGE = "[" * 100_000 + "]" * 100_000, '{"state": "finished", "steps": 1, "x": "' + "a" * 70_000_000 + '"}'
JSONS: dict[str, dict[str, tuple[int, str]]] = {
    "run.json": {"deep": (0, ""), "huge": (0, "")},
    "metrics.jsonl": {"deep": (0, ""), "huge": (0, "")},
    "provenance.json": {"deep": (0, ""), "huge": (0, "")},
}


def _listed(file: str, how: str) -> None:
    @attack(f"runs: {file} {how}", 0, "")
    def _(w: World) -> Sequence[object]:
        (w.here / "runs").mkdir()
        run = w.a_run().rename(w.here / "runs" / "theirs")
        (run / file).write_text(DEEP if how == "100,000 deep" else HUGE)
        return ["runs", "runs"]


for _name in ("run.json", "metrics.jsonl", "provenance.json"):
    for _says in ("100,000 deep", "of 70 MB"):
        _listed(_name, _says)


def _read(file: str, how: str, content: str, says: str) -> None:
    @attack(f"reward run: {file} {how}", 2, says)
    def _(w: World) -> Sequence[object]:
        run = w.a_run("reward")
        (run / file).write_text(content)
        return ["score", "--model", w.model, "--adapter", run, "--data", "rows.jsonl", "--out", "new.jsonl", "--quantize",
                "none", "--shifted"]  # fmt: skip


_read("reward.json", "100,000 deep", DEEP, "holds no number under shift")
_read("reward.json", "of 70 MB", HUGE, "holds no number under shift")
_read("reward.json", "with a shift of 400 digits", '{"shift": 1' + "0" * 400 + "}", "holds no number under shift")
_read("provenance.json", "100,000 deep", DEEP, "not valid JSON (nested too deep)")
_read("provenance.json", "of wrong types", '{"base_hash": {"a": 1}}', "base_hash: not a text")


@attack("run: prompting.json 100,000 deep", 2, "holds no text under answer_prefix")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "prompting.json").write_text(DEEP)
    return logps(w, None, run)


@attack("run: a text before every answer of control characters", 0, "")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    (run / "prompting.json").write_text(json.dumps({"answer_prefix": f"x{BAD}"}))
    return logps(w, None, run)


@attack("run: a checkpoint's state 100,000 deep", 0, "")
def _(w: World) -> Sequence[object]:
    return _resumed(w, lambda step: (step / "state.json").write_text(DEEP) and None)


@attack("run: a checkpoint's manifest 100,000 deep", 0, "")
def _(w: World) -> Sequence[object]:
    return _resumed(w, lambda step: (step / "manifest.json").write_text(DEEP) and None)


@attack("run: a checkpoint's manifest that lists files outside", 0, "")
def _(w: World) -> Sequence[object]:
    listed = {"format": 1, "step": 2, "files": {"../../../outside/secret.txt": {"sha256": "0" * 64, "bytes": 1}}}
    return _resumed(w, lambda step: (step / "manifest.json").write_text(json.dumps(listed)) and None)


# ---- the terminal


def _named(w: World, name: str, to: str = "runs") -> Path:
    (w.here / to).mkdir(exist_ok=True)
    run = w.here / to / name
    shutil.copytree(w.runs / "sft", run)
    return run


NASTY = "x\x1b[2J\x07\u202ey\nz"


@attack("terminal: a run's name", 0, "")
def _(w: World) -> Sequence[object]:
    _named(w, NASTY)
    return ["runs", "runs"]


@attack("terminal: what run.json and provenance.json say", 0, "")
def _(w: World) -> Sequence[object]:
    run = _named(w, "x")
    said = {"state": "finished", "method": BAD, "started": BAD * 3, "steps": BAD, "summary": {BAD: BAD}}
    (run / "run.json").write_text(json.dumps(said))
    (run / "provenance.json").write_text(json.dumps({"base": BAD, "method": BAD, "parent": {"run": BAD}}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, BAD: 1.0, "loss": 10**400}) + "\n")
    return ["runs", "runs"]


@attack("terminal: settings and figures that are compared", 0, "")
def _(w: World) -> Sequence[object]:
    one, two = _named(w, NASTY), _named(w, "two")
    (one / "config.yaml").write_text(f"method: sft\n{json.dumps('k' + BAD)}: {json.dumps(BAD)}\n[bold]x: '[link=x]y[/link]'\n"
                                     .replace("[bold]x", "'[bold]x'"))  # fmt: skip
    (one / "metrics.jsonl").write_text(json.dumps({"step": 1, f"m{BAD}": 2.0}) + "\n")
    return ["runs", "--compare", one, two]


@attack("terminal: a run that is deleted", 0, "")
def _(w: World) -> Sequence[object]:
    return ["runs", "--delete", _named(w, NASTY), "--yes"]


@attack("terminal: a row", 0, "")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_text(json.dumps({"prompt": f"a{BAD}", "completion": f"b{BAD}"}) + "\n")
    return ["show", "--model", w.tiny, "--data", "rows.jsonl"]


@attack("terminal: rows that are audited", 0, "")
def _(w: World) -> Sequence[object]:
    rows = [{"prompt": f"a{BAD}{i % 2}", "completion": f"b{BAD}\ufffd", f"c{BAD}": BAD} for i in range(4)]
    (w.here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["audit", "--model", w.tiny, "--data", "rows.jsonl", "--eval-data", "rows.jsonl"]


@attack("terminal: a field that is missing beside others", 2, "missing (fields: prompt, chosen, \\x1b")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", BAD: "c"}) + "\n")
    return ["dpo", "--model", w.model, "--data", "rows.jsonl", "--out", "new"]


@attack("terminal: a role", 2, "unknown role")
def _(w: World) -> Sequence[object]:
    (w.here / "rows.jsonl").write_text(json.dumps({"messages": [{"role": f"u{BAD}", "content": "x"}]}) + "\n")
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


@attack("terminal: a file's name", 2, "\\x1b[2J\\x07")
def _(w: World) -> Sequence[object]:
    (w.here / NASTY).write_text("{nope\n")
    return ["show", "--model", w.model, "--data", NASTY]


@attack("terminal: names of files in a folder of rows", 2, "\\x1b[2J\\x07")
def _(w: World) -> Sequence[object]:
    (w.here / "rows").mkdir()
    (w.here / "rows" / f"{NASTY}.jsonl").write_text("{nope\n")
    return ["show", "--model", w.model, "--data", "rows"]


@attack("terminal: a neighbour's name in a suggestion", 2, "did you mean abc\\x1bdef.jsonl")
def _(w: World) -> Sequence[object]:
    (w.here / "abc\x1bdef.jsonl").write_text(json.dumps(ROW))
    return ["show", "--model", w.model, "--data", "abcdef.jsonl"]


@attack("terminal: a model's name", 2, "no such model folder")
def _(w: World) -> Sequence[object]:
    return logps(w, Path(f"./{NASTY}"))


@attack("terminal: a tensor's name", 2, "theirs")
def _(w: World) -> Sequence[object]:
    run = w.a_run()
    file = run / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"x{BAD}": torch.zeros(1)}, file)
    return logps(w, None, run)


@attack("terminal: a weight's name in a model", 0, "")
def _(w: World) -> Sequence[object]:
    model = w.a_model()
    file = model / "model.safetensors"
    save_file(load_file(file) | {f"x{BAD}": torch.zeros(1)}, file, metadata={"format": "pt"})
    return logps(w, model)


@attack("terminal: markup of rich in a row", 0, "")
def _(w: World) -> Sequence[object]:
    row = {"prompt": "[link=http://evil]a[/link]", "completion": "[bold red]b[/] [/nothing]"}
    (w.here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return ["show", "--model", w.model, "--data", "rows.jsonl"]


@attack("terminal: an argument", 2, "no such flag")
def _(w: World) -> Sequence[object]:
    return ["sft", f"--{NASTY}"]


# ---- stores


def _store(w: World, *statements: str) -> Path:
    from lowrank_align.cli import main

    path = w.here / "theirs.db"
    assert main(["data", "import", str(w.runs / "pairs.jsonl"), "--store", str(path)]) == 0
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
STORES = {
    "a view without end": ("DROP VIEW standing", f"CREATE VIEW standing AS {ENDLESS}"),
    "another view without end": ("DROP VIEW heads", f"CREATE VIEW heads AS {ENDLESS}"),
    "a trigger that changes what is written": (
        "CREATE TRIGGER t AFTER INSERT ON events BEGIN UPDATE notes SET value = 'x'; END",
    ),
    "a trigger on notes": ("CREATE TRIGGER t AFTER INSERT ON notes BEGIN DELETE FROM notes; END",),
    "without its own triggers": ("DROP TRIGGER events_no_delete",),
    "a view of its own": (f"CREATE VIEW v AS {ENDLESS}",),
    "a table turned into a view": ("ALTER TABLE notes RENAME TO other", f"CREATE VIEW notes AS {ENDLESS}"),
    "an index on an expression": ("CREATE INDEX i ON prompts (hex(zeroblob(9)))",),
    "a virtual table": ("CREATE VIRTUAL TABLE v USING fts5(x)",),
}


def _database(name: str, statements: tuple[str, ...]) -> None:
    @attack(f"store: {name}", 2, "changed by another program, and is not opened")
    def _(w: World) -> Sequence[object]:
        return ["data", "export", "pairs", "--store", _store(w, *statements), "--out", "new.jsonl"]

    if name == "a trigger that changes what is written":

        @attack(f"store: {name}, by an import", 2, "changed by another program, and is not opened")
        def _(w: World) -> Sequence[object]:
            return ["data", "import", w.runs / "pairs.jsonl", "--store", _store(w, *statements)]


for _name, _statements in STORES.items():
    _database(_name, _statements)


@attack("store: records 100,000 deep", 2, "damaged")
def _(w: World) -> Sequence[object]:
    path = _store(w)
    connection = sqlite3.connect(path)
    triggers = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'records_no_update'").fetchone()
    connection.execute("DROP TRIGGER records_no_update")
    connection.execute("UPDATE records SET body = ?", (DEEP,))
    connection.execute(triggers[0])
    connection.commit()
    connection.close()
    return ["data", "export", "pairs", "--store", path, "--out", "new.jsonl"]


@attack("store: records of another form", 2, "damaged")
def _(w: World) -> Sequence[object]:
    path = _store(w)
    connection = sqlite3.connect(path)
    triggers = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'records_no_update'").fetchone()
    connection.execute("DROP TRIGGER records_no_update")
    connection.execute("UPDATE records SET body = '[1, {}]'")
    connection.execute(triggers[0])
    connection.commit()
    connection.close()
    return ["data", "export", "pairs", "--store", path, "--out", "new.jsonl"]


@attack("store: annotators of control characters", 0, "")
def _(w: World) -> Sequence[object]:
    rows = [{**PAIR, "annotator": f"a{BAD}"}]
    (w.here / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from lowrank_align.cli import main

    assert main(["data", "import", "named.jsonl", "--store", "theirs.db"]) == 0
    return ["data", "stats", "--store", "theirs.db"]


@attack("store: a link to a database outside", 2, "another program's database")
def _(w: World) -> Sequence[object]:
    connection = sqlite3.connect(w.outside / "x.db")
    connection.execute("CREATE TABLE secrets (x)")
    connection.commit()
    connection.close()
    (w.here / "theirs.db").symlink_to(w.outside / "x.db")
    return ["data", "stats", "--store", "theirs.db"]


# ---- the table


SEEN: list[str] = []
WATCHED: dict[str, Any] = {"on": False, "outside": "", "allowed": ()}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not WATCHED["on"]:
        return
    if (
        event
        in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.bind", "pickle.find_class")
        or event == "subprocess.Popen"
        and "template_worker.py" not in str(arguments)
    ):
        SEEN.append(f"{event} {arguments}")
    elif event == "open" and str(arguments[0]).startswith(WATCHED["outside"]):
        SEEN.append(f"open {arguments[0]}")
    elif event == "import" and arguments[0] in ("evil", "modeling_llama"):
        SEEN.append(f"import {arguments[0]}")


@pytest.fixture(scope="session", autouse=True)
def hook() -> None:
    sys.addaudithook(_hook)  # for good: the interpreter never takes one back


@pytest.fixture
def world(
    tmp_path: Path, trained: Path, tiny_llama: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    here, outside = tmp_path / "here", tmp_path / "outside"
    here.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (here / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield World(here, outside, tiny_llama, trained, tmp_path / "canary", tiny_base_folder)
    WATCHED["on"] = False


@pytest.fixture
def quick_templates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half a second for a template in place of ten: the limit is the worker's own, so it gets one with another."""
    if "template" not in request.node.callspec.params["name"]:
        yield
        return
    from lowrank_align.data import template_room

    run = template_room.RUN.replace("run_path(sys.argv[1], run_name='__main__')", "run_path(sys.argv[1])")
    run += "; w = _['main'].__globals__; w['CPU_SECONDS'] = 0.5; w['main']()"
    template_room.ROOM.close()
    monkeypatch.setattr(template_room, "RUN", run.replace("runpy.run_path", "_ = runpy.run_path"))
    yield
    template_room.ROOM.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_files_made_to_attack(
    name: str, tally: Any, command: Command, world: World, quick_templates: None, caplog: pytest.LogCaptureFixture
) -> None:
    make, code, says = ATTACKS[name]
    argv = make(world)
    outside = {path: path.stat().st_mtime_ns for path in world.outside.rglob("*")}
    SEEN.clear()
    WATCHED.update(on=True, outside=str(world.outside))
    outcome = command(*argv)
    WATCHED["on"] = False
    told = outcome.out + outcome.err
    wrong = list(SEEN)
    wrong += ["code ran"] * world.canary.exists()
    wrong += [f"changed outside: {sorted(outside)}"] * (
        outside != {p: p.stat().st_mtime_ns for p in world.outside.rglob("*")}
    )
    wrong += ["control characters on the terminal"] * bool(CONTROL.search(told))
    wrong += ["said what it should not know"] * (SECRET in told)
    wrong += [f"wrote what it should not know: {path}" for path in world.here.rglob("*")
              if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes()]  # fmt: skip
    wrong += [f"ended with {outcome.code}: {outcome.err}"] * (outcome.code != code)
    wrong += [f"said {outcome.err!r}, not {says!r}"] * (says not in outcome.err)
    wrong += [f"more than a line: {outcome.err}"] * (code != 0 and outcome.err.count("\n") != 1)
    kind = name.partition(":")[0]
    tally(SECTION, f"made to attack: {kind}" if ":" in name else "made to attack: pickles",
          "no code, nothing outside, nothing endless, one line", held=int(not wrong), of=1)  # fmt: skip
    assert not wrong, wrong


def test_there_are_enough_of_them() -> None:
    assert len(ATTACKS) >= 40


# ---- what no file of a run may hold


def test_a_planted_token_is_in_no_file_and_no_line(
    tally: Any, command: Command, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's token in the environment and in its file, a judge's key, a password and a tracker's key."""
    token, key, password, tracker = (
        "hf_PLANTEDplantedPLANTEDplanted",
        "sk-PLANTED0123456789abcdef",
        "planted-password",
        "w" * 40,
    )
    home = tmp_path / "home"
    (home / "hf").mkdir(parents=True)
    (home / "hf" / "token").write_text(token)
    for name, value in {"HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": token, "LOWRANK_JUDGE_KEY": key, "WANDB_API_KEY": tracker,
                        "LOWRANK_STUDIO_PASSWORD": password, "HF_HOME": str(home / "hf")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({**ROW, "prompt": f"{i}. Say: "}) + "\n" for i in range(6)))
    Path("pairs.jsonl").write_text("".join(json.dumps({**PAIR, "prompt": f"{i}. Say: "}) + "\n" for i in range(6)))
    few = ("--model", tiny_llama, "--quantize", "none", "--max-steps", "2", "--batch-size", "2", "--rank", "2")
    told = []
    argvs: list[tuple[object, ...]] = [
        ("sft", "--data", "rows.jsonl", "--out", "sft", *few),
        ("reward", "--data", "pairs.jsonl", "--out", "reward", *few),
        ("dpo", "--data", "pairs.jsonl", "--adapter", "sft", "--out", "dpo", *few, "--report-to", "tensorboard"),
        ("ppo", "--prompts", "rows.jsonl", "--reward", "reward", "--out", "ppo", *few, "--max-new-tokens", "4"),
        ("generate", "--prompts", "rows.jsonl", "--model", tiny_llama, "--quantize", "none", "--out", "answers.jsonl",
         "--max-new-tokens", "4"),
        ("eval", "--adapter", "dpo", "--against", "sft", "--judge", "reward", "--prompts", "rows.jsonl", "--model", tiny_llama,
         "--quantize", "none", "--out", "report", "--max-new-tokens", "4"),
        ("export", "--model", tiny_llama, "--adapter", "sft", "--to", "merged", "--out", "merged"),
        ("data", "import", "pairs.jsonl", "--store", "x.db"),
        ("doctor", "--json"),
        ("runs", "."),
    ]  # fmt: skip
    for argv in argvs:
        outcome = command(*argv)
        if "tensorboard" in argv and outcome.code == 3:  # not installed here
            outcome = command(*argv[:-2])
        assert outcome.code in ((0, 3) if argv[0] == "doctor" else (0,)), outcome.err
        told.append(outcome.out + outcome.err)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and home not in path.parents]
    cached = [path for path in Path(os.environ["LOWRANK_ALIGN_CACHE"]).rglob("*") if path.is_file()]
    planted = [word.encode() for word in (token, key, password, tracker)]
    found = [str(path) for path in files + cached if any(word in path.read_bytes() for word in planted)]
    found += ["terminal"] * any(word in "".join(told).encode() for word in planted)
    tally(SECTION, "a planted token, key or password", "in no file and no line",
          held=len(files) + len(told) - len(found), of=len(files) + len(told), note="files and outputs of ten commands")  # fmt: skip
    assert not found
    assert len(files) > 60


def test_only_safetensors_and_text_are_written(command: Command, trained: Path) -> None:
    """Every file of a run is what the promise names, by its content."""
    for path in trained.rglob("*"):
        if not path.is_file() or path.suffix in (".png", ".lock") or path.name == ".lock":
            continue
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            assert struct.unpack("<Q", content[:8])[0] < len(content)
            continue
        text = content.decode("utf-8")
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
        else:
            assert path.suffix in (".yaml", ".md"), path
