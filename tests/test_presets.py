"""The preset files, how they are read and listed, and what is said where a model differs from its preset."""

import hashlib
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.architecture import Architecture, UnknownFigures, figures_of
from lowrank_align.cli import OTHER_COMMANDS, make_parser
from lowrank_align.config import METHODS, ChatSettings, PlanSettings, SFTSettings, resolve
from lowrank_align.errors import UserError
from lowrank_align.presets import TAKING, _may_set, header, preset_files, project_files, read_preset, read_preset_file

# What a model's weights take: its linear layers at 4.127 bits, embeddings and head in bf16.
NF4_GIB = {
    "smollm2-135m": 0.10,
    "smollm2-360m": 0.24,
    "smollm2-1.7b": 0.96,
    "smollm3-3b": 1.84,
    "qwen2.5-0.5b": 0.43,
    "qwen2.5-1.5b": 1.06,
    "qwen2.5-7b": 5.17,
    "qwen2.5-14b": 9.25,
    "qwen3-0.6b": 0.50,
    "qwen3-1.7b": 1.26,
    "qwen3-4b": 2.47,
    "qwen3-4b-instruct-2507": 2.47,
    "qwen3-8b": 5.66,
    "qwen3-14b": 9.25,
    "qwen3-32b": 17.9,
    "llama-3.2-1b": 0.96,
    "llama-3.2-3b": 2.09,
    "llama-3.1-8b": 5.31,
    "r1-distill-llama-8b": 5.31,
    "gemma-3-1b": 0.90,
    "gemma-3-4b": 2.79,
    "gemma-3-12b": 7.04,
    "phi-4": 8.46,
    "phi-4-mini": 2.69,
    "mistral-7b": 3.85,
    "ministral-3-3b": 2.20,
    "ministral-3-8b": 5.56,
}
RECURRENT = {"qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b"}
ALL = {*NF4_GIB, *RECURRENT, "gemma-4-e2b", "gemma-4-e4b", "gpt-oss-20b", "qwen3-30b-a3b", "tiny"}
ALL |= {"r1-distill-qwen-1.5b", "r1-distill-qwen-7b"}
# The template of that very model, of which TRL carries a copy (it compares them with the hub's every week).
TRL_TEMPLATES = {
    "qwen3-4b-instruct-2507": "qwen3_instruct_2507",
    "qwen3-8b": "qwen3",
    "llama-3.2-1b": "llama3_2",
    "llama-3.1-8b": "llama3_1",
    "r1-distill-llama-8b": "deepseek_r1_distill",
    "r1-distill-qwen-1.5b": "deepseek_r1_distill",
    "r1-distill-qwen-7b": "deepseek_r1_distill",
    "gemma-3-1b": "gemma3",
    "gemma-3-4b": "gemma3",
    "gemma-3-12b": "gemma3",
    "qwen3.5-0.8b": "qwen3_5_nothink",
    "qwen3.5-2b": "qwen3_5_nothink",
    "qwen3.5-4b": "qwen3_5_think",
    "qwen3.5-9b": "qwen3_5_think",
    "gemma-4-e2b": "gemma4_v5",
}
PRESETS = {name: read_preset_file(file) for name, file in project_files().items()}
PARSER = make_parser()
Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's presets: a folder of the test's own, empty at first."""
    folder = tmp_path / "own presets"
    folder.mkdir()
    monkeypatch.setenv("LOWRANK_ALIGN_PRESETS", str(folder))
    return folder


def trl_template(name: str) -> str:
    spec = find_spec("trl")
    assert spec and spec.origin
    return (Path(spec.origin).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


# ---- the files


def test_all_are_there() -> None:
    assert set(project_files()) == ALL
    assert len(NF4_GIB) >= 25


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_file_names_the_commands_that_run_it(name: str) -> None:
    """They parse, with the preset they give settings that resolve, and every method and the plan is among them."""
    lines = header(project_files()[name])
    assert lines[0].endswith(".")
    commands = [shlex.split(line)[1:] for line in lines if line.strip().startswith("lowrank-align ")]
    for words in commands:
        arguments = vars(PARSER.parse_args(words))
        command = arguments.pop("command")
        if command == "demo":
            continue
        kind = (METHODS | OTHER_COMMANDS)[command]
        settings: Any = resolve(kind, arguments, arguments.pop("config", None))
        assert settings.model == PRESETS[name].model
        assert name == "tiny" or settings.preset == name
    if name != "tiny":
        assert [words[0] for words in commands] == ["plan", "audit", "sft", "reward", "dpo", "ppo", "chat"]


@pytest.mark.parametrize("name", sorted(NF4_GIB))
def test_the_size_in_nf4(name: str) -> None:
    """Within the rounding of the figure and of 4.127; norms are under a thousandth of it."""
    figures = PRESETS[name].architecture
    assert figures is not None
    linear = sum(layer.inputs * layer.outputs * layer.layers for layer in figures.linear_layers())
    tables = (1 if figures.tie_word_embeddings else 2) * figures.vocab_size * figures.hidden_size
    assert (linear * 4.127 / 8 + tables * 2) / 2**30 == pytest.approx(NF4_GIB[name], abs=0.011)


@pytest.mark.parametrize("name", sorted(ALL - {"tiny"}))
def test_adapters_go_on_layers_that_exist(name: str) -> None:
    """On every layer that is packed, but for the small ones that gate or embed."""
    preset = PRESETS[name]
    assert preset.architecture is not None
    names = {layer.name for layer in preset.architecture.linear_layers()}
    small = {"in_proj_a", "in_proj_b", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}
    assert set(preset.settings["target_modules"]) == names - small


@pytest.mark.parametrize("name", sorted(ALL))
def test_flat_rows_where_layers_are_recurrent(name: str) -> None:
    preset = PRESETS[name]
    assert preset.architecture is not None
    assert preset.layout == ("flat" if name in RECURRENT else "tree")
    assert bool(preset.architecture.recurrent_layers) == (name in RECURRENT)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_template_is_verified_only_with_its_hash(name: str) -> None:
    preset = PRESETS[name]
    assert (preset.template_hash is not None) == (name in TRL_TEMPLATES)
    assert name == "tiny" or ("template" in preset.unverified) == (name not in TRL_TEMPLATES)


@pytest.mark.parametrize(("name", "template"), sorted(TRL_TEMPLATES.items()))
def test_the_templates_that_could_be_checked(name: str, template: str, tiny_llama: Path) -> None:
    """Their text has the hash, and plain transformers writes the end of turn right after an answer."""
    from transformers import AutoTokenizer

    preset, text = PRESETS[name], trl_template(template)
    assert hashlib.sha256(text.encode()).hexdigest() == preset.template_hash
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    written = tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False)
    after = written.split("ANSWER")[1]
    assert after.strip() == preset.tokens.end_of_turn
    assert (preset.thinking is None) == ("enable_thinking" not in text)


# ---- their settings


def test_defaults_preset_file_flags(own: Path, tmp_path: Path) -> None:
    """rank is in all three, alpha in preset and file, epochs in the preset alone (its method's wins), seed nowhere."""
    (own / "mine.yaml").write_text(
        "model: from-preset\nsettings: {rank: 4, alpha: 8, epochs: 5}\nmethods: {sft: {epochs: 2}}\n"
    )
    config = tmp_path / "c.yaml"
    config.write_text("rank: 6\nalpha: 12\n")
    settings = resolve(SFTSettings, {"preset": "mine", "data": "d", "out": "o", "rank": "32"}, config)
    assert (settings.model, settings.rank, settings.alpha, settings.epochs) == ("from-preset", 32, 12, 2)
    assert settings.seed == 0
    given = resolve(SFTSettings, {"preset": "mine", "data": "d", "out": "o", "model": "folder"})
    assert (given.model, given.rank) == ("folder", 4)


def test_settings_of_other_commands(own: Path) -> None:
    """A plan takes those of the method that it plans, chat its own."""
    (own / "mine.yaml").write_text(
        "model: m\nsettings: {max_length: 64}\nthinking: false\n"
        "methods: {sft: {micro_batch_size: 3}, ppo: {max_new_tokens: 7}, chat: {max_new_tokens: 9}}\n"
    )
    assert resolve(PlanSettings, {"preset": "mine"}).micro_batch_size == 3
    plan = resolve(PlanSettings, {"preset": "mine", "method": "ppo"})
    assert (plan.max_length, plan.max_new_tokens, plan.micro_batch_size) == (64, 7, None)
    chat = resolve(ChatSettings, {"preset": "mine"})
    assert (chat.model, chat.max_new_tokens, chat.thinking) == ("m", 9, False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("licence: MIT", "model: field required"),
        ("model: ''", "model: string should have at least 1 character (got '')"),
        ("modle: x", "model: field required"),
        ("model: x\nlicense: MIT", "license: no such key (did you mean licence?)"),
        ("model: x\ntokens: {eot: </s>}", "tokens.eot: no such key"),
        ("model: x\narchitecture: {model_type: llama}", "architecture.hidden_size: field required"),
        ("model: x\nlayout: trees", "layout: input should be 'tree' or 'flat' (got 'trees')"),
        ("model: x\nnotes: one", "notes: input should be a valid list (got 'one')"),
        ("model: x\ntemplate_hash: abc", "template_hash: string should match pattern '^[0-9a-f]{64}$' (got 'abc')"),
        ("model: x\nunverified: [everything]", "unverified: input should be 'licence', 'gated', "),
        ("model: x\nname: y", "name: no such key"),
        ("model: x\nsettings: [rank]", "settings: input should be a valid dictionary (got ['rank'])"),
        ("model: x\nsettings: {rnak: 8}", "settings.rnak: no command has this setting (did you mean rank?)"),
        ("model: x\nsettings: {rank: 0}", "settings.rank: for sft: input should be greater than 0 (got 0)"),
        (
            "model: x\nsettings: {lora_dropout: 0.1}",
            "settings.lora_dropout: for dpo: input should be less than or equal to 0 (got 0.1)",
        ),
        ("model: x\nsettings: {rank: [[[[[[8]]]]]]}", "settings.rank: for sft: input should be a valid integer"),
        ("model: x\nsettings: {thinking: no}", "settings.thinking: belongs on a line of its own, `thinking: ...`"),
        ("model: x\nsettings: {reward: 'os:abort'}", "settings.reward: is said on the command line, not in a preset"),
        ("model: x\nmethods: {dop: {beta: 1}}", "methods.dop: no such method (did you mean dpo?)"),
        ("model: x\nmethods: {sft: {beta: 1}}", "methods.sft.beta: sft has no such setting"),
        ("model: x\nmethods: {dpo: {beta: -1}}", "methods.dpo.beta: input should be greater than 0 (got -1)"),
        ("model: x\nmethods: {dpo: {overwrite: yes}}", "methods.dpo.overwrite: is said on the command line, not in"),
        (
            "model: x\nmethods: {dpo: {loss: ipo, label_smoothing: 0.1}}",
            "methods.dpo: label_smoothing is for loss: robust and sigmoid, not ipo",
        ),
        ("model: x\nnotes: a\nmodel: y", "not valid YAML (model stands there twice)"),
        ("model: x\na: &a [x, x]\nnotes: *a", "not valid YAML (aliases (*name) are not taken)"),
        ("", "empty; a preset names at least a model"),
        ("- model", "needs lines of `setting: value`"),
        ("model: {", "not valid YAML"),
    ],
)
def test_a_bad_preset_is_one_line(text: str, problem: str, own: Path, command: Command) -> None:
    """Naming the file and the key, also for the command that takes it."""
    file = own / "bad.yaml"
    file.write_text(text + "\n")
    outcome = command("sft", "--preset", "bad", "--data", "d", "--out", "o")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {file}")
    assert problem in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"model: caf\xe9\n", "not valid YAML (not UTF-8)"),
        (b"model: x\n" + b"# a comment\n" * 10_000, "over 100 kB; a preset is a page"),
        (b"model: " + b"[" * 5000, "nested too deep"),
    ],
    ids=["latin", "large", "deep"],
)
def test_files_that_are_no_text_of_settings(content: bytes, problem: str, own: Path) -> None:
    (own / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_preset("bad")
    assert str(own / "bad.yaml") in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "number"),
    [
        ('model: x\nnotes: [fine, "a\\e[31mred"]', "notes.1", "001B"),
        ('model: x\nlicence: "MIT\\x9b2J"', "licence", "009B"),
        ('model: "x\\n\\ny"', "model", "000A"),
        ('model: x\nsettings: {target_modules: ["a\\0b"]}', "settings.target_modules.0", "0000"),
        ('model: x\n"\\e[2J": 1', "a key", "001B"),
        ('model: x\nsettings: {"ra\\enk": 8}', "a key", "001B"),
    ],
)
def test_a_terminal_is_told_nothing(text: str, place: str, number: str, own: Path, command: Command) -> None:
    """Characters that it would obey are refused, and not printed in the refusal."""
    (own / "bad.yaml").write_text(text + "\n")
    said = f"{own / 'bad.yaml'}: {place}: has a control character (U+{number})\n"
    outcome = command("presets", "bad")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {said}")
    assert f"not usable: {said}" in command("presets").out


def test_a_note_of_several_lines(own: Path) -> None:
    (own / "mine.yaml").write_text("model: x\nnotes:\n  - |\n    One.\n    Two.\n")
    assert read_preset("mine").notes == ["One.\nTwo.\n"]


NEVER = [
    "data",
    "eval_data",
    "prompts",
    "reward",
    "adapter",
    "out",
    "preset",
    "chat_template",
    "system",
    "report_to",
    "gpu",
    "device",
    "to",
    "method",
    "overwrite",
    "resume",
    "auto",
    "force",
    "skip_bad",
    "as_json",
    "as_trained",
    "shifted",
    "seed",
    "save_steps",
    "keep_checkpoints",
]
ALWAYS = (
    "rank alpha learning_rate epochs max_length quantize attention lr_schedule gradient_checkpointing target_modules"
)
ALWAYS += " optimizer dtype batch_size beta loss temperature"


@pytest.mark.parametrize("place", ["settings", "methods"])
@pytest.mark.parametrize("key", NEVER)
def test_what_a_preset_never_sets(key: str, place: str, own: Path) -> None:
    """No file, code, device or tracker, and nothing about the run; whichever command has the setting."""
    takers = [name for name, settings in TAKING.items() if key in settings.model_fields]
    assert takers
    for taker in takers:
        values = {key: "/etc/passwd"}
        content = {"model": "x", place: values if place == "settings" else {taker: values}}
        (own / "bad.yaml").write_text(json.dumps(content))
        where = place if place == "settings" else f"methods.{taker}"
        with pytest.raises(UserError, match=f"{where}.{key}: is said on the command line, not in a preset"):
            read_preset("bad")


def test_what_a_preset_may_set() -> None:
    """All that can be set by somebody else is a number or one of a few words, but for the names of layers."""
    texts = {
        name for kind in TAKING.values() for name, info in kind.model_fields.items() if "str" in str(info.annotation)
    }
    flags = {
        name for kind in TAKING.values() for name, info in kind.model_fields.items() if "bool" in str(info.annotation)
    }
    allowed = {name for kind in TAKING.values() for name in kind.model_fields if _may_set(name)}
    assert allowed & texts == {"target_modules"}
    assert allowed & flags == {"gradient_checkpointing"}
    assert set(ALWAYS.split()) <= allowed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": -64}, "architecture.hidden_size: input should be greater than 0 (got -64)"),
        ({"hidden_size": 10**12}, "architecture.hidden_size: input should be less than or equal to 16777216"),
        ({"num_hidden_layers": 0}, "architecture.num_hidden_layers: input should be greater than 0 (got 0)"),
        ({"num_hidden_layers": 10**6}, "architecture.num_hidden_layers: input should be less than or equal to 10000"),
        ({"num_experts": -1}, "architecture.num_experts: input should be greater than or equal to 0 (got -1)"),
        (
            {"other_parameters": -5},
            "architecture.other_parameters: input should be greater than or equal to 0 (got -5)",
        ),
        (
            {"recurrent_layers": -1},
            "architecture.recurrent_layers: input should be greater than or equal to 0 (got -1)",
        ),
        ({"sliding_window": 0}, "architecture.sliding_window: input should be greater than 0 (got 0)"),
        (
            {"linears": [["q_proj", 64, -64, 2]]},
            "architecture.linears: input should be greater than 0 (got -64)",
        ),
        ({"sliding_layers": 1}, "architecture: sliding_layers is 1, but there is no sliding_window"),
        ({"sliding_layers": 3, "sliding_window": 8}, "architecture: sliding_layers is 3, but num_hidden_layers 2"),
        ({"hybrid_layers": 3}, "architecture: hybrid_layers is 3, but num_hidden_layers 2"),
        (
            {"sliding_layers": 2, "sliding_window": 8, "recurrent_layers": 1},
            "architecture: sliding_layers and recurrent_layers together are more than the 2 layers",
        ),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "architecture: num_experts_per_tok is 5, but num_experts 4"),
    ],
)
def test_figures_that_no_model_has(change: dict[str, Any], problem: str, own: Path, command: Command) -> None:
    (own / "bad.yaml").write_text(json.dumps({"model": "x", "architecture": FIGURES | change}))
    outcome = command("plan", "--preset", "bad")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {own / 'bad.yaml'}: {problem}")
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_size": "wide", "head_dim": 16},
        {"vocab_size": 10**15},
        {"layer_types": 3},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8},
        {"sliding_window": -1},
        {"text_config": "none"},
        {"num_experts": "many"},
        {"num_experts": -4},
        {"model_type": 7},
    ],
    ids=str,
)
def test_a_strange_config_is_refused_in_a_line(change: dict[str, Any]) -> None:
    with pytest.raises(
        UnknownFigures, match=r"^m: its config.json has impossible figures \(.*\), so its memory cannot"
    ):
        figures_of(FIGURES | change, "m")


def test_layers_without_a_window_have_no_window() -> None:
    """Qwen2's way of switching it off, and a config that names the kind of layer but no width: all see everything."""
    for change in (
        {"layer_types": ["sliding_attention"] * 2},
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 0},
        {"sliding_window": 8, "use_sliding_window": False},
    ):
        figures = figures_of(FIGURES | change, "m")
        assert (figures.sliding_window, figures.caching_layers) == (None, (2, 0))
    assert figures_of(FIGURES | {"sliding_window": 8}, "m").caching_layers == (0, 2)


# ---- the command


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3-88b", "(did you mean qwen3-8b?)"),
        ("Qwen3-8B", "(did you mean qwen3-8b?)"),
        ("Qwen/Qwen3-8B", "(did you mean qwen3-8b?)"),
        ("zzz", "name;"),
        ("llama", "name (there are llama-3.1-8b, llama-3.2-1b, llama-3.2-3b, r1-distill-llama-8b);"),
        (".5", "name (there are qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-14b, qwen2.5-7b, qwen3.5-0.8b, qwen3.5-2b);"),
    ],
)
def test_an_unknown_name(name: str, said: str, command: Command) -> None:
    for argv in (("presets", name), ("plan", "--preset", name)):
        outcome = command(*argv)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"error: preset {name}: there is none of that name")
        assert said in outcome.err
        assert len(outcome.err.splitlines()) == 1


def test_the_list(command: Command) -> None:
    """80 columns hold it; each preset has its size, licence and what is not verified."""
    outcome = command("presets")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    body = lines[: lines.index("", 3)]
    assert max(map(len, body)) <= 80
    for name in ALL:
        at = next(i for i, line in enumerate(body) if line.split()[:1] == [name])
        assert body[at + 1].split()[0] == PRESETS[name].model
    at = next(i for i, line in enumerate(body) if line.startswith("qwen3-4b "))
    assert body[at].split() == ["qwen3-4b", "4.02B", "2.47", "Apache-2.0", "open"]
    assert body[at + 1].split() == ["Qwen/Qwen3-4B", "tokens?", "template?"]
    at = next(i for i, line in enumerate(body) if line.startswith("llama-3.2-1b "))
    assert body[at].split() == ["llama-3.2-1b", "1.24B", "0.96", "Llama", "3.2", "gated"]


def test_the_list_says_access_once(own: Path, command: Command) -> None:
    """In its column, with a ? where nobody has checked; `?` alone where nothing is known."""
    for name, gated, unverified in (
        ("open-checked", "false", ""),
        ("open-unchecked", "false", "gated, tokens"),
        ("closed-checked", "true", ""),
        ("closed-unchecked", "true", "gated"),
        ("unknown", "null", "gated"),
    ):
        (own / f"{name}.yaml").write_text(f"model: x/{name}\ngated: {gated}\nunverified: [{unverified}]\n")
    lines = command("presets").out.splitlines()
    shown = {}
    for at, line in enumerate(lines):
        if "(yours)" in line:
            shown[line.split()[0]] = (line.split()[-1], lines[at + 1].split()[1:])
    assert shown == {
        "open-checked": ("open", []),
        "open-unchecked": ("open?", ["tokens?"]),
        "closed-checked": ("gated", []),
        "closed-unchecked": ("gated?", []),
        "unknown": ("?", []),
    }


def test_the_list_marks_experts(command: Command) -> None:
    """Those that have them, with a line that says what the mark means."""
    lines = command("presets").out.splitlines()
    marked = {line.split()[0] for line in lines if "* " in line and not line.startswith("*")}
    assert marked == {"qwen3-30b-a3b", "gpt-oss-20b"}
    assert "*: experts, which no quantisation packs: they stay in 16 bits." in lines


def test_what_is_no_file_in_the_users_folder(own: Path, command: Command) -> None:
    """Listed as unusable for what it is, for people and for machines."""
    (own / "folder.yaml").mkdir()
    (own / "link.yaml").symlink_to("gone")
    problems = {
        str(own / "folder.yaml"): f"{own / 'folder.yaml'}: is a folder, not a configuration file",
        str(own / "link.yaml"): f"{own / 'link.yaml'}: is a link to gone, which is not there",
    }
    text = command("presets").out
    assert all(f"not usable: {problem}\n" in text for problem in problems.values())
    broken = json.loads(command("presets", "--json").out)["broken"]
    assert {entry["file"]: entry["problem"] for entry in broken} == problems


def test_one_preset(command: Command) -> None:
    outcome = command("presets", "gemma-3-4b")
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    assert outcome.out.splitlines()[0] == "gemma-3-4b: google/gemma-3-4b-it"
    assert (
        "    lowrank-align dpo --preset gemma-3-4b --adapter runs/sft --data pairs.jsonl --out runs/dpo" in outcome.out
    )
    assert "3,880,263,168 weights, 2.79 GiB in NF4" in words
    assert "34, 29 of them with a window of 1024" in words
    assert "end of turn <end_of_turn>, pad <pad> (unverified)" in words
    assert "dpo learning_rate 5e-06; beta 0.1" in words
    assert "turns end with <end_of_turn> (106)" in words
    assert "Unverified: tokens; compared with the model whenever it is loaded." in words
    assert "Unverified: gated; only its page on the hub says it." in words


def test_the_users_own_are_marked_and_win(own: Path, command: Command) -> None:
    (own / "qwen3-8b.yaml").write_text("model: mine/other\n")
    (own / "mine.yml").write_text("model: mine/one\n")
    outcome = command("presets")
    assert "qwen3-8b (yours, for the project's)" in outcome.out
    assert "mine (yours)" in outcome.out
    assert "mine/other" in outcome.out
    assert f"Your own are read from {own}\n" in outcome.out
    page = command("presets", "qwen3-8b").out
    assert page.startswith(f"qwen3-8b: mine/other (yours, in place of the project's)\n{own / 'qwen3-8b.yaml'}\n")
    assert read_preset("qwen3-8b").model == "mine/other"
    assert preset_files().keys() == ALL | {"mine"}


def test_a_broken_one_does_not_hide_the_others(own: Path, command: Command) -> None:
    (own / "broken.yaml").write_text("modle: x\n")
    outcome = command("presets")
    assert outcome.code == 0
    assert f"not usable: {own / 'broken.yaml'}: model: field required" in outcome.out
    assert all(f"{name} " in outcome.out for name in ALL)
    found = json.loads(command("presets", "--json").out)
    assert {preset["name"] for preset in found["presets"]} == ALL
    assert found["broken"] == [
        {"file": str(own / "broken.yaml"), "problem": f"{own / 'broken.yaml'}: model: field required"}
    ]


def test_json_of_one(command: Command) -> None:
    found = json.loads(command("presets", "llama-3.2-1b", "--json").out)
    assert (found["name"], found["model"], found["own"]) == ("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", False)
    assert found["architecture"]["hidden_size"] == 2048
    assert found["parameters"] == 1_235_814_400  # the hub's count of its weights
    assert found["methods"]["dpo"] == {"learning_rate": 5e-6, "beta": 0.1}


def test_a_preset_with_nothing_but_a_model(own: Path, command: Command) -> None:
    (own / "mine.yaml").write_text("model: mine/one\n")
    outcome = command("presets", "mine")
    assert (outcome.code, outcome.err) == (0, "")
    assert "every command  the defaults" in outcome.out


@pytest.mark.parametrize("module", ["lowrank_align.presets", "lowrank_align.commands.presets"])
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- held against a model

FIGURES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 106,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}
RIGHT = {"architecture": FIGURES, "tokens": {"end_of_turn": "<|im_end|>", "pad": "<pad>"}}


@pytest.fixture
def lines(own: Path, tiny_llama: Path) -> Callable[..., list[str]]:
    """`lines(**preset)`: what is said when `tiny_llama` is loaded with it."""

    def say(chat_template: str | None = None, **preset: Any) -> list[str]:
        from lowrank_align.data.chat import Renderer
        from lowrank_align.loading import read_config, read_tokenizer
        from lowrank_align.preset_check import from_preset, preset_lines

        (own / "mine.yaml").write_text(json.dumps({"model": str(tiny_llama), **preset}))
        flags = {"preset": "mine", "model": str(tiny_llama), "data": "d", "out": "o", "chat_template": chat_template}
        settings = resolve(SFTSettings, flags)
        renderer = Renderer(
            read_tokenizer(settings.model)[0],
            chat_template=chat_template,
            max_length=64,
            thinking=settings.thinking,
            thinking_if_possible=from_preset(settings, "thinking"),
        )
        return preset_lines(settings, renderer, read_config(settings.model))

    return say


def test_a_preset_that_agrees_says_nothing(lines: Any, tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    assert all(config.get(key, 16) == value for key, value in FIGURES.items() if key != "tie_word_embeddings")
    assert lines(**RIGHT, unverified=["tokens", "template", "architecture"]) == []
    template = (tiny_llama / "chat_template.jinja").read_bytes()
    assert lines(**RIGHT, template_hash=hashlib.sha256(template).hexdigest()) == []
    assert lines() == []


def test_another_model(lines: Any, tiny_llama: Path) -> None:
    preset = {"architecture": FIGURES | {"hidden_size": 2560, "num_hidden_layers": 36}}
    assert lines(**preset) == [
        f"preset mine: its figures are not those of {tiny_llama} (hidden_size 2560, not 64; "
        "num_hidden_layers 36, not 2); `lowrank-align plan` goes by the preset's"
    ]
    assert lines(**preset, model="its/own") == [
        f"preset mine: is for another model than {tiny_llama} (hidden_size 2560, not 64; "
        "num_hidden_layers 36, not 2); its settings are taken all the same"
    ]
    all_other = Architecture(**FIGURES | {"model_type": "qwen3", "vocab_size": 9, "head_dim": 1, "hidden_size": 1})
    (line,) = lines(architecture=all_other.model_dump())
    assert "(model_type qwen3, not llama; hidden_size 1, not 64; head_dim 1, not 16; and 1 more)" in line


def test_other_tokens(lines: Any) -> None:
    assert lines(tokens={"end_of_turn": "<|eot_id|>", "pad": "<|endoftext|>"}) == [
        "preset mine: pads with <|endoftext|>, but the model's tokenizer with <pad>; that is taken (and masked)",
        "preset mine: ends turns with <|eot_id|>, but the model's template with <|im_end|>; the model's is used",
    ]


def test_another_template(lines: Any, tiny_llama: Path) -> None:
    found = hashlib.sha256((tiny_llama / "chat_template.jinja").read_bytes()).hexdigest()[:12]
    assert lines(template_hash="0" * 64) == [
        f"preset mine: was written for another chat template (SHA-256 000000000000, the model's {found}); "
        "the model's is used: look at a few rows with `lowrank-align show`"
    ]
    assert lines("plain", template_hash="0" * 64, tokens={"end_of_turn": "<x>"}) == []  # the user chose another


def test_no_switch_for_thinking(lines: Any) -> None:
    assert lines(thinking=False) == [
        "preset mine: turns thinking off, but the chat template has no switch for it; left out"
    ]


def test_training_and_showing_say_it(own: Path, tiny_llama: Path, trained: Path, tmp_path: Path, command: Any) -> None:
    """Once, and go on. What the preset says and a continued adapter has otherwise is nobody's mistake."""
    (own / "mine.yaml").write_text(
        "model: no/where\nthinking: true\ntokens: {end_of_turn: <x>}\nsettings: {rank: 4, target_modules: [q_proj]}\n"
    )
    rows = trained / "demonstrations.jsonl"
    few = ("--max-steps", 1, "--batch-size", 2, "--quantize", "none", "--sample-steps", 0)
    sft = ("sft", "--preset", "mine", "--model", tiny_llama, "--data", rows, "--adapter", trained / "sft", *few)
    outcome = command(*sft, "--out", tmp_path / "run")
    assert outcome.code == 0
    said = [line for line in (outcome.out + outcome.err).splitlines() if "preset mine" in line]
    assert [line.split(",")[0] for line in said] == [
        "preset mine: ends turns with <x>",
        "preset mine: turns thinking on",
    ]
    assert "without effect" not in outcome.out + outcome.err
    assert "rank: without effect" in (two := command(*sft, "--rank", 3, "--out", tmp_path / "two")).out + two.err


# What each command takes beside its model, its rows under {rows} and the runs under {runs}.
TAKES = {
    **{name: "--data {rows} --out {out}" for name, kind in METHODS.items() if kind.rows_field == "data"},
    **{
        name: "--prompts {rows} --out {out} --reward {runs}/reward"
        for name, kind in METHODS.items()
        if kind.rows_field == "prompts"
    },
    "show": "--data {rows}",
    "audit": "--data {rows}",
    "generate": "--prompts {rows} --out {out}.jsonl --max-new-tokens 2",
    "score": "--data {rows} --out {out}.jsonl --adapter {runs}/reward",
    "logps": "--data {rows} --out {out}.jsonl --adapter {runs}/sft",
    "eval": "--reward {runs}/reward --data {rows}",
    "export": "--adapter {runs}/sft --out {out}",
    "chat": "--max-new-tokens 2",
}


@pytest.fixture
def with_rows(trained: Path, tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: Any) -> Command:
    """`with_rows("score", *more)`: the command on `tiny_llama`, with everything that it takes."""

    def run_it(name: str, *more: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        words = TAKES[name].format(rows=trained / "pairs.jsonl", runs=trained, out=tmp_path / "out").split()
        quantize = ["--quantize", "none"] if "quantize" in TAKING[name].model_fields else []
        return command(name, "--model", tiny_llama, *words, *quantize, *more)

    return run_it


def test_all_that_take_a_preset_are_tried() -> None:
    """The others have tests of their own: the studio serves until it is stopped."""
    assert TAKES.keys() | {"plan", "studio", "frontier", "rounds"} >= TAKING.keys() >= TAKES.keys() | {"plan", "studio"}


@pytest.mark.parametrize("name", [name for name in TAKES if name not in METHODS])
def test_every_command_says_it_once(name: str, own: Path, with_rows: Command) -> None:
    (own / "mine.yaml").write_text("model: no/where\nthinking: true\ntokens: {end_of_turn: <x>}\n")
    outcome = with_rows(name, "--preset", "mine")
    assert outcome.code == 0, outcome.err
    words = " ".join((outcome.out + outcome.err).split())
    assert words.count("preset mine: ends turns with <x>, but the model's template with <|im_end|>") == 1
    assert words.count("preset mine: turns thinking on, but the chat template has no switch for it; left out") == 1


@pytest.mark.parametrize("name", TAKES)
def test_a_switch_that_is_not_there(name: str, own: Path, with_rows: Command) -> None:
    """Asked for by the user it is a mistake, with a preset that does not ask for it, too."""
    (own / "mine.yaml").write_text("model: no/where\n")
    flag = "--no-thinking" if name == "show" else "--thinking"
    line = f"error: {flag}: the chat template (the model's own) has no switch for it; leave it out\n"
    for more in ((), ("--preset", "mine")):
        outcome = with_rows(name, flag, *more)
        assert (outcome.code, outcome.err) == (2, line)
