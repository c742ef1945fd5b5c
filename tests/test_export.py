"""`lowrank-align export`, from a run to a folder that other programs load, and what it refuses."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lowrank_align.export import merge as merging
from lowrank_align.export.gguf import SCRIPT
from tests.conftest import TURNS

CONTEXT = 256


@pytest.fixture
def export(command: Callable[..., Any], trained: Path, tmp_path: Path) -> Callable[..., Any]:
    """`export("sft", "--to", "adapter")`: exports a run of `trained` into `tmp_path / "out"`."""

    def run_it(run: str | Path, *flags: object, out: Path = tmp_path / "out") -> Any:
        return command("export", "--adapter", trained / run, "--out", out, "--device", "cpu", *flags)

    return run_it


def parity(folder: Path) -> Any:
    return json.loads((folder / "parity.json").read_text())


def test_merged_writes_what_base_and_adapter_write(
    export: Callable[..., Any], command: Callable[..., Any], trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Greedy answers of plain transformers against those of `generate`, and nothing about this machine in any file."""
    outcome = export("sft")
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    found = parity(out)
    assert found["passed"] and found["weights"]["compared"] == found["weights"]["tensors"] == 21
    assert found["export"]["largest"] < 1e-4 < found["adapter_effect"]["largest"]
    assert all(line in outcome.out for line in found["summary"]) and f"{out}: merged, checked" in outcome.out
    answers = tmp_path / "answers.jsonl"
    options = ["--model", tiny_llama, "--adapter", trained / "sft", "--quantize", "none", "--temperature", 0]
    options += ["--max-new-tokens", 20, "--out", answers]
    assert command("generate", "--prompts", trained / "pairs.jsonl", *options).code == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for line in map(json.loads, answers.read_text().splitlines()):
        inputs = tokenizer(line["prompt"], return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == line["completion"]
    for file in ("README.md", "export.json", "parity.json", "config.json"):
        assert str(trained) not in (text := (out / file).read_text()) and str(tiny_llama) not in text
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert "base_model" not in front and front["library_name"] == "transformers"  # this base has a folder only
    assert front["tags"] == ["lowrank_align", "sft"]
    assert "merged into `tiny_llama`" in (out / "README.md").read_text()
    marker = json.loads((out / "export.json").read_text())
    assert (marker["state"], marker["dtype"], marker["base"]) == ("passed", "fp32", "tiny_llama")
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= marker["files"].keys()


def test_plain_transformers_stops_at_the_turns_end(
    command: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """The head of this base, in bf16 as most are, answers with `<|im_end|>`; its own settings stop at `</s>` alone."""
    from lowrank_align.base import Base

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        model.lm_head.weight[end] = 9 * model.model(**inputs).last_hidden_state[0, -1]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = Base.load(str(tmp_path / "base"), quantize="none", device="cpu")
    base.add_role("policy", rank=1)
    base.save_role("policy", tmp_path / "adapter")
    outcome = command("export", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--device", "cpu")
    assert outcome.code == 0 and "how the adapter was trained is not on record" in outcome.out, outcome.err
    assert parity(tmp_path / "out")["precision"] == "weights in bf16, arithmetic in fp32"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    length = inputs["input_ids"].shape[1]
    ids = exported.generate(**inputs, do_sample=False, max_new_tokens=5)[0, length:].tolist()
    assert ids == [end] and len(model.generate(**inputs, do_sample=False, max_new_tokens=5)[0]) == length + 5


def test_an_adapter_loads_in_plain_peft_and_here(
    export: Callable[..., Any], command: Callable[..., Any], trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    assert export("sft", "--to", "adapter").code == 0
    out = tmp_path / "out"
    assert parity(out)["passed"] and parity(out)["precision"] == "weights in fp32, arithmetic in fp32"
    theirs = load_file(trained / "sft/adapter/adapter_model.safetensors")
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), out).state_dict()
    assert all(torch.equal(ours[key.replace(".weight", ".default.weight")], t) for key, t in theirs.items())
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny_llama"
    options = ["--data", trained / "pairs.jsonl", "--quantize", "none"]
    for adapter, name in ((trained / "sft", "run.jsonl"), (out, "export.jsonl")):
        options_now = [*options, "--model", tiny_llama, "--adapter", adapter, "--out", tmp_path / name]
        assert command("logps", *options_now).code == 0
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "export.jsonl").read_text()


def test_a_reward_model_scores_as_a_classifier(
    export: Callable[..., Any], command: Callable[..., Any], trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The scores of `lowrank-align score`; the shift, which a head without bias cannot hold, stays beside it."""
    assert export("reward").code == 0
    out, scores = tmp_path / "out", tmp_path / "scores.jsonl"
    assert (out / "reward.json").read_bytes() == (trained / "reward/reward.json").read_bytes()
    options = ["--model", tiny_llama, "--adapter", trained / "reward", "--quantize", "none", "--out", scores]
    assert command("score", "--data", trained / "pairs.jsonl", *options).code == 0
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    rows = [json.loads(line) for line in (trained / "pairs.jsonl").read_text().splitlines()]
    texts = [row["prompt"] + row[side] + "</s>" for row in rows for side in ("chosen", "rejected")]
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    wanted = [score for line in scores.read_text().splitlines() for score in json.loads(line)["scores"]]
    assert found.shape == (12, 1) and (found[:, 0] - torch.tensor(wanted)).abs().max() < 1e-5
    for format in ("ollama", "gguf"):
        refused = export("reward", "--to", format, out=tmp_path / format)
        assert refused.code == 2 and "is a reward model, which does not chat" in refused.err


def test_as_trained(command: Callable[..., Any], trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Merged into the 4-bit weights, it is the policy as trained but for rounding; into its own, it is farther off."""
    options = ["--model", tiny_llama, "--quantize", "nf4", "--max-steps", 1, "--rank", 2, "--sample-steps", 0]
    assert command("sft", "--data", trained / "demonstrations.jsonl", "--out", tmp_path / "run", *options).code == 0
    for name, flags in (("as", ["--as-trained", "--dtype", "bf16"]), ("own", ["--dtype", "fp16"])):
        outcome = command("export", "--adapter", tmp_path / "run", "--out", tmp_path / name, "--device", "cpu", *flags)
        assert outcome.code == 0, outcome.err
    near, far = parity(tmp_path / "as"), parity(tmp_path / "own")
    assert near["as_trained"]["kl_nats"] < 16 * near["another_rounding"]["kl_nats"] + 1e-5
    assert far["as_trained"]["kl_nats"] > 30 * near["as_trained"]["kl_nats"]
    assert "so this is rounding" in near["summary"][-1] and "--as-trained merges into those" in far["summary"][-2]
    assert far["as_trained"]["kl_nats"] > far["adapter_effect"]["kl_nats"]  # one step changes little
    assert far["summary"][-1].startswith(
        "the 4-bit rounding of the base changes more than the training did; --as-trained "
    )
    assert load_file(tmp_path / "own/model.safetensors")["lm_head.weight"].dtype == torch.float16


def damaged_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_damaged_export_is_caught(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 4; under its name there is what was there before, and the damaged one under another, marked."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text("older")
    save = merging.save
    monkeypatch.setattr(merging, "save", lambda model, folder, **how: (save(model, folder), damaged_weights(folder)))
    outcome = export("sft", "--overwrite", "--to", "ollama")
    assert outcome.code == 4 and "not what was trained, so it is kept as out.failed only" in outcome.err
    assert (tmp_path / "out" / "export.json").read_text() == "older"
    failed = tmp_path / "out.failed"
    assert json.loads((failed / "export.json").read_text())["state"] == "failed"
    found = parity(failed)
    assert not found["passed"] and found["weights"]["wrong"] == ["model.layers.1.self_attn.v_proj.weight"]
    assert "NO PARITY" in outcome.out and found["export"]["kl_nats"] > 0.001


def test_a_wrong_config_is_caught_by_what_the_model_says(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is right, the position encoding is not."""
    companions = "lowrank_align.export.companions"

    def state_positions(config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 50.0

    monkeypatch.setattr(f"{companions}._state_positions", state_positions)
    outcome = export("sft")
    found = parity(tmp_path / "out.failed")
    assert outcome.code == 4 and found["weights"]["wrong"] == [] and not (tmp_path / "out").exists()


def test_an_older_export_is_replaced(export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("export.json", "adapter_config.json"):
        (tmp_path / "out" / name).write_text("older")
    refused = export("sft", "--to", "ollama")
    assert refused.code == 2 and "exists and is not empty; --overwrite replaces an older export" in refused.err
    replaced = export("sft", "--to", "ollama", "--overwrite", "--dtype", "bf16")
    assert replaced.code == 0, replaced.err
    assert not (tmp_path / "out/adapter_config.json").exists()
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert "FROM ." in lines and 'PARAMETER stop "<|im_end|>"' in lines and f"PARAMETER num_ctx {CONTEXT}" in lines
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_doubt_is_the_last_thing_said(
    command: Callable[..., Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary with bytes to fall back on is SentencePiece's, and no `tokenizer.model` is there. Exit code 0: the
    files are what was trained."""
    from lowrank_align.base import Base

    base_folder = tmp_path / "base"
    shutil.copytree(tiny_llama, base_folder)
    tokenizer = json.loads((base_folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    (base_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    base = Base.load(str(base_folder), quantize="none", device="cpu")
    base.add_role("policy", rank=1)
    base.save_role("policy", tmp_path / "adapter")
    (tmp_path / SCRIPT).write_text("import sys\nfrom pathlib import Path\nPath(sys.argv[3]).write_text('GGUF')\n")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    doubt = "the base has a SentencePiece tokenizer without its tokenizer.model: "
    cases = {
        "ollama": ("Ollama cannot read its vocabulary", "Ollama may not import it"),
        "gguf": ("llama.cpp may cut prompts into other tokens than in training", "llama.cpp may cut prompts otherwise"),
    }
    for to, (told, short) in cases.items():
        out = tmp_path / to
        outcome = command("export", "--adapter", tmp_path / "adapter", "--out", out, "--device", "cpu", "--to", to)
        assert outcome.code == 0, outcome.err
        assert outcome.out.splitlines()[-2:] == [doubt + told, f"{out}: {to}, checked; {short}: see above"]
        assert f"- {doubt}{told}" in (out / "README.md").read_text()


def test_gguf_with_a_stand_in_for_the_converter(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter gets a whole model folder, of which nothing but its file is left; without one, exit code 3."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export("sft", "--to", "gguf").code == 3
    (tmp_path / SCRIPT).write_text(
        "import sys\nfrom pathlib import Path\nnames = {file.name for file in Path(sys.argv[1]).iterdir()}\n"
        "assert {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'} <= names\n"
        "Path(sys.argv[3]).write_text(' '.join(sys.argv[4:]))"
    )
    outcome = export("sft", "--to", "gguf", "--dtype", "bf16")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out/model.gguf").read_text() == "--outtype bf16"
    assert "FROM ./model.gguf" in (tmp_path / "out/Modelfile").read_text()
    names = {"model.gguf", "Modelfile", "README.md", "parity.json", "export.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_a_template_on_record_is_taken_while_it_is_the_same(
    export: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    mine, text = tmp_path / "mine.jinja", TURNS + "{# mine #}"
    mine.write_text(text)
    shutil.copytree(trained / "sft", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    record["config"]["chat_template"] = str(mine)
    record["template_hash"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(record))
    assert export(tmp_path / "run", "--to", "adapter").code == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text


def test_mistakes_are_one_line(
    export: Callable[..., Any], trained: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained / "sft", unfinished)
    (unfinished / "run.json").write_text('{"state": "stopped", "steps": 1}')
    value = tmp_path / "ppo" / "value"
    shutil.copytree(trained / "reward" / "adapter", value)
    config = json.loads((value / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
    (value / "adapter_config.json").write_text(json.dumps(config))
    gone = tmp_path / "gone"
    shutil.copytree(trained / "sft", gone)
    record = json.loads((gone / "provenance.json").read_text()) | {"base": "/no/such/base"}
    (gone / "provenance.json").write_text(json.dumps(record))
    theirs, private = tmp_path / "theirs", tmp_path / "private.txt"
    private.write_text("{{ messages }} of mine")
    shutil.copytree(trained / "sft", theirs)
    record = json.loads((theirs / "provenance.json").read_text())
    record["config"]["chat_template"] = str(private)
    (theirs / "provenance.json").write_text(json.dumps(record))
    cases: list[tuple[Any, tuple[object, ...], str]] = [
        (theirs, ("--to", "adapter"), f"its chat template {private} is gone or has changed since; name one with"),
        ("nothing", (), "no such run or adapter folder"),
        (unfinished, (), "not finished (stopped at step 1); --resume it first"),
        (value, (), "is a value model, of use to PPO alone"),
        (gone, (), "its base is not found (/no/such/base: no such model folder"),
        ("sft", ("--model", model_folder("llama")), "made for"),
        ("sft", ("--dtype", "fp8"), "dtype"),
        ("sft", ("--to", "onnx"), "to: "),
        ("sft", ("--to", "adapter", "--dtype", "bf16"), "--dtype bf16: is about merged weights"),
        ("sft", ("--to", "adapter", "--as-trained"), "--as-trained: is about merged weights"),
        ("sft", ("--chat-template", "nope"), "chat_template: nope: no such file"),
    ]
    for run, flags, problem in cases:
        outcome = export(run, *flags)
        assert outcome.code == 2 and problem in outcome.err and len(outcome.err.splitlines()) == 1, outcome
    inside = export("sft", out=trained / "sft" / "export")
    assert inside.code == 2 and "lies in the run" in inside.err
    assert not (tmp_path / "out").exists()
