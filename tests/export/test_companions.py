"""What lies beside the weights, and the Modelfile."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from lowrank_align import adapters
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Message, Row, Shape
from lowrank_align.export.companions import classifier_pad, write_adapter, write_companions
from lowrank_align.export.ollama import import_warnings, modelfile
from lowrank_align.export.source import Source
from lowrank_align.loading import read_config


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Callable[..., Source]:
    """`source(template=None, kind="policy", **config)`: a copy of `tiny_llama` with these entries in its config."""

    def make(template: str | None = None, kind: Any = "policy", folder: Path = tiny_llama, **config: Any) -> Source:
        base = tmp_path / "base"
        shutil.copytree(folder, base)
        written = json.loads((base / "config.json").read_text()) | config
        (base / "config.json").write_text(json.dumps(written))
        renderer = Renderer(AutoTokenizer.from_pretrained(base), chat_template=template, max_length=99)
        saved = adapters.Saved(base, LoraConfig(r=1), {}, 0.0)
        run = tmp_path / "run"
        run.mkdir()
        made = read_config(str(base))
        return Source(run, run, kind, str(base), base, "", made, saved, {}, renderer, torch.float32, 256)

    return make


def written(source: Source, folder: Path, dtype: Any = torch.bfloat16, **options: Any) -> dict[str, Any]:
    """The export's config.json. What `merge.save` has written before is the class alone."""
    folder.mkdir()
    if dtype is not None:
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "pad_token_id": 5}')
    write_companions(folder, source, dtype, **options)
    return dict(json.loads((folder / "config.json").read_text())) if dtype is not None else {}


def test_generation_stops_at_the_turns_end_and_where_the_base_stops(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    made = source()
    settings = {"eos_token_id": [104, 7], "temperature": 0.6, "do_sample": True}
    (made.base / "generation_config.json").write_text(json.dumps(settings))
    written(made, tmp_path / "out")
    tokenizer = made.renderer.tokenizer
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>")]
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [*ends, 104, 7] and found["pad_token_id"] == tokenizer.pad_token_id
    assert found["temperature"] == 0.6


def test_settings_that_lead_out_of_the_base_are_not_published(source: Callable[..., Source], tmp_path: Path) -> None:
    made = source()
    (tmp_path / "secret.json").write_text('{"suffix": "topsecret"}')
    (made.base / "generation_config.json").unlink(missing_ok=True)
    (made.base / "generation_config.json").symlink_to(tmp_path / "secret.json")
    written(made, tmp_path / "out")
    assert "topsecret" not in (tmp_path / "out" / "generation_config.json").read_text()


def test_the_config_is_the_bases_own_with_positions_in_both_forms(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    """transformers reads the same rotary settings out of it, whichever form the base had."""
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
    made = source(rope_parameters=scaled, _name_or_path="/home/someone/model", eos_token_id=[1, 2])
    found = written(made, tmp_path / "out")
    assert (found["dtype"], found["rope_theta"], found["rope_scaling"]["factor"]) == ("bfloat16", 5e5, 8.0)
    assert found["eos_token_id"] == [1, 2] and "_name_or_path" not in found and "torch_dtype" not in found
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert again.rope_parameters == AutoConfig.from_pretrained(made.base).rope_parameters
    assert again.dtype == torch.bfloat16


def test_positions_of_layers_of_two_kinds(
    source: Callable[..., Source], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
    made = source(folder=model_folder("gemma3_text"), rope_parameters=rope, torch_dtype="float32")
    found = written(made, tmp_path / "out")
    assert (found["rope_theta"], found["rope_local_base_freq"], found["torch_dtype"]) == (1e6, 1e4, "bfloat16")
    again, before = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "out", made.base))
    assert again.rope_parameters == before.rope_parameters


def test_the_tokenizer_is_the_bases_with_the_runs_template(source: Callable[..., Source], tmp_path: Path) -> None:
    """The plain template has no BOS; the tokenizer adds one, in training too, so that transformers must get it."""
    made = source("plain")
    for name in ("LICENSE", "NOTICE.txt", "README.md", "code.py"):
        (made.base / name).write_text(name)
    written(made, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.txt", "tokenizer.json"} <= names and not {"README.md", "code.py"} & names
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (made.base / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    row = Row(Shape.prompts, [Message(role="user", content="Hi")], [])
    assert ids == made.renderer.prompt_ids(row) and tokenizer.decode(ids) == "<s>User: Hi\nAssistant:"


def test_a_models_own_template_stays_as_it_is(source: Callable[..., Source], tmp_path: Path) -> None:
    made = source()
    written(made, tmp_path / "out", states_bos=True)
    for file in made.base.glob("chat_template*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a")["input_ids"] == made.renderer.tokenizer("a")["input_ids"]


def test_a_classifier_is_not_padded_with_its_end_token() -> None:
    """It reads its score before the padding; a special token that texts do not use serves, else none."""

    def pad(pad_id: int | None, *tokens: str) -> int | None:
        added = {i: SimpleNamespace(content=text, special=True) for i, text in enumerate(tokens)}
        tokenizer = SimpleNamespace(pad_token_id=pad_id, bos_token_id=0, unk_token_id=None, added_tokens_decoder=added)
        renderer = SimpleNamespace(tokenizer=tokenizer, end_ids=[1, 2])
        return classifier_pad(SimpleNamespace(renderer=renderer))  # type: ignore[arg-type]

    assert pad(3, "<s>", "</s>") == 3
    assert pad(1, "<s>", "</s>", "<end>", "<reserved_3>", "<|finetune_right_pad_id|>") == 4
    assert pad(None, "<s>", "</s>", "<end>", "<reserved_3>") == 3
    assert pad(1, "<s>", "</s>", "<end>", "<tool>") is None


def test_an_adapter_names_no_folders(source: Callable[..., Source], tmp_path: Path) -> None:
    """The base by its hub id, or the last part of its path."""
    made = source()
    (made.run / adapters.WEIGHTS).write_bytes(b"weights")
    (made.run / adapters.CONFIG).write_text(json.dumps({"base_model_name_or_path": str(made.base), "r": 1}))
    record = {"base": "some/model", "config": {"data": "/home/me/pairs.jsonl", "hub_token": "hf_abc"}}
    for known, name in (({}, "base"), (record, "some/model")):
        folder = tmp_path / name.replace("/", "-")
        folder = folder.with_name(folder.name + "-out")
        folder.mkdir()
        write_adapter(folder, replace(made, record=known))
        assert json.loads((folder / adapters.CONFIG).read_text()) == {"base_model_name_or_path": name, "r": 1}
    found = json.loads((tmp_path / "some-model-out/provenance.json").read_text())
    assert found == {"base": "some/model", "config": {"data": "pairs.jsonl"}}


# --- the Modelfile

CUT = "llama.cpp may cut prompts into other tokens than in training"


def test_modelfile(source: Callable[..., Source]) -> None:
    """Ollama adds `<s>` by itself (the tokenizer's settings tell it to), so the template leaves it out."""
    made = source()
    (made.base / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    found = modelfile(made)
    lines = found.text.splitlines()
    assert "FROM ." in lines and not any(line.startswith("SYSTEM") for line in lines) and found.warnings == []
    assert 'PARAMETER stop "<|im_end|>"' in lines and 'PARAMETER stop "</s>"' in lines
    assert {"PARAMETER temperature 0.6", "PARAMETER top_p 0.95", "PARAMETER top_k 20", "PARAMETER num_ctx 256"} <= {
        *lines
    }
    template = found.text.split('"""')[1]
    assert template.startswith('{{ $last := "" }}') and template.endswith("{{ end }}") and "<s>" not in template
    assert "<|im_start|>assistant\n" in template


def test_a_stop_text_with_quotes_or_lines(source: Callable[..., Source], tmp_path: Path) -> None:
    """In single quotes nothing can be escaped; in three pairs, quotes stand for themselves."""
    jinja = "{% for m in messages %}{{ m['role'] + ': \"' + m['content'] + '\"!' }}{% endfor %}"
    (tmp_path / "quoting.jinja").write_text(jinja)
    found = modelfile(source(str(tmp_path / "quoting.jinja")), "./model.gguf")
    assert 'PARAMETER stop """"!"""\n' in found.text and "FROM ./model.gguf\n" in found.text


def test_what_ollama_may_not_take_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["FalconH1ForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "byte_fallback": true}}')
    first, second = import_warnings(tmp_path, "ollama")
    assert "FalconH1ForCausalLM" in first and "--to gguf" in first and "Ollama cannot read its vocabulary" in second
    assert import_warnings(tmp_path, "gguf") == [second.replace("Ollama cannot read its vocabulary", CUT)]
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert import_warnings(tmp_path, "ollama") == []
