"""`lowrank-align eval` as one gives it: what is asked is measured, printed and written; mistakes are one line."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lowrank_align import adapters

Command = Callable[..., Any]

PROMPTS = [{"prompt": f"{i}. Say: ", "completion": f"a good word {i}"} for i in range(4)]
PAIRS = [
    {"prompt": f"{i}. Say: ", "chosen": f"a good word {i}", "rejected": f"bad {i}", "source": ["web", "book"][i % 2]}
    for i in range(5)
]
JUDGE = """
def longer(prompts, completions):
    return [len(c) for c in completions]

def level(prompts, completions):
    return [1.0] * len(completions)

def broken(prompts, completions):
    raise KeyError("no")
"""


@pytest.fixture(autouse=True)
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the runs of `trained`, rows, and a module of judges."""
    (tmp_path / "trained").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("evaljudges.py").write_text(JUDGE)
    for name, rows in (("prompts", PROMPTS), ("pairs", PAIRS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def measure(command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`measure("--reward", ...)`: the printed text and `report.json`; pictures are written as their names alone."""
    figures = import_module("lowrank_align.evaluate.figures")
    monkeypatch.setattr(figures, "_save", lambda figure, file: file.write_text(file.name))
    monkeypatch.setenv("COLUMNS", "200")

    def run_it(*flags: object, model: bool = True) -> tuple[str, dict[str, Any]]:
        base = ("--model", tiny_llama, "--quantize", "none", "--max-length", 256) if model else ()
        outcome = command("eval", *base, *flags, "--out", "report", "--overwrite")
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out, json.loads(Path("report/report.json").read_text())

    return run_it


def test_two_voices_before_three_judges(measure: Callable[..., Any]) -> None:
    """The judge of length and the answers' own lengths say the same; equal scores are ties, delta 0."""
    flags = ("--adapter", "trained/sft", "--against", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", 8)
    judges = ("--judge", "trained/reward", "evaljudges:longer", "evaljudges:level")
    out, report = measure(*flags, *judges, "--kl-to", "start")
    compared = report["comparison"]
    assert (compared["ours"], compared["theirs"], compared["prompts"]) == ("trained/sft", "base", 4)
    level = compared["judges"]["evaljudges:level"]
    assert [level["win_rate"][name] for name in ("wins", "ties", "losses", "rate")] == [0, 4, 0, 0.5]
    assert (level["delta"]["value"], compared["score_differences"]["evaljudges:level"]["value"]) == (0, 0)
    lines = [json.loads(line) for line in Path("report/answers.jsonl").read_text().splitlines()]
    lengths = [[len(answer["answer"]) for answer in line["answers"]] for line in lines]
    longer = compared["judges"]["evaljudges:longer"]["win_rate"]
    assert longer["wins"] == sum(a > b for a, b in lengths)
    assert longer["losses"] == sum(a < b for a, b in lengths)
    assert [line["outcomes"]["evaljudges:longer"] for line in lines] == [
        0.5 + 0.5 * ((a > b) - (a < b)) for a, b in lengths
    ]
    assert report["answers"]["base"]["scores"]["evaljudges:longer"]["value"] == sum(b for _, b in lengths) / 4
    assert (report["kl"]["to"], report["kl"]["kl"]["answers"]) == ("base", 4)
    assert "trained/sft against base, on 4 prompts" in out
    assert "report: answers.jsonl, answers_length.png, report.json, report.md, wins.png\n" in out
    table = Path("report/report.md").read_text()
    assert "| judge | trained/reward | evaljudges:longer | evaljudges:level |\n" in table
    cells = [
        line.split(" | ")[-1] for line in table.splitlines() if line.startswith(("| won |", "| tied |", "| lost |"))
    ]
    assert cells == ["0 |", "4 |", "0 |"]


def test_the_same_answers_whatever_is_asked_beside(measure: Callable[..., Any]) -> None:
    flags = ("--prompts", "prompts.jsonl", "--max-new-tokens", 8, "--judge", "evaljudges:longer", "--seed", 3)
    _, alone = measure("--adapter", "trained/sft", *flags)
    _, beside = measure("--adapter", "trained/sft", "--against", "base", *flags)
    assert alone["answers"]["trained/sft"] == beside["answers"]["trained/sft"]
    assert "comparison" not in alone


def test_against_the_datas_own_answers(measure: Callable[..., Any]) -> None:
    """`a good word 0` has 13 characters, more than 8 tokens of this tokenizer mostly say."""
    flags = ("--adapter", "trained/sft", "--prompts", "prompts.jsonl", "--max-new-tokens", 2)
    _, report = measure(*flags, "--against", "reference", "--judge", "evaljudges:longer")
    assert report["comparison"]["judges"]["evaljudges:longer"]["win_rate"]["losses"] == 4
    assert report["answers"]["reference"]["mean_characters"] == 13
    _, report = measure("--adapter", "trained/sft", "--prompts", "pairs.jsonl", "--max-new-tokens", 2,
                        "--against", "reference", "--judge", "trained/reward")  # fmt: skip
    assert report["answers"]["reference"]["mean_characters"] == 13  # the chosen ones


def test_an_answer_prefix_is_put_in_and_said(measure: Callable[..., Any], here: Path, trained: Path) -> None:
    import shutil

    shutil.copytree(trained / "sft", here / "conditioned")
    adapters.write_prompting(here / "conditioned", "good: ")
    flags = ("--prompts", "prompts.jsonl", "--max-new-tokens", 4, "--judge", "evaljudges:longer")
    out, report = measure("--adapter", "conditioned", "--against", "trained/sft", *flags, "--kl-to", "trained/sft")
    assert report["answers"]["conditioned"]["answer_prefix"] == "good: "
    assert report["answers"]["trained/sft"]["answer_prefix"] == ""
    assert report["kl"]["kl"]["nats"]["value"] != 0  # the same weights: the prefix alone makes the difference
    assert "conditioned was asked to go on after 'good: '" in out


def test_a_reward_run_on_pairs(measure: Callable[..., Any], command: Command, tiny_llama: Path) -> None:
    """Accuracy and margins are those of the command `score`; indices 0, 2, 4 are web, 1 and 3 book."""
    out, report = measure("--reward", "trained/reward", "--data", "pairs.jsonl", "--by", "source")
    base = ("--model", tiny_llama, "--quantize", "none", "--data", "pairs.jsonl", "--out", "scores.jsonl")
    assert command("score", *base, "--adapter", "trained/reward").code == 0
    scores = [json.loads(line)["scores"] for line in Path("scores.jsonl").read_text().splitlines()]
    margins = [chosen - rejected for chosen, rejected in scores]
    quality = report["reward"]["quality"]
    assert quality["accuracy"]["wins"] == sum(margin > 0 for margin in margins)
    assert (report["reward"]["rows_cut"], report["reward"]["left_out"]) == (0, {})
    assert quality["mean_margin"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert {name: rate["wins"] + rate["losses"] for name, rate in quality["by_group"].items()} == {"web": 3, "book": 2}
    assert quality["better_longer"]["wins"] + quality["better_longer"]["losses"] == 5
    assert "Reward run trained/reward, on 5 comparisons" in out
    assert "trained on these very rows" not in out
    assert Path("report/calibration.png").exists() and Path("report/score_length.png").exists()
    out, _ = measure("--reward", "trained/reward", "--data", "trained/pairs.jsonl")
    assert "it was trained on these very rows" in out


def test_perplexity_is_that_of_logps(measure: Callable[..., Any], command: Command, tiny_llama: Path) -> None:
    import math

    _, report = measure("--adapter", "trained/sft", "--against", "base", "--perplexity-data", "prompts.jsonl")
    base = ("--model", tiny_llama, "--quantize", "none", "--data", "prompts.jsonl", "--out", "logps.jsonl")
    assert command("logps", *base, "--adapter", "trained/sft").code == 0
    lines = [json.loads(line) for line in Path("logps.jsonl").read_text().splitlines()]
    logp, tokens = (sum(line[name][0] for line in lines) for name in ("logps", "num_tokens"))
    ours = report["perplexity"]["trained/sft"]
    assert ours["tokens"] == tokens
    assert ours["perplexity"] == pytest.approx(math.exp(-logp / tokens), rel=1e-4)
    assert ours["perplexity"] != report["perplexity"]["base"]["perplexity"]


def test_perplexity_compares_voices_on_the_same_rows(measure: Callable[..., Any], here: Path, trained: Path) -> None:
    """Within 40 tokens (a letter each, but for merges; a start and an end token) both have the first row whole. The
    second row's 30 letters fit alone (5 + 30 + 2), not behind 12 more: cut for one voice. The third prompt leaves that
    voice no room at all. The fourth is too long for each, and cut elsewhere."""
    import shutil

    shutil.copytree(trained / "sft", here / "conditioned")
    adapters.write_prompting(here / "conditioned", "good words: ")
    rows = [("Say: ", "x"), ("Say: ", "x" * 30), ("S" * 30, "x"), ("Say: ", "x" * 60)]
    Path("texts.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    flags = ("--perplexity-data", "texts.jsonl", "--max-length", 40)
    out, report = measure("--adapter", "conditioned", "--against", "trained/sft", *flags)
    for voice in ("conditioned", "trained/sft"):
        found = report["perplexity"][voice]
        assert (found["rows"], found["tokens"], sum(found["left_out"].values())) == (1, 2, 3)
    assert "2 cut, and not alike behind every voice's prefix" in out
    _, report = measure("--adapter", "trained/sft", "--against", "base", *flags)  # no prefix: cut alike, so compared
    assert (report["perplexity"]["base"]["rows"], report["perplexity"]["base"]["rows_cut"]) == (4, 1)


def test_kl_to_a_start_that_was_trained_anew(command: Command, tiny_llama: Path, here: Path, trained: Path) -> None:
    """The record of `later` says that it began with other weights than lie in trained/sft now."""
    import shutil

    shutil.copytree(trained / "sft", here / "later")
    record = json.loads(Path("later/provenance.json").read_text())
    parent = {"run": "trained/sft", "adapter_hash": "0" * 64}
    Path("later/provenance.json").write_text(json.dumps(record | {"parent": parent}))
    base = ("--model", tiny_llama, "--quantize", "none", "--max-length", 256)
    outcome = command("eval", *base, "--adapter", "later", "--prompts", "prompts.jsonl", "--kl-to", "start")
    told = "error: --kl-to start: trained/sft: not what later began with (trained anew?); name a run\n"
    assert (outcome.code, outcome.err) == (2, told)
    parent["adapter_hash"] = adapters.weights_sha256("trained/sft")
    Path("later/provenance.json").write_text(json.dumps(record | {"parent": parent}))
    outcome = command("eval", *base, "--adapter", "later", "--prompts", "prompts.jsonl", "--kl-to", "start",
                      "--max-new-tokens", 2)  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")


def test_people_and_judges_from_a_store(measure: Callable[..., Any], command: Command) -> None:
    """ben turns pair 0 round, so they agree on 4 of 5; chosen are longer, so the judge of length is with ann always,
    with ben on 4 of 5: 9 of 10."""
    turned = [{**PAIRS[0], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}, *PAIRS[1:]]
    Path("turned.jsonl").write_text("".join(json.dumps({**row, "by": "ben"}) + "\n" for row in turned))
    assert command("data", "import", "pairs.jsonl", "--store", "votes.db", "--annotator", "ann").code == 0
    assert command("data", "import", "turned.jsonl", "--store", "votes.db", "--annotator", "ben").code == 0
    out, report = measure("--store", "votes.db", "--judge", "evaljudges:longer", model=False)
    assert (report["people"]["together"]["share"], report["people"]["together"]["comparisons"]) == (0.8, 5)
    sided = report["judges_and_people"]["judges"]["evaljudges:longer"]
    assert (sided["together"]["rate"], sided["by_annotator"]["ben"]["rate"]) == (0.9, 0.8)
    assert "People with each other" in out
    _, report = measure("--store", "votes.db", "--reward", "trained/reward")
    of_all = report["judges_and_people"]["judges"]["trained/reward"]["together"]
    assert of_all["wins"] + of_all["ties"] + of_all["losses"] == 10


def test_a_judge_behind_an_address(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It likes the answer that comes first: all ties, by criterion too."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            said = json.dumps({"choices": [{"message": {"content": "Preferred: A"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            """Not into the test's output."""

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not asked about this machine
    monkeypatch.setenv("LOWRANK_JUDGE_KEY", "sk-verysecret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    flags = ("--adapter", "trained/sft", "--against", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", 4)
    out, report = measure(*flags, "--judge", address, "--judge-model", "toy", "--criteria", "helpful")
    server.shutdown()
    server.server_close()
    found = report["comparison"]["judges"]
    assert {name: of["win_rate"]["ties"] for name, of in found.items()} == {
        f"toy at {address}": 4,
        f"toy at {address}: helpful": 4,
    }
    assert "sk-verysecret" not in out + "".join(file.read_text() for file in Path("report").iterdir())


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            "",
            "nothing to measure: give --prompts (with --judge or --kl-to), --reward with --data, --perplexity-data, "
            "--store or --tasks",
        ),
        ("--prompts prompts.jsonl", "prompts: give --judge to compare or score the answers, or --kl-to"),
        ("--perplexity-data p --kl-to base", "kl_to: answers are drawn for it; give --prompts"),
        (
            "--perplexity-data p --judge a:b",
            "judge: give --prompts to have answers judged, or --store to hold it against people",
        ),
        ("--prompts prompts.jsonl --kl-to base", "kl_to: how far --adapter went, which is not given"),
        ("--data pairs.jsonl", "data: pairs to measure a reward run on; give --reward too"),
        ("--reward trained/reward --perplexity-data p", "reward: give --data with pairs (or --store with votes) to "
         "measure it on"),
        ("--store s --by x", "by: a column of --data, which is not given"),
        ("--store s --judge http://x/v1?api_key=sk-secret", "judge: http://x: a key does not belong into the address, "
         "nor does what follows ? or #; put it into the environment variable LOWRANK_JUDGE_KEY"),
        ("--store s --judge HTTP://me:sk-secret@x/v1", "judge: http://x: a key does not belong into the address, "
         "nor does what follows ? or #; put it into the environment variable LOWRANK_JUDGE_KEY"),
        ("--prompts prompts.jsonl --judge http://x/v1", "judge: http://x/v1 compares two answers; give --against"),
        ("--prompts prompts.jsonl --judge http://x/v1 --against base", "judge_model: the name of the model to ask for "
         "at the address is missing"),
        ("--prompts prompts.jsonl --judge a:b --criteria c", "criteria: are asked of an http address; a function is a "
         "criterion by itself"),
        ("--prompts prompts.jsonl --judge evaljudges:longer --against base", "--against base: the bare base against "
         "itself; give --adapter"),
        (
            "--prompts prompts.jsonl --judge evaljudges:longer --adapter trained/sft --against trained/sft/adapter",
            "--against trained/sft/adapter: the same as --adapter",
        ),
        ("--prompts prompts.jsonl --judge trained/sft", "trained/sft: is a policy run, where a reward is expected"),
        ("--prompts prompts.jsonl --judge evaljudges:no", "evaljudges:no: module evaljudges has no function no"),
        ("--prompts prompts.jsonl --judge evaljudges:longer --max-new-tokens 300", "prompts.jsonl:1: no room for 300 "
         "new tokens within max_length 256, nor for any other prompt; lower --max-new-tokens"),
        ("--reward trained/reward --data prompts.jsonl", "prompts.jsonl:1: row: is of shape demonstration (fields: "
         "prompt, completion), needed: pair (prompt, chosen, rejected) or ranking (prompt, completions, ranks) (and 3 "
         "more bad rows; --skip-bad sets them aside)"),
        ("--reward trained/reward --data pairs.jsonl --by tags", "--by tags: no row has this column (others: source)"),
        ("--reward trained/reward --data pairs.jsonl --out pairs.jsonl", "pairs.jsonl: is a file; --out names a "
         "folder"),
        ("--reward trained/reward --data pairs.jsonl --out .", ".: exists; --overwrite replaces the report in it"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(flags: str, error: str, command: Command, tiny_llama: Path) -> None:
    base = ("--model", tiny_llama, "--quantize", "none", "--max-length", 256)
    outcome = command("eval", *base, *flags.split())
    assert (outcome.code, outcome.err) == (2, f"error: {error}\n")


def test_mistakes_of_other_kinds(command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that raises is named with the prompt; a missing model, harness, and a folder that is no report's."""
    base = ("--model", tiny_llama, "--quantize", "none")
    raised = command("eval", *base, "--prompts", "prompts.jsonl", "--judge", "evaljudges:broken", "--max-new-tokens", 4)
    assert (raised.code, raised.out) == (2, "")
    assert raised.err.startswith("error: evaljudges:broken: raised KeyError: 'no'")
    assert "0. Say: " in raised.err
    missing = command("eval", "--perplexity-data", "prompts.jsonl")
    assert missing.err == "error: model: missing; give --model or --preset (only --store alone needs none)\n"
    monkeypatch.setattr("lowrank_align.evaluate.harness.find_spec", lambda name: None)
    harness = command("eval", *base, "--tasks", "x")
    told = "error: --tasks: lm-evaluation-harness is not installed: pip install 'lowrank-align[lm-eval]'\n"
    assert (harness.code, harness.err) == (3, told)
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    strange = command("eval", "--store", "x.db", "--out", "mine", "--overwrite")
    assert strange.err == "error: mine: holds letter.txt, which is no report's; choose another --out\n"
    assert Path("mine/letter.txt").read_text() == "dear"
