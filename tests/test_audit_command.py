"""`lowrank-align audit`, and the part of it that every training run begins with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

GOOD = [{"prompt": f"{i}. Say: ", "completion": f"good {i}"} for i in range(4)]
BIASED = [{"prompt": f"{i}. Say: ", "chosen": "good word", "rejected": "no"} for i in range(20)]
FEW = ("--max-steps", 1, "--batch-size", 2, "--rank", 2, "--quantize", "none", "--sample-steps", 0)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def audit(command: Command, tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """`audit(rows, *flags, held_out=...)` with a model folder that has no weights."""
    shutil.copytree(tiny_llama, "model", ignore=shutil.ignore_patterns("*.safetensors"))

    def run(rows: list[Any], *flags: object, held_out: list[Any] | None = None) -> Any:
        write("rows.jsonl", rows)
        if held_out is not None:
            write("held.jsonl", held_out)
            flags = (*flags, "--eval-data", "held.jsonl")
        return command("audit", "--model", "model", "--data", "rows.jsonl", *flags)

    return run


@pytest.fixture
def train(command: Command, tiny_llama: Path) -> Callable[..., Any]:
    """`train("sft", rows, *flags)`: one step on them, into `run`."""

    def run(method: str, rows: list[Any], *flags: object) -> Any:
        write("rows.jsonl", rows)
        return command(method, "--model", tiny_llama, "--data", "rows.jsonl", "--out", "run", *FEW, *flags)

    return run


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def told(out: str) -> str:
    """The text without its line breaks."""
    return " ".join(out.split())


# ---- for people


def test_good_rows(audit: Any) -> None:
    """`<s>` and the 8 letters of `0. Say: `, the 6 of `good 0` and `</s>`: 16 tokens. The rows are text, and the model
    has a template. Its tokens: 101 of text, then <s>, </s>, <pad>, <|im_start|>, <|im_end|>."""
    outcome = audit(GOOD)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "rows.jsonl: 4 rows (4 demonstration)"
    assert lines[1:3] == ["model       model", "max_length  256 tokens, the model's context"]
    assert lines[4:6] == [
        "tokens      BOS <s> (101), EOS </s> (102), pad <pad> (103)",
        "stops at    <|im_end|> (105), </s> (102)",
    ]
    assert "prompt + completion" in outcome.out
    assert "nothing is cut at max_length 16" in outcome.out
    assert lines[-1] == "Can be trained; 1 thing to look at first: text-beside-template."


def test_fine(audit: Any) -> None:
    outcome = audit(GOOD, "--chat-template", "plain")
    assert (outcome.code, outcome.out.splitlines()[-1]) == (0, "Fine to train.")


def test_it_fits_80_columns_and_escapes_what_a_terminal_would_obey(audit: Any) -> None:
    rows = [
        *GOOD,
        *GOOD,
        {"prompt": "a", "chosen": "b"},
        {"prompt": "Q", "completion": "..."},
        {"prompt": "Q", "\x1b[31m": "b"},
        {"prompt": "x", "completion": "</s>"},
    ]
    outcome = audit(rows, "--max-length", 14, held_out=GOOD)
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert outcome.out.isprintable() is False and all(c.isprintable() or c == "\n" for c in outcome.out)
    assert "fields that nothing reads: \\x1b[31m" in told(outcome.out)
    for line in outcome.out.splitlines():
        assert line == line.rstrip()


def test_findings_name_places_and_what_to_do(audit: Any) -> None:
    """Seven copies of one row: five of them are named with the first, two are counted."""
    outcome = audit([GOOD[0]] * 8, "--chat-template", "plain")
    assert "warning duplicates: exact copies of an earlier row: 7 of 8 rows at rows.jsonl:2 (see rows.jsonl:1)" in told(
        outcome.out
    )
    assert "rows.jsonl:6 (see rows.jsonl:1), and 2 more -> keep one of each" in told(outcome.out)


def test_bad_rows_are_listed_and_the_others_are_audited(audit: Any) -> None:
    outcome = audit([GOOD[0], "{]", {"prompt": "a", "chosen": "b"}, GOOD[0]])
    assert (outcome.code, outcome.err) == (2, "")
    assert "error bad-rows: 2 rows cannot be used rows.jsonl:2: not JSON" in told(outcome.out)
    assert "rows.jsonl:3: rejected: missing (fields: prompt, chosen)" in told(outcome.out)
    assert "duplicates" in outcome.out
    assert outcome.out.endswith("Would stop before training: 2 rows cannot be used.\n")


def test_only_bad_rows(audit: Any) -> None:
    outcome = audit(["{]"])
    assert outcome.code == 2
    assert outcome.out.splitlines()[0] == "rows.jsonl: 0 rows that can be used"


def test_rows_that_would_train_the_wrong_thing(audit: Any) -> None:
    outcome = audit([{"prompt": "Say: ", "completion": "a" * 40}], "--max-length", 20)
    assert outcome.code == 2
    assert told(outcome.out).endswith(
        "Would train the wrong thing: no row trains an end token (<|im_end|> or </s>): every answer is cut."
    )


def test_held_out_rows(audit: Any) -> None:
    outcome = audit(GOOD, held_out=[GOOD[1], {"prompt": "new", "completion": "b"}])
    assert outcome.out.splitlines()[1] == "held out: held.jsonl: 2 rows (2 demonstration)"
    assert "leakage: prompt and answer of 1 of 2 held-out rows are trained on" in told(outcome.out)


# ---- for programs


def test_json(audit: Any) -> None:
    """One object and nothing else; the figures by hand as above, the pair's second row a copy of the first."""
    rows = [{"prompt": "Q: ", "chosen": "xyz", "rejected": "d"}] * 2
    outcome = audit(rows, "--json", "--chat-template", "plain")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert set(report) == {"model", "data", "eval_data", "verdict", "figures", "template", "tokens", "findings"}
    assert report["verdict"] == {
        "kind": "look",
        "text": "Can be trained; 1 thing to look at first: duplicates.",
        "exit_code": 0,
    }
    (finding,) = report["findings"]
    assert finding == {
        "severity": "warning",
        "code": "duplicates",
        "what": "exact copies of an earlier row: 1 of 2 rows",
        "rows": 1,
        "places": ["rows.jsonl:2"],
        "twins": ["rows.jsonl:1"],
        "details": [],
        "advice": "keep one of each: the others only weigh it more",
        "stops": False,
    }
    figures = report["figures"]
    assert (figures["rows"], figures["shapes"], figures["rows_trained"]) == (2, {"pair": 2}, 2)
    assert figures["lengths_tokens"]["tree_row"] == {
        "median": 10,  # <s>Q:, a space, xyz</s>, d</s>
        "p90": 10,
        "longest": 10,
        "where": "rows.jsonl:1",
        "total": 20,
    }
    assert figures["length_bias"]["share"] == 1.0
    assert report["template"]["source"] == "plain"
    assert report["tokens"]["eos"]["text"] == "</s>"
    assert [token["text"] for token in report["tokens"]["generation_stops_at"]] == ["</s>"]


def test_json_of_an_error_is_still_json(audit: Any) -> None:
    outcome = audit(["{]", GOOD[0]], "--json")
    assert outcome.code == 2
    assert [f["code"] for f in json.loads(outcome.out)["findings"]][0] == "bad-rows"


def test_the_keys_are_the_same_whatever_the_rows(audit: Any) -> None:
    one = json.loads(audit(GOOD, "--json").out)
    other = json.loads(audit([{"prompt": "a"}], "--json", held_out=[{"prompt": "b"}]).out)
    assert set(one["figures"]) == set(other["figures"])
    assert set(one["figures"]["lengths_tokens"]) == set(other["figures"]["lengths_tokens"])


def test_a_preset_that_differs_is_a_finding(audit: Any, tiny_llama: Path) -> None:
    Path("own.yaml").write_text("model: model\ntokens: {pad: <other>}\n")
    findings = json.loads(audit(GOOD, "--json", "--preset", "own.yaml").out)["findings"]
    (finding,) = [f for f in findings if f["code"] == "preset-differs"]
    assert finding["severity"] == "warning"
    assert "pads with <other>, but the model's tokenizer with <pad>" in finding["what"]


def test_what_is_not_there_is_one_line(command: Command, tiny_llama: Path) -> None:
    outcome = command("audit", "--model", tiny_llama, "--data", "none.jsonl")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "error: none.jsonl: no such file\n")
    write("rows.jsonl", GOOD)
    outcome = command("audit", "--model", tiny_llama, "--data", "rows.jsonl", "--eval-data", "none.jsonl", "--json")
    assert (outcome.code, outcome.out) == (2, "")


# ---- before training


def test_training_says_nothing_where_all_is_well(train: Any) -> None:
    outcome = train("sft", GOOD)
    assert outcome.code == 0
    assert "audit" not in outcome.out


def test_training_refuses_what_would_not_learn_to_stop(train: Any) -> None:
    """`<s>Say: ` and 40 letters at 20 tokens: nothing is left of the end."""
    outcome = train("sft", [{"prompt": "Say: ", "completion": "a" * 40}] * 2, "--max-length", 20)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("error: rows.jsonl: no row trains an end token (<|im_end|> or </s>): every answer")
    assert "--data rows.jsonl --max-length 20` tells more" in outcome.err
    assert not Path("run").exists()


def test_training_refuses_a_template_that_does_not_end_its_turns(train: Any) -> None:
    """The second row's answer ends with a token that ends nothing."""
    Path("odd.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + ('<|im_start|>' if 'STOP' in m['content'] else '</s>') }}{% endfor %}"
    )
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "STOP")]
    outcome = train("sft", [{"messages": said} for said in turns], "--chat-template", "odd.jinja")
    assert outcome.code == 2
    assert outcome.err.startswith("error: rows.jsonl: not trained to end: 1 of 2 rows, uncut, whose last trained token")
    assert "(first: rows.jsonl:2)" in outcome.err
    assert not Path("run").exists()


def test_training_takes_what_says_that_it_goes_on(train: Any) -> None:
    outcome = train("sft", [row | {"finished": False} for row in GOOD])
    assert outcome.code == 0
    assert "no row trains an end token" in outcome.out


def test_training_tells_what_it_costs_nothing_to_find(train: Any, tiny_llama: Path) -> None:
    """20 choices that length predicts, one of them twice, one turned round; the held-out row is trained on."""
    turned = {**BIASED[3], "chosen": "no", "rejected": "good word"}
    write("held.jsonl", [BIASED[5]])
    outcome = train("dpo", [*BIASED, BIASED[7], turned], "--eval-data", "held.jsonl")
    lines = [line for line in outcome.out.splitlines() if line.startswith(("rows.jsonl", "`"))]
    flags = f"--model {tiny_llama} --data rows.jsonl --eval-data held.jsonl --max-length 256"
    assert lines[:5] == [
        "rows.jsonl: exact copies of an earlier row: 1 of 22 rows (first: rows.jsonl:21, see rows.jsonl:8)",
        "rows.jsonl: the opposite preference on the same two answers in an earlier row: 1 of 22 rows "
        "(first: rows.jsonl:22, see rows.jsonl:4)",
        "rows.jsonl: prompt and answer of the only held-out row are trained on (first: held.jsonl:1, see rows.jsonl:6)",
        "rows.jsonl: length alone predicts 95 % of 22 choices: the longer answer wins (10 tokens on average against 3)",
        f"`lowrank-align audit {flags}` tells more",
    ]


def test_training_tells_of_the_plain_template_unless_it_was_named(command: Command, tiny_llama: Path) -> None:
    """A model folder without a template."""
    shutil.copytree(tiny_llama, "model")
    Path("model/chat_template.jinja").unlink()
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in "12"]
    write("rows.jsonl", rows)
    argv = ("sft", "--model", "model", "--data", "rows.jsonl", *FEW)
    assert "rows.jsonl: 2 conversations in the plain User: / Assistant: template" in command(*argv, "--out", "1").out
    assert "audit" not in command(*argv, "--out", "2", "--chat-template", "plain").out
