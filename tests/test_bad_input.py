"""What a user can get wrong: one line on stderr, an exit code, nothing written, and no model loaded for it.

Every message is written out here as the user has to see it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Command = Callable[..., Any]
Change = Callable[[Path], object]

FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
GOOD = {"prompt": "Say: ", "completion": "a word"}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"says the {role}"} for role in roles]}


@pytest.fixture(autouse=True)
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with good rows, a run `old` that must survive, and the runs of `trained` to start from."""
    shutil.copytree(trained / "sft", tmp_path / "old")
    (tmp_path / "trained").symlink_to(trained)
    for name in ("demonstrations.jsonl", "pairs.jsonl"):
        shutil.copyfile(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of reward functions, beside them
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_align.base import Base

    monkeypatch.setattr(Base, "load", lambda *_args, **_options: pytest.fail("the model was loaded"))


@pytest.fixture
def refused(here: Path, no_model: None, command: Command) -> Callable[..., None]:
    """`refused(code, message, *argv)`: the command ends so, with this one line, and every file is as it was."""

    def check(code: int, message: str, *argv: object) -> None:
        before = content_of(here)
        outcome = command(*argv)
        assert outcome.err == f"error: {message}\n"
        assert outcome.code == code
        assert content_of(here) == before

    return check


def content_of(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ---- rows

# of the catalogues in torture/bad_files.py and bad_rows.py, for the commands that do not train
ROWS: dict[str, tuple[bytes, str]] = {
    "malformed": (
        lines(GOOD) + b'{"prompt": "a", \n',
        "rows.jsonl:2: not JSON: Expecting property name enclosed in double quotes (column 17)",
    ),
    "wrong type": (
        lines({"prompt": 3, "completion": "b"}),
        "rows.jsonl:1: prompt: a number, must be text or a list of messages",
    ),
    "empty field": (lines(GOOD, {**GOOD, "completion": " \n"}), "rows.jsonl:2: completion: empty"),
    "not UTF-8": (
        lines(GOOD) + '{"prompt": "é"}\n'.encode("latin-1"),
        "rows.jsonl:2: not UTF-8 (at byte 12 of the line), save it as UTF-8",
    ),
    "last turn the user's": (
        lines(chat("user", "assistant", "user")),
        "rows.jsonl:1: messages: the last turn is of role user, must be the assistant's",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_other_commands(name: str, refused: Callable[..., None], tiny_llama: Path) -> None:
    """The file that is there is not replaced either."""
    content, message = ROWS[name]
    Path("rows.jsonl").write_bytes(content)
    Path("old.jsonl").write_text("precious\n")
    common = ("--model", tiny_llama, "--data", "rows.jsonl")
    refused(2, message, "show", *common)
    refused(2, message, "logps", *common, "--quantize", "none", "--out", "old.jsonl", "--overwrite")
    refused(2, message, "score", *common, "--quantize", "none", "--out", "new.jsonl", "--adapter", "trained/reward")


def test_a_role_that_the_template_refuses(refused: Callable[..., None], tiny_llama: Path) -> None:
    """The plain template raises for turns of role tool; the row is named, in every command."""
    Path("rows.jsonl").write_bytes(lines(chat("tool", "assistant")))
    Path("prompts.jsonl").write_bytes(lines({"prompt": chat("user", "tool")["messages"]}))
    why = "the plain template knows user, assistant and one system turn at the beginning"
    refusal = f"the chat template refuses this conversation ({why})"
    common = ("--model", tiny_llama, "--chat-template", "plain", "--out", "new", "--quantize", "none")
    refused(2, f"rows.jsonl:1: messages: {refusal}", "sft", "--data", "rows.jsonl", *common)
    refused(2, f"rows.jsonl:1: messages: {refusal}", "logps", "--data", "rows.jsonl", *common)
    refused(2, f"prompts.jsonl:1: prompt: {refusal}", "generate", "--prompts", "prompts.jsonl", *common)
    ppo = ("ppo", "--reward", "trained/reward", "--prompts", "prompts.jsonl", "--max-new-tokens", 4)
    refused(2, f"prompts.jsonl:1: prompt: {refusal}", *ppo, *common)


def test_tools_nested_deep(command: Command, tiny_llama: Path) -> None:
    """They are rendered or refused in one line, as far as this Python's recursion goes."""
    row = json.dumps({**chat("user", "assistant"), "tools": ["DEEP"]}).replace(
        '"DEEP"', '{"a":' * 900 + "1" + "}" * 900
    )
    Path("rows.jsonl").write_text(row)
    Path("t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tools | tojson if tools }}")
    argv = ("--model", tiny_llama, "--data", "rows.jsonl", "--out", "new", "--chat-template", "t.jinja", *FEW)
    outcome = command("sft", *argv)
    assert outcome.code == 2
    assert outcome.err.startswith(("error: rows.jsonl:1: ", "error: no row is left of 1 "))
    assert outcome.err.count("\n") == 1


# ---- where rows, model and output are


@pytest.mark.parametrize(
    ("code", "message", "argv"),
    [
        (2, "pair.jsonl: no such file (did you mean pairs.jsonl?)", ("--data", "pair.jsonl")),
        (2, "no/rows.jsonl: no such file, nor is its folder no", ("--data", "no/rows.jsonl")),
        (2, "empty: no data files in this folder (looked for .jsonl, .json, .ndjson, .jsonl.gz, .json.gz, .ndjson.gz, "
            ".parquet)", ("--data", "empty")),
        (2, "null: the file is empty", ("--data", os.devnull)),
        (3, "some/name: neither a file here nor a dataset in the cache, and the hub cannot be reached (check "
            "the name, go online once, or give a file)", ("--data", "some/name")),
        (2, "data: empty", ("--data", "")),
        (2, "model: empty", ("--model", " ")),
        (2, "out: empty", ("--out", "")),
        (2, "./no-model: no such model folder", ("--model", "./no-model")),
        (2, "empty: no config.json in this folder; --model takes a transformers model folder, a hub id or tiny",
            ("--model", "empty")),
        (2, "pairs.jsonl: is a file; --model takes a model folder, a hub id or tiny", ("--model", "pairs.jsonl")),
        (2, "some/name: no such folder, and the hub cannot be reached for it (HF_HUB_OFFLINE is set)",
            ("--model", "some/name")),
        (2, "old: exists and is not empty; --resume goes on with it, --overwrite replaces it", ("--out", "old")),
        (2, "pairs.jsonl: is a file; name a folder with --out", ("--out", "pairs.jsonl")),
        (2, "{here}/pairs.jsonl/new: {here}/pairs.jsonl is a file, so nothing can be made in it; choose another --out",
            ("--out", "{here}/pairs.jsonl/new")),
        (2, "full: holds files but is no run, so it is left alone; choose another --out",
            ("--out", "full", "--overwrite")),
        (2, "full: holds files but is no run, so it is left alone; choose another --out",
            ("--out", "full", "--resume")),
        (2, "--resume: old is a run of sft, not dpo; choose another --out", ("--out", "old", "--resume")),
        (2, "--overwrite would remove old, which --adapter names; choose another --out",
            ("--out", "old", "--adapter", "old", "--overwrite")),
        (2, "--overwrite would remove old/pairs.jsonl, which --data names; choose another --out",
            ("--out", "old", "--data", "old/pairs.jsonl", "--overwrite")),
        (2, "resume and overwrite exclude each other", ("--out", "old", "--resume", "--overwrite")),
    ],
)  # fmt: skip
def test_places(
    code: int, message: str, argv: tuple[str, ...], here: Path, refused: Callable[..., None], tiny_llama: Path
) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/precious.txt").touch()
    shutil.copyfile("pairs.jsonl", "old/pairs.jsonl")
    given = {"--model": tiny_llama, "--data": "pairs.jsonl", "--out": "new"}
    common = [word for flag, value in given.items() if flag not in argv for word in (flag, value)]
    given_here = [word.format(here=here) for word in argv]
    refused(code, message.format(here=here), "dpo", *common, *given_here, "--quantize", "none")


@pytest.mark.parametrize(
    ("code", "message", "out"),
    [
        (2, "pairs.jsonl: exists; --overwrite replaces it", "pairs.jsonl"),
        (2, "old: is a folder; name a .jsonl file with --out", "old"),
        (2, "{here}/pairs.jsonl/x.jsonl: {here}/pairs.jsonl is a file, so nothing can be made in it; choose "
            "another --out",
            "{here}/pairs.jsonl/x.jsonl"),
    ],
)  # fmt: skip
def test_files_to_write(code: int, message: str, out: str, here: Path, refused: Any, tiny_llama: Path) -> None:
    argv = ("--model", tiny_llama, "--quantize", "none", "--out", out.format(here=here))
    refused(code, message.format(here=here), "generate", "--prompts", "pairs.jsonl", *argv)
    refused(code, message.format(here=here), "score", "--data", "pairs.jsonl", *argv, "--adapter", "trained/reward")


def test_no_permission(here: Path, refused: Callable[..., None], tiny_llama: Path) -> None:
    closed = here / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    message = f"closed/new: no permission to write in {closed}; choose another --out"
    refused(3, message, "dpo", "--model", tiny_llama, "--data", "pairs.jsonl", *FEW, "--out", "closed/new")


def test_a_name_that_is_too_long(refused: Callable[..., None], tiny_llama: Path) -> None:
    """Nothing in particular looks for it: the last net says which file and why."""
    name = "r" * 300
    refused(
        3, f"{name}: File name too long", "dpo", "--model", tiny_llama, "--data", "pairs.jsonl", "--out", name, *FEW
    )


# ---- settings


@pytest.mark.parametrize(
    ("code", "message", "argv"),
    [
        (2, "--learning-rte: no such flag (did you mean --learning-rate?)", ("--learning-rte", "1")),
        (2, "--max-step: no such flag (did you mean --max-steps?)", ("--max-step", "1")),
        (2, "--batchsize: no such flag (did you mean --batch-size?), --qqq: no such flag", ("--batchsize=3", "--qqq")),
        (2, "stray: unexpected; every value needs its flag", ("stray",)),
        (2, "argument --rank: expected one argument", ("--rank",)),
        (2, "max_steps: input should be greater than 0 (got '-1')", ("--max-steps", "-1")),
        (2, "learning_rate: input should be a finite number (got 'nan')", ("--learning-rate", "nan")),
        (2, "batch_size: input should be a valid integer, unable to parse string as an integer (got '1e3')",
            ("--batch-size", "1e3")),
        (2, f"seed: input should be less than 9223372036854775808 (got '{10**30}')", ("--seed", str(10**30))),
        (2, "quantize: input should be 'nf4', 'int8' or 'none' (got 'nf5') (did you mean nf4?)", ("--quantize", "nf5")),
        (2, "max_length: 1, must be at least 2 (one token of prompt, one of answer)", ("--max-length", "1")),
        (2, "eval_rows: 6 of 6 rows, must be at least 1 and leave some to train on", ("--eval-rows", "6")),
        (2, "held-out/rows.gz: no such file, nor is its folder held-out", ("--eval-data", "held-out/rows.gz")),
        (2, "early_stopping needs held-out rows (eval_data or eval_rows)", ("--early-stopping", "1")),
        (2, "chat_template: tmplt.jinja: no such file, nor a template of the tokenizer (did you mean template.jinja?)",
            ("--chat-template", "tmplt.jinja")),
        (2, "the chat template (named by the user) does not work: the chat template refuses this conversation "
            "(Unexpected end of template. Jinja was looking for the following tags: 'elif' or 'else' or 'endif'. The "
            "innermost block that needs to be closed is 'if'.)", ("--chat-template", "template.jinja")),
        (2, "target_modules: q_prj: no such linear layer (did you mean q_proj?) (there are: down_proj, "
            "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)", ("--target-modules", "v_proj", "q_prj")),
        (2, "report_to: tensorbord: no such tracker (did you mean tensorboard?)", ("--report-to", "tensorbord")),
        (2, "--device gpu: unknown; use auto, cpu, cuda, cuda:N, xpu or mps", ("--device", "gpu")),
        (2, "no.yaml: no such configuration file", ("--config", "no.yaml")),
    ],
)  # fmt: skip
def test_settings(
    code: int, message: str, argv: tuple[str, ...], refused: Callable[..., None], tiny_llama: Path
) -> None:
    Path("template.jinja").write_text("{% if messages %}")
    refused(code, message, "dpo", "--model", tiny_llama, "--data", "pairs.jsonl", "--out", "new", *FEW, *argv)
    refused(
        code, message, "dpo", "--model", tiny_llama, "--data", "pairs.jsonl", "--out", "old", "--overwrite", *FEW, *argv
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte: 1\n", "c.yaml: learning_rte: unknown setting (did you mean learning_rate?)"),
        (
            "rank: many\n",
            "c.yaml: rank: input should be a valid integer, unable to parse string as an integer (got 'many')",
        ),
        ("- rank: 2\n", "c.yaml: needs lines of `setting: value`"),
        ("rank: [1\nseed: 2\n", "c.yaml:2: not valid YAML (expected ',' or ']', but got ':')"),
        ("seed: 2020-13-45\n", "c.yaml: not valid YAML (month must be in 1..12)"),
        ("rank: " + "[" * 1000, "c.yaml: nested too deep; needs lines of `setting: value`"),
        ('eval_data: "a\\0b"\n', "c.yaml: eval_data: contains a NUL character"),
        ('chat_template: "a\\ud800"\n', "c.yaml: chat_template: not UTF-8 (at character 2); rename the file"),
        ("target_modules: ['']\n", "c.yaml: target_modules: empty"),
    ],
)
def test_configuration_files(content: str, message: str, refused: Callable[..., None], tiny_llama: Path) -> None:
    Path("c.yaml").write_text(content)
    argv = ("--model", tiny_llama, "--data", "pairs.jsonl", "--out", "new", "--quantize", "none")
    refused(2, message, "dpo", "--config", "c.yaml", *argv)


def test_rows_by_their_other_name(refused: Callable[..., None]) -> None:
    refused(2, "--data: no such flag (here it is --prompts)", "grpo", "--model", "m", "--data", "d")
    refused(2, "--prompts: no such flag (here it is --data)", "dpo", "--model", "m", "--prompts", "d")


def test_no_such_command(refused: Callable[..., None]) -> None:
    known = (
        "demo, sft, reward, dpo, kto, condition, coh, ppo, grpo, rloo, online-dpo, expert, quark, presets, plan, "
        "audit, show, generate, chat, eval, score, logps, export, studio, frontier, rounds, doctor, data, runs"
    )
    refused(2, f"generat: no such command (did you mean generate?) (there are: {known})", "generat", "--model", "m")
    refused(2, "model: missing; give --model, --preset or a line in the --config file", "generate")


# ---- the machine


@pytest.mark.parametrize(
    ("message", "argv"),
    [
        (f"--device cuda: this torch ({torch.__version__}) sees no such device; use --device cpu, or install "
            "the torch build "
         "for your GPU (PyTorch's install selector names it)", ("--device", "cuda")),
        ("--optimizer paged_adamw_8bit needs a CUDA GPU; use adamw", ("--optimizer", "paged_adamw_8bit")),
        ("--attention flex_attention needs a GPU; use auto on the CPU", ("--attention", "flex_attention")),
        ("--report-to comet_ml: its package is not installed", ("--report-to", "comet_ml")),
        ("new: only 50 MB free on its disk; a run needs 67 MB", ("--seed", "50")),
    ],
)  # fmt: skip
def test_what_the_machine_lacks(
    message: str, argv: tuple[str, ...], refused: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB, which is 67 MB, is what a run wants free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(import_module("lowrank_align.checks"), "get_available_trackers", list)
    if argv == ("--seed", "50"):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 50 * 10**6, 50 * 10**6)
        )
    refused(3, message, "dpo", "--model", tiny_llama, "--data", "pairs.jsonl", "--out", "new", *FEW, *argv)
    if argv[0] in ("--device", "--attention"):
        refused(3, message, "logps", "--model", tiny_llama, "--data", "pairs.jsonl", "--out", "new", *argv)


# ---- adapters and rewards


def without_a_tensor(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, file)


def changed(name: str, **changes: Any) -> Change:
    """Changes some keys of a JSON file in a run."""

    def change(run: Path) -> None:
        file = run / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def written(name: str, content: str) -> Change:
    return lambda run: (run / name).write_text(content)


def gone(name: str) -> Change:
    return lambda run: (run / name).unlink()


BROKEN_JSON = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "another base": (
        changed("provenance.json", base="other/model", base_hash="ab" * 32),
        "start: made for other/model (weights abababababab), not for {model} (weights {hash}); load it on its own base",
    ),
    "a missing tensor": (
        without_a_tensor,
        "start: 1 tensors missing (first: model.layers.1.mlp.up_proj.lora_B.weight); the adapter is incomplete, "
        "or made "
        "for another base",
    ),
    "damaged weights": (
        written("adapter/adapter_model.safetensors", "cut"),
        "start/adapter/adapter_model.safetensors: cannot be read (Error while deserializing header: header too "
        "small); the "
        "file is damaged",
    ),
    "no weights": (gone("adapter/adapter_model.safetensors"), "start: holds no adapter_model.safetensors"),
    "no settings": (
        lambda run: shutil.rmtree(run / "adapter"),
        "start: holds no adapter_config.json; give a run's folder or a PEFT adapter folder (an unfinished run? "
        "--resume it "
        "first)",
    ),
    "damaged settings": (
        written("adapter/adapter_config.json", "{x"),
        f"start/adapter/adapter_config.json: not readable as JSON ({BROKEN_JSON})",
    ),
    "settings without targets": (
        changed("adapter/adapter_config.json", target_modules=None),
        "start/adapter: adapter_config.json has no target_modules, or no whole number as r (the rank)",
    ),
    "no LoRA": (
        changed("adapter/adapter_config.json", peft_type="IA3"),
        "start/adapter: a IA3 adapter; only LoRA is supported",
    ),
    "damaged provenance": (
        written("provenance.json", "{x"),
        f"start/provenance.json: not valid JSON ({BROKEN_JSON}); restore it or make it again",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, refused: Callable[..., None], trained: Path, tiny_llama: Path) -> None:
    change, message = ADAPTERS[name]
    shutil.copytree("trained/sft", "start")
    base_hash = json.loads(Path("start/provenance.json").read_text())["base_hash"]
    change(Path("start"))
    message = message.format(model=tiny_llama, hash=base_hash[:12])
    common = ("--model", tiny_llama, "--adapter", "start", "--quantize", "none")
    refused(2, message, "dpo", "--data", "pairs.jsonl", "--out", "new", *common)
    refused(2, message, "logps", "--data", "pairs.jsonl", "--out", "new.jsonl", *common)


def test_runs_of_the_wrong_kind(refused: Callable[..., None], tiny_llama: Path) -> None:
    common = ("--model", tiny_llama, "--quantize", "none", "--out", "new")
    not_policy = "trained/reward: is a reward run, where a policy is expected"
    not_reward = "trained/sft: is a policy run, where a reward is expected"
    ppo = ("ppo", "--prompts", "pairs.jsonl", *common)
    refused(2, not_policy, "dpo", "--data", "pairs.jsonl", *common, "--adapter", "trained/reward")
    refused(2, not_policy, *ppo, "--adapter", "trained/reward", "--reward", "trained/reward")
    refused(2, not_policy, "generate", "--prompts", "pairs.jsonl", *common, "--adapter", "trained/reward")
    refused(2, not_reward, *ppo, "--reward", "trained/sft")
    refused(2, not_reward, "score", "--data", "pairs.jsonl", *common, "--adapter", "trained/sft")
    refused(2, "runs/no: no such run or adapter folder", *ppo, "--reward", "runs/no")
    refused(2, "pairs.jsonl: no such run or adapter folder", *ppo, "--reward", "pairs.jsonl")


def test_shifted_without_a_shift(refused: Callable[..., None], tiny_llama: Path) -> None:
    shutil.copytree("trained/reward", "plain")
    argv = ("score", "--model", tiny_llama, "--quantize", "none", "--data", "pairs.jsonl", "--out", "new", "--shifted")
    Path("plain/reward.json").unlink()
    message = "--shifted: plain has no reward.json, so no shift; leave --shifted out"
    refused(2, message, *argv, "--adapter", "plain")


@pytest.mark.parametrize(
    ("source", "reward", "message"),
    [
        (None, "no_such_module:f", "no_such_module:f: no module no_such_module in the current folder or the "
            "environment"),
        ("def g(): ...", "{name}:f", "{name}:f: module {name} has no function f"),
        ("def f(:", "{name}:f", "{name}:f: importing {name} failed: SyntaxError: invalid syntax ({name}.py, line 1)"),
        ("import no_such_module", "{name}:f", "{name}:f: its module imports no_such_module, which is not installed"),
        ("1 / 0", "{name}:f", "{name}:f: importing {name} failed: ZeroDivisionError: division by zero"),
        ("def f(answer): ...", "{name}:f", "{name}:f: is called as function(prompts, completions), and that does not "
            "fit it: too many positional arguments"),
    ],
)  # fmt: skip
def test_reward_functions(
    source: str | None, reward: str, message: str, refused: Any, tiny_llama: Path, here: Path
) -> None:
    name = here.name  # a module of the test's own: Python imports each name once
    if source is not None:
        Path(f"{name}.py").write_text(source)
    argv = ("ppo", "--model", tiny_llama, "--prompts", "pairs.jsonl", "--out", "new", *FEW)
    refused(2, message.format(name=name), *argv, "--reward", reward.format(name=name))


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise ValueError('too\\nlong')", 2, "raised ValueError: too long ({name}.py:2) for the prompt '"),
        ("return [1.0, 2.0, 3.0]", 2, "gave 3 scores for 1 completion for the prompt '"),
        ("return [0.5] if len(completions) > 1 else [1.0]", 2, "gave 1 scores for 2 completions, though not for any"),
        ("return None", 2, "returned None, which is not a list with a number for each completion, for the prompt '"),
        ("return [None for _ in prompts]", 2, "returned [None], which is not a list"),
        ("return '1' * len(prompts)", 2, "returned '1', which is not a list"),
        ("return [float('nan')] * len(completions)", 4, "gave nan for the prompt '"),
    ],
)
def test_reward_functions_that_fail(
    body: str, code: int, message: str, command: Command, tiny_llama: Path, here: Path
) -> None:
    """Only now, in the first step, can it be known: still one line, and the run it leaves counts as stopped."""
    name = here.name
    Path(f"{name}.py").write_text(f"def f(prompts, completions):\n    {body}\n")
    argv = ("--model", tiny_llama, "--prompts", "pairs.jsonl", "--out", "new", "--max-new-tokens", 3, *FEW)
    outcome = command("ppo", *argv, "--reward", f"{name}:f")
    assert outcome.code == code
    assert outcome.err.startswith(f"error: {name}:f: {message.format(name=name)}")
    assert outcome.err.count("\n") == 1
    assert json.loads(Path("new/run.json").read_text())["state"] == "stopped"


# ---- model folders


def cut(name: str, size: int) -> Change:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:size])


MODELS: dict[str, tuple[Change, str]] = {
    "config no JSON": (
        written("config.json", "{x"),
        "model: config.json cannot be used: It looks like the config file at ",
    ),
    "config empty": (written("config.json", "{}"), "model: config.json cannot be used: Unrecognized model in "),
    "unknown architecture": (
        changed("config.json", model_type="nosuch"),
        "model: config.json cannot be used: model_type nosuch is not known to transformers ",
    ),
    "needs code of its own": (
        changed("config.json", model_type="nosuch", auto_map={"AutoConfig": "code.Config"}),
        "model: config.json cannot be used: ",
    ),
    "quantised already": (
        changed("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "model: its weights are already quantised (gptq); give the 16-bit model, it is quantised while loading",
    ),
    "no tokenizer": (
        gone("tokenizer.json"),
        "model: its tokenizer cannot be loaded (is tokenizer.json there and whole?): ",
    ),
    "damaged tokenizer": (
        written("tokenizer.json", "{x"),
        "model: its tokenizer cannot be loaded (is tokenizer.json there and whole?): ",
    ),
    "broken template": (
        written("chat_template.jinja", "{% if %}"),
        "the chat template (the model's own) does not work: the chat template refuses this conversation (",
    ),
    "other width": (
        changed("config.json", hidden_size=32),
        "model: 21 weights are not of the shape that its config.json says (first: lm_head.weight)",
    ),
    "more layers": (
        changed("config.json", num_hidden_layers=3),
        "model: 9 weights are missing from its files (first: ",
    ),
    "encoder and decoder": (
        changed("config.json", model_type="t5", architectures=["T5Model"]),
        "model: a t5 is no causal language model; give one as --model",
    ),
    "cut weights": (cut("model.safetensors", -100), "model: cannot be loaded as a causal language model: "),
    "cut header": (cut("model.safetensors", 50), "model: cannot be loaded as a causal language model: "),
    "pickled weights": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        "{here}/model: no *.safetensors; other weight formats are not read, convert the model first",
    ),
    "no shard": (
        lambda model: (gone("model.safetensors")(model), written("model.safetensors.index.json", "{")(model)),
        "{here}/model/model.safetensors.index.json: not valid JSON (",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_folders(name: str, here: Path, command: Command, tiny_llama: Path) -> None:
    """Alone and with an adapter, which is looked at before: each time one line, exit code 2, nothing written."""
    change, message = MODELS[name]
    shutil.copytree(tiny_llama, "model")
    change(Path("model"))
    before = content_of(here)
    argv = ("--model", "model", "--data", "pairs.jsonl", "--out", "new", "--quantize", "none")
    outcome = command("dpo", *argv)
    assert outcome.err.startswith(f"error: {message}".replace("{here}", str(here)))
    for more in ((), ("--adapter", "trained/sft")):
        outcome = command("dpo", *argv, *more)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert content_of(here) == before


# ---- --skip-bad


def test_skip_bad(command: Command, tiny_llama: Path) -> None:
    """Of six rows two are bad, one is refused by the template, one is too long: two are trained on, and each of the
    others is in a file, with where and why."""
    rows = [
        GOOD,
        {**GOOD, "prompt": 3},
        {**GOOD, "prompt": "a" * 300},
        chat("tool", "assistant"),
        {**GOOD, "prompt": "b "},
    ]
    Path("rows.jsonl").write_bytes(lines(*rows) + b"{nope\n")
    argv = ("--model", tiny_llama, "--data", "rows.jsonl", "--out", "new", "--chat-template", "plain", *FEW)
    outcome = command("sft", *argv, "--skip-bad")
    assert (outcome.code, outcome.err) == (0, "")
    told = outcome.out.splitlines()
    assert "rows.jsonl: 2 bad rows set aside in bad_rows.jsonl" in told
    assert "rows.jsonl: 1 rows that the chat template refuses set aside in bad_rows.jsonl" in told
    no_room = "rows.jsonl:3: the prompt leaves no room"
    assert f"rows.jsonl: 1 of 4 rows dropped, listed in dropped_rows.jsonl (first: {no_room})" in told
    bad = [json.loads(line) for line in Path("new/bad_rows.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in bad] == ["rows.jsonl:2", "rows.jsonl:6", "rows.jsonl:4"]
    assert bad[0]["error"] == "rows.jsonl:2: prompt: a number, must be text or a list of messages"
    assert bad[1]["row"] == "{nope"
    dropped = [json.loads(line) for line in Path("new/dropped_rows.jsonl").read_text().splitlines()]
    assert dropped == [{"where": "rows.jsonl:3", "reason": "the prompt leaves no room"}]


def test_skip_bad_of_held_out_rows(command: Command, tiny_llama: Path) -> None:
    Path("rows.jsonl").write_bytes(lines(GOOD, {**GOOD, "prompt": 3}))
    argv = ("--model", tiny_llama, "--data", "demonstrations.jsonl", "--eval-data", "rows.jsonl", "--out", "new", *FEW)
    assert command("sft", *argv).code == 2
    outcome = command("sft", *argv, "--skip-bad")
    assert outcome.code == 0
    assert "rows.jsonl: 1 bad rows set aside in eval_bad_rows.jsonl" in outcome.out
    assert not Path("new/bad_rows.jsonl").exists()
    assert len(Path("new/eval_bad_rows.jsonl").read_text().splitlines()) == 1


def test_skip_bad_needs_a_good_row(refused: Callable[..., None], tiny_llama: Path) -> None:
    Path("rows.jsonl").write_bytes(lines({**GOOD, "prompt": 3}, {**GOOD, "prompt": 4}))
    message = (
        "no good row remains: 2 bad (the first: rows.jsonl:1: prompt: a number, must be text or a list of messages)"
    )
    argv = ("sft", "--model", tiny_llama, "--data", "rows.jsonl", *FEW, "--skip-bad")
    refused(2, message, *argv, "--out", "new")
    refused(2, message, *argv, "--out", "old", "--overwrite")


# ---- runs that were damaged


@pytest.fixture
def stopped(command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The folder `new` holds a run stopped at step 1 of 2; the command that goes on with it."""
    from lowrank_align.stopping import StopSignals

    argv = ("sft", "--model", tiny_llama, "--data", "demonstrations.jsonl", "--out", "new", *FEW, "--max-steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "asked", property(lambda self: True, lambda self, value: None), raising=False)
        assert command(*argv).code == 75
    return (*argv, "--resume")


DAMAGE: dict[str, Change] = {
    "run.json": written("run.json", "{x"),
    "run.json of another program": written("run.json", '["state"]'),
    "run.json lost": gone("run.json"),
    "provenance.json": written("provenance.json", "{x"),
    "provenance.json lost": gone("provenance.json"),
    "metrics.jsonl": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe{\n[]\n"),
    "metrics.jsonl lost": gone("metrics.jsonl"),
    "manifest": written("checkpoints/step-1/manifest.json", "{x"),
    "tensors": cut("checkpoints/step-1/tensors.safetensors", 100),
    "state": written("checkpoints/step-1/state.json", "{}"),
    "checkpoints lost": lambda run: shutil.rmtree(run / "checkpoints"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_runs_are_resumed(name: str, stopped: tuple[object, ...], command: Command) -> None:
    """From the checkpoint where it is whole, else from the start: the adapter is that of a run that went through."""
    DAMAGE[name](Path("new"))
    outcome = command(*stopped)
    assert (outcome.code, outcome.err) == (0, "")
    assert ("resumed from step-1 of 2 steps" in outcome.out) == (
        name not in ("manifest", "tensors", "state", "checkpoints lost")
    )
    assert command(*(word if word != "new" else "whole" for word in stopped)).code == 0
    weights = "adapter/adapter_model.safetensors"
    assert Path("new", weights).read_bytes() == Path("whole", weights).read_bytes()
    state = json.loads(Path("new/run.json").read_text())
    assert (state["state"], state["steps"]) == ("finished", 2)


def test_damage_that_cannot_be_mended(stopped: tuple[object, ...], refused: Callable[..., None]) -> None:
    """Without the settings nobody knows what is being resumed."""
    Path("new/config.yaml").write_text("rank: [\n")
    refused(2, "new/config.yaml:2: not valid YAML (expected the node content, but found '<stream end>')", *stopped)
    Path("new/config.yaml").unlink()
    message = "--resume: new has checkpoints but no config.yaml to go on with; choose another --out"
    refused(2, message, *stopped)


def test_a_run_that_another_process_works_in(
    stopped: tuple[object, ...], refused: Callable[..., None], command: Command, here: Path
) -> None:
    """Refused with its pid whatever the flags, and before anything is loaded; free again when the process has ended."""
    code = "import sys; from pathlib import Path; from lowrank_align.runs import FolderLock\n"
    code += "lock = FolderLock(Path('new')); print('locked', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout and child.stdout.readline() == "locked\n"
        started = Path("new/.lock").read_text().splitlines()[1]
        message = f"new: in use by another process (pid {child.pid}, {started}); wait for it or stop it"
        for flags in (("--resume",), ("--overwrite",), ()):
            refused(2, message, *stopped[:-1], *flags)
        refused(2, message, "runs", "--delete", "new", "--yes")
        child.kill()
    assert command("runs", "--delete", "new", "--yes").code == 0
    assert not (here / "new").exists()
