"""The README is true: its commands run, its Python runs, and what it names is there."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lowrank_align import errors
from lowrank_align.cli import command_names, main, make_parser
from lowrank_align.config import DATA_COMMANDS, METHODS
from lowrank_align.data.formats import Shape

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEWER = {  # what is put behind a command, so that it takes a second
    "sft": ["--max-steps", "2", "--batch-size", "2"],
    "reward": ["--max-steps", "2", "--batch-size", "2", "--eval-rows", "2"],
    "dpo": ["--max-steps", "2", "--batch-size", "2"],
    "ppo": ["--max-steps", "2", "--batch-size", "2", "--max-new-tokens", "8"],
    **{name: ["--max-steps", "2", "--batch-size", "2"] for name in ("kto", "condition", "coh")},
    **{
        name: ["--max-steps", "2", "--batch-size", "2", "--max-new-tokens", "8"]
        for name in ("grpo", "rloo", "online-dpo", "expert", "quark")
    },
    "eval": ["--max-new-tokens", "8"],
    "generate": ["--max-new-tokens", "8"],
    "chat": ["--max-new-tokens", "8"],
}
PREFIXED = ("condition", "coh", "quark")
RUN = {
    "README.md",
    "adapter",
    "checkpoints",
    "config.yaml",
    "metrics.jsonl",
    "plots",
    "provenance.json",
    "samples.jsonl",
}


class Ran(NamedTuple):
    """The working folder, and each command's words, exit code and output."""

    folder: Path
    commands: list[tuple[list[str], int, str]]


def blocks(language: str, heading: str = "") -> list[str]:
    """The code blocks of a language, after a heading."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README[README.index(heading) :], re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> list[list[str]]:
    """The `lowrank-align` lines under "Your own files", with the variables of the block's first line still in them."""
    block = blocks("bash", "## Your own files")[0]
    found = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("lowrank-align ")]
    return [words for words in found if words[0] != "studio"]  # it serves until it is stopped: tests/browser


@pytest.fixture(scope="module")
def ran(tiny_llama: Path, trained: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All of them in their order, in one folder and one process."""
    folder, done = tmp_path_factory.mktemp("readme"), []
    for name in ("demonstrations.jsonl", "pairs.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    values = {"$MODEL": str(tiny_llama), "$DEMONSTRATIONS": "demonstrations.jsonl", "$DATA": "pairs.jsonl"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LOWRANK_ALIGN_CACHE", str(cache))
        patch.setattr("sys.stdin", io.StringIO("Hi\n"))  # what is said in the chat
        for words in commands():
            argv = [values.get(word, word) for word in words] + FEWER.get(words[0], [])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                done.append((argv, main(argv), out.getvalue()))
    return Ran(folder, done)


# ---- the commands


def test_every_command_of_the_block_succeeds(ran: Ran) -> None:
    assert [(argv, code) for argv, code, _ in ran.commands if code] == []
    assert {argv[0] for argv, _, _ in ran.commands} == set(command_names()) - {
        "demo",
        "frontier",
        "rounds",
        "studio",
    }  # those have tests of their own


@pytest.mark.parametrize("method", METHODS)
def test_a_runs_folder_is_as_it_says(method: str, ran: Ran) -> None:
    run = ran.folder / "runs" / method
    more = {"reward": {"reward.json"}, "ppo": {"value"}} | dict.fromkeys(PREFIXED, {"prompting.json"})
    assert {path.name for path in run.iterdir()} - {".lock", "run.json", "dropped_rows.jsonl"} == RUN | more.get(
        method, set()
    )
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert list((run / "plots").glob("*.png"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert all(sample["prompt"] for sample in samples)


def test_the_files_that_it_writes(ran: Ran) -> None:
    """Six prompts: six answers, with a score each; six pairs: six lines with two log-probabilities."""
    found = {
        name: [json.loads(line) for line in (ran.folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("answers", "scores", "logps")
    }
    assert [len(line["scores"]) for line in found["scores"]] == [1] * 6
    assert [len(line["logps"]) for line in found["logps"]] == [2] * 6
    prompts = [json.loads(line)["prompt"] for line in (ran.folder / "pairs.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in found["answers"]] == prompts


def test_runs_are_listed_and_compared(ran: Ran) -> None:
    listing, comparison = (out for argv, _, out in ran.commands if argv[0] == "runs")
    assert all(method in listing for method in METHODS)
    assert "runs/sft" in comparison
    assert "runs/dpo" in comparison


def test_a_runs_config_runs_it_again(ran: Ran, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that the README gives for it, to the same bytes."""
    (line,) = re.findall(r"`lowrank-align (dpo --config [^`]*)`", README)
    monkeypatch.chdir(ran.folder)
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(cache))
    assert main(line.split()) == 0
    runs = (ran.folder / "runs" / name / "adapter" / "adapter_model.safetensors" for name in ("dpo", "again"))
    first, again = (run.read_bytes() for run in runs)
    assert first == again


# ---- the Python


def test_python_on_the_embedded_base(
    ran: Ran, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As it stands; it prints the role and its tensors, then the roles and the base's bytes."""
    monkeypatch.chdir(ran.folder)
    source = next(block for block in blocks("python") if "Base.load" in block)
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    first, last = capsys.readouterr().out.splitlines()[-2:]
    base = names["base"]
    assert first == f"policy {len(base.roles['policy'].parameters)}"
    assert last == f"['base', 'critic', 'policy', 'reference'] {base.frozen_bytes()}"
    assert base.path == tiny_base_folder.resolve()
    assert base.copies_in_memory() == 1
    assert (ran.folder / "runs/dpo-from-python/adapter/adapter_model.safetensors").is_file()


def test_python_of_other_libraries(ran: Ran, tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain transformers and peft read the reward run; its scores are those of `score` on the same unquantised weights,
    raw."""
    import torch
    from transformers import AutoTokenizer

    monkeypatch.chdir(ran.folder)
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(cache))
    names: dict[str, Any] = {"MODEL": str(tiny_llama)}
    exec(compile(blocks("python", "## A run's folder")[0], "README.md", "exec"), names)
    argv = [
        "score",
        "--model",
        str(tiny_llama),
        "--adapter",
        "runs/reward",
        "--data",
        "pairs.jsonl",
        "--quantize",
        "none",
    ]
    assert main([*argv, "--out", "raw.jsonl"]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), names["model"].eval()
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    for row, line in zip(rows, Path("raw.jsonl").read_text().splitlines(), strict=True):
        for side, score in zip(("chosen", "rejected"), json.loads(line)["scores"], strict=True):
            ids = tokenizer(row["prompt"] + row[side] + "</s>", return_tensors="pt").input_ids
            with torch.no_grad():
                assert model(ids).logits.item() == pytest.approx(score, abs=1e-4)


# ---- what it names


def test_every_command_is_mentioned() -> None:
    assert [
        name for name in command_names() if f"lowrank-align {name}" not in README and f"make {name}" not in README
    ] == []


def test_every_flag_exists() -> None:
    """In commands those of the command, in running text those of any."""
    spans = [span for span in re.findall(r"`([^`\n]+)`", README) if span.startswith("lowrank-align ")]
    for words in [*commands(), *(shlex.split(span)[1:] for span in spans)]:
        given = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert given <= flags_of(words[0]) if words[0] in command_names() else given <= {"--help", "--version"}, words
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    known = set().union(*map(flags_of, command_names()))
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) <= known


def flags_of(command: str) -> set[str]:
    every = [[command, what] for what in DATA_COMMANDS] if command == "data" else [[command]]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for words in every:
            with contextlib.suppress(SystemExit):
                make_parser().parse_args([*words, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", out.getvalue()))


def test_exit_codes() -> None:
    listed = re.search(r"Exit codes: (.*?)\.\n", README, re.DOTALL)
    assert listed is not None
    said = dict(re.findall(r"(\d+) (\w+)", " ".join(listed[1].split())))
    assert said == {
        str(errors.EXIT_DONE): "done",
        str(errors.EXIT_DATA_OR_CONFIG): "data",
        str(errors.EXIT_ENVIRONMENT): "environment",
        str(errors.EXIT_NUMERIC): "numeric",
        str(errors.EXIT_RESUMABLE): "stopped",
    }
    codes = {kind.exit_code for kind in (errors.UserError, *errors.UserError.__subclasses__())} | {errors.EXIT_DONE}
    assert {int(code) for code in said} == codes


def test_shapes_of_rows() -> None:
    """Each shape has its line, with fields that are recognised, and the commands of the line take it."""
    from lowrank_align.commands.rows import WITH_COMPLETIONS
    from lowrank_align.methods import method_class

    takes = {name: method_class(name).shapes for name in METHODS}
    takes |= dict.fromkeys(("generate", "eval"), frozenset({Shape.prompts}))
    takes |= {"score": WITH_COMPLETIONS, "logps": WITH_COMPLETIONS}
    lines = re.findall(r"^\| (\w+) \| (`.*) \| (.*) \|$", README[README.index("| shape |") :], re.MULTILINE)
    lines = [line for line in lines if line[0] in set(Shape)]
    assert [shape for shape, _, _ in lines] == [shape.value for shape in Shape]
    for shape, _, commands_of_it in lines:
        for name in re.findall(r"`([\w-]+)`", commands_of_it):
            assert Shape(shape) in takes[name], f"{name} takes no {shape}"
    for name, shapes in takes.items():
        if name in METHODS:
            assert shapes == {Shape(shape) for shape, _, of_it in lines if f"`{name}`" in of_it}


def test_the_example_of_an_error(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    rows = [good] * 16 + [{"prompt": "a ", "chosen": "b"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["dpo", "--model", str(tiny_llama), "--data", "pairs.jsonl", "--out", "run"]) == 2
    (example,) = (block for block in blocks("") if block.startswith("error: "))
    assert capsys.readouterr().err == example


def test_the_plan_is_what_the_command_prints(capsys: Any) -> None:
    """The block begins with its command; tables end in spaces there, which the README leaves out."""
    (block,) = (block for block in blocks("") if block.startswith("$ lowrank-align plan"))
    line, _, shown = block.partition("\n")
    assert main(shlex.split(line)[2:]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert links
    headings = {
        re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or path or anchor in headings, link


def test_files_that_it_names_are_there() -> None:
    """In the table of modules: from the root, or beside the first of their line."""
    table = README[README.index("| where | what |") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        names = re.findall(r"`([^`]+)`", line.split("|")[1])
        first = ROOT / names[0]
        assert first.exists(), names[0]
        assert [name for name in names if not ((first.parent / name).exists() or (ROOT / name).exists())] == []
