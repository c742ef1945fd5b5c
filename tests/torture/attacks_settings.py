"""Settings of adapters and models that ask for code, for what is not there, or for what never ends."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.torture.attacks import BAD, World, attack, logps

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
