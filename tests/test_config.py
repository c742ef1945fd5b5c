"""Knobs: what is refused and in which words, who wins, and that what is written down can be read back."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.cli import main, make_parser
from lowrank_align.config import (
    METHODS,
    DPOSettings,
    GenerateSettings,
    GRPOSettings,
    KTOSettings,
    PPOSettings,
    RLOOSettings,
    SFTSettings,
    TrainSettings,
    read_yaml,
    resolve,
    to_yaml,
)
from lowrank_align.errors import UserError

NEEDED = {"model": "m", "data": "d.jsonl", "out": "o"}
ONLINE = {"prompts": "p", "reward": "r"}


def refusal(settings: Any, flags: dict[str, Any], config: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        resolve(settings, flags, config)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- who wins


def test_defaults_file_flags(tmp_path: Path) -> None:
    """The file over the defaults, flags over the file; a flag that is not given is None and changes nothing."""
    file = tmp_path / "c.yaml"
    file.write_text("model: from-file\nlearning_rate: 0.5\nbatch_size: 3\n")
    found = resolve(SFTSettings, {"data": "d", "out": "o", "batch_size": "7", "learning_rate": None}, file)
    assert (found.model, found.learning_rate, found.batch_size, found.micro_batch_size) == ("from-file", 0.5, 7, 2)


def test_text_is_read_as_the_knobs_type() -> None:
    """Flags are text, as YAML's 1e-4 is (it wants a dot)."""
    flags = {**NEEDED, "learning_rate": "1e-4", "max_steps": "12", "alpha": "3", "target_modules": ["q_proj", "v_proj"]}
    found = resolve(SFTSettings, flags)
    assert (found.learning_rate, found.max_steps, found.alpha) == (1e-4, 12, 3.0)
    assert found.target_modules == ["q_proj", "v_proj"]


def test_what_is_written_down_is_read_back(tmp_path: Path) -> None:
    """Every knob but resume and overwrite, which belong to the call; `method` is there for people."""
    values = {"model": "m", "out": "o", "prompts": "p: ä.jsonl", "reward": "m:f"}
    settings = resolve(PPOSettings, {**values, "target_kl": 0.3, "overwrite": True, "learning_rate": 1e-5})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings), encoding="utf-8")
    assert "method: ppo" in file.read_text(encoding="utf-8")
    given = {"reward": "m:f"}  # code is named on the command line, as the file's first line says
    assert file.read_text(encoding="utf-8").startswith("# lowrank-align ppo --config THIS_FILE --reward m:f\n")
    assert resolve(PPOSettings, given, file) == settings.model_copy(update={"overwrite": False})
    with pytest.raises(UserError, match=r"config.yaml: method: is for ppo, not for sft; take that command"):
        resolve(SFTSettings, {}, file)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_valid(method: str) -> None:
    """For every method a minimum of flags is enough, and what every method shares is the same."""
    given = {**NEEDED, "prompts": "p", "reward": "r"}
    known = METHODS[method].model_fields
    settings = resolve(METHODS[method], {name: value for name, value in given.items() if name in known})
    assert settings.seed == 0
    assert settings.rows == ("p" if METHODS[method].rows_field == "prompts" else "d.jsonl")
    assert set(TrainSettings.model_fields) <= set(known)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (SFTSettings, {"learning_rat": 1}, "learning_rat: unknown setting (did you mean learning_rate?)"),
        (SFTSettings, {"beta": 0.1}, "beta: unknown setting"),
        (SFTSettings, {"learning_rate": "0"}, "learning_rate: input should be greater than 0 (got '0')"),
        (SFTSettings, {"learning_rate": "nan"}, "learning_rate: input should be a finite number (got 'nan')"),
        (SFTSettings, {"learning_rate": "inf"}, "learning_rate: input should be a finite number (got 'inf')"),
        (SFTSettings, {"learning_rate": "fast"}, "learning_rate: input should be a valid number"),
        (SFTSettings, {"batch_size": "0"}, "batch_size: input should be greater than 0 (got '0')"),
        (SFTSettings, {"batch_size": "2.5"}, "batch_size: input should be a valid integer"),
        (SFTSettings, {"seed": -1}, "seed: input should be greater than or equal to 0 (got -1)"),
        (SFTSettings, {"warmup_ratio": 1.5}, "warmup_ratio: input should be less than or equal to 1 (got 1.5)"),
        (SFTSettings, {"lora_dropout": 1.0}, "lora_dropout: input should be less than 1 (got 1.0)"),
        (SFTSettings, {"quantize": "nf5"}, "quantize: input should be 'nf4', 'int8' or 'none' (got 'nf5')"),
        (
            SFTSettings,
            {"quantize": "NF"},
            "quantize: input should be 'nf4', 'int8' or 'none' (got 'NF') (did you mean nf4?)",
        ),
        (
            SFTSettings,
            {"lr_schedule": "cosin"},
            "lr_schedule: input should be 'linear', 'cosine' or 'constant' (got 'cosin') (d",
        ),
        (SFTSettings, {"train_on": ["all"]}, "train_on: input should be 'all' or 'last'"),
        (SFTSettings, {"model": 3}, "model: input should be a valid string (got 3)"),
        (SFTSettings, {"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        (SFTSettings, {"eval_data": "e", "eval_rows": 3}, "eval_data and eval_rows exclude each other"),
        (SFTSettings, {"early_stopping": 2}, "early_stopping needs held-out rows (eval_data or eval_rows)"),
        (DPOSettings, {"label_smoothing": 0.5}, "label_smoothing: input should be less than 0.5 (got 0.5)"),
        (
            DPOSettings,
            {"label_smoothing": 0.1, "loss": "ipo"},
            "label_smoothing is for loss: robust and sigmoid, not ipo",
        ),
        (DPOSettings, {"cpl_lambda": 0.7}, "cpl_lambda is for loss: cpl and cpl_kl, not sigmoid"),
        (
            DPOSettings,
            {"beta": 0.5, "loss": ["cpl", "nll"]},
            "beta is for loss: cpo, hinge, ipo, orpo, robust, sigmoid and simpo, not cpl, nll",
        ),
        (DPOSettings, {"loss": ["nll"], "loss_weights": [1, 2]}, "loss_weights: 2 for 1 losses; give one each"),
        (DPOSettings, {"loss": ["nll", "nll"]}, "loss: each once, and at least one of sigmoid, ipo, hinge"),
        (
            DPOSettings,
            {"ranking": "plackett_luce", "loss": "cpo"},
            "ranking: plackett_luce is for loss: sigmoid alone, not cpo",
        ),
        (
            DPOSettings,
            {"ranking": "plackett_luce", "label_smoothing": 0.1},
            "label_smoothing and ranking: plackett_luce exclude each other",
        ),
        (
            DPOSettings,
            {"ranking": "plackett_luce", "loss_weights": [5.0]},
            "loss_weights and ranking: plackett_luce exclude each other",
        ),
        (DPOSettings, {"loss_weights": ["inf"]}, "loss_weights: input should be a finite number (got 'inf')"),
        (PPOSettings, {**ONLINE, "reward_weights": ["nan"]}, "reward_weights: input should be a finite number"),
        (PPOSettings, {**ONLINE, "batch_size": 1}, "minibatches: 2 of batch_size 1 prompts; at most one each"),
        (GRPOSettings, {**ONLINE, "minibatches": 9}, "minibatches: 9 of batch_size 8 prompts; at most one each"),
        (
            GRPOSettings,
            {**ONLINE, "clip_range_high": 0.1},
            "clip_range_high: 0.1 is below clip_range 0.2; it must be at least as much (DAPO: 0.28 above, 0.2 below)",
        ),
        (RLOOSettings, {**ONLINE, "minibatches": 9}, "minibatches: 9 of batch_size 8 prompts; at most one each"),
        (KTOSettings, {"batch_size": 1}, "batch_size: 1, must be at least 2: KTO's z0 pairs each prompt with"),
        (
            KTOSettings,
            {"desirable_weight": 0, "undesirable_weight": 0},
            "desirable_weight and undesirable_weight are both 0: nothing would be learnt",
        ),
        (DPOSettings, {"lora_dropout": 0.1}, "lora_dropout: input should be less than or equal to 0 (got 0.1)"),
        (GenerateSettings, {"top_p": 0.0}, "top_p: input should be greater than 0 (got 0.0)"),
    ],
)
def test_one_line_says_what_is_wrong(settings: Any, flags: dict[str, Any], message: str) -> None:
    needed = {"model": "m", "prompts": "p", "out": "o"} if "data" not in settings.model_fields else NEEDED
    assert refusal(settings, {**needed, **flags}).startswith(message)


def test_a_missing_knob() -> None:
    assert (
        refusal(SFTSettings, {"model": "m", "out": "o"}) == "data: missing; give --data or a line in the --config file"
    )


def test_the_file_is_named(tmp_path: Path) -> None:
    """Where a knob of the file is wrong, but not where the flag over it is."""
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: none\n")
    assert refusal(SFTSettings, NEEDED, file).startswith(f"{file}: batch_size: input should be a valid integer")
    assert refusal(SFTSettings, {**NEEDED, "batch_size": "x"}, file).startswith("batch_size: input should")
    assert resolve(SFTSettings, {**NEEDED, "batch_size": "4"}, file).batch_size == 4
    file.write_text("batchsize: 4\n")
    assert refusal(SFTSettings, NEEDED, file) == f"{file}: batchsize: unknown setting (did you mean batch_size?)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "needs lines of `setting: value`"),
        (b"just text\n", "needs lines of `setting: value`"),
        (b"1: 2\n", "needs lines of `setting: value`"),
        (b"a: [1\nb: 2\n", "not valid YAML"),
        (b"a: \xff\n", "not valid YAML (not UTF-8)"),
        (b"a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"a: b\x00\n", "not valid YAML"),
        (b"#" * 1_000_001, "over 1 MB"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    text = refusal(SFTSettings, NEEDED, file)
    assert text.startswith(str(file))
    assert message in text


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "c.yaml") == {}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(SFTSettings, NEEDED, tmp_path / "c.yaml") == f"{tmp_path / 'c.yaml'}: no such configuration file"


def test_what_is_no_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("gone.yaml")
    folder, link = tmp_path / "folder.yaml", tmp_path / "link.yaml"
    assert refusal(SFTSettings, NEEDED, folder) == f"{folder}: is a folder, not a configuration file"
    assert refusal(SFTSettings, NEEDED, link) == f"{link}: is a link to gone.yaml, which is not there"


# ---- the command line


COMMANDS = [
    "demo", "sft", "reward", "dpo", "ppo", "presets", "plan", "audit", "show", "generate", "chat", "score", "logps",
    "export", "doctor", "runs",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: Any) -> None:
    """Exits with 0; every knob of the settings has a flag and a word of explanation."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"lowrank-align {command}" in text
    for name, info in METHODS[command].model_fields.items() if command in METHODS else ():
        assert f"--{name.replace('_', '-')}" in text
        assert info.description


def test_every_command_is_listed(capsys: Any) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from lowrank_align.cli import make_parser; make_parser().format_help(); "
    code += "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'peft'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--skip-bad"], {"skip_bad": True}),
        (["--target-modules", "q_proj", "v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--learning-rate", "1e-3", "--quantize", "none"], {"learning_rate": "1e-3", "quantize": "none"}),
        ([], {"skip_bad": None, "learning_rate": None}),
    ],
)
def test_flags(flags: list[str], expected: dict[str, Any]) -> None:
    """As they are written; types come later."""
    found = vars(make_parser().parse_args(["sft", *flags]))
    assert {name: found[name] for name in expected} == expected


def test_a_mistake_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """One line on stderr, exit code 2, and nothing made."""
    out = tmp_path / "run"
    assert main(["sft", "--model", "tiny", "--data", "d", "--out", str(out), "--batch-size", "0"]) == 2
    assert capsys.readouterr().err == "error: batch_size: input should be greater than 0 (got '0')\n"
    assert not out.exists()


def test_an_unknown_flag(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sft", "--learning-rat", "1", "--batchsize", "3"])
    assert stopped.value.code == 2
    assert "--batchsize" in capsys.readouterr().err
