"""generate, score, logps and show: a line a row or a completion, in order, with the numbers that plain "
"libraries give."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_align.rollout import Rollout

Command = Callable[..., Any]
Write = Callable[..., list[dict[str, Any]]]

TEXTS = [  # of several lengths, so that a batch is padded
    {"prompt": "Say: ", "completion": "yes"},
    {"prompt": "A much longer question? ", "completion": "no, or so it seems to me"},
    {"prompt": "x", "completion": "y"},
]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]


@pytest.fixture(autouse=True)
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the runs of `trained`."""
    (tmp_path / "trained").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(command: Command, tiny_llama: Path) -> Write:
    """`write("logps", rows, *flags)`: the lines that the command writes for these rows."""

    def run_it(name: str, rows: list[dict[str, Any]], *flags: object) -> list[dict[str, Any]]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = "--prompts" if name == "generate" else "--data"
        argv = (name, "--model", tiny_llama, "--quantize", "none", source, "rows.jsonl")
        outcome = command(*argv, "--out", "deep/out.jsonl", "--overwrite", *flags)
        assert (outcome.code, outcome.err) == (0, "")
        lines = [json.loads(line) for line in Path("deep/out.jsonl").read_text().splitlines()]
        assert f"deep/out.jsonl: {len(lines)} lines\n" in outcome.out
        return lines

    return run_it


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Any:
    """The model and its tokenizer without anything of ours."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        tiny_llama
    )


@torch.no_grad()
def plain_logp(plain: Any, text: str, ending: str) -> tuple[float, int]:
    """Log-probability of what follows `text` in `text + ending`, and its tokens, by one forward pass."""
    model, tokenizer = plain
    before, whole = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, text + ending))
    assert whole[: len(before)] == before
    logps = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(whole[1:])
    each = logps.gather(-1, targets[:, None])[len(before) - 1 :, 0]
    return each.sum().item(), len(each)


# ---- logps


def test_logps_are_those_of_plain_transformers(write: Write, plain: Any) -> None:
    """Text begins with <s> and ends with </s>, which counts; "yes" has 3 letters, so 4 tokens."""
    found = write("logps", TEXTS, "--batch-size", 2)
    for row, line in zip(TEXTS, found, strict=True):
        logp, tokens = plain_logp(plain, "<s>" + row["prompt"], row["completion"] + "</s>")
        assert line == {"logps": [pytest.approx(logp, abs=1e-4)], "num_tokens": [tokens]}
    assert found[0]["num_tokens"] == [4]


def test_logps_of_conversations(write: Write, plain: Any) -> None:
    """The template ends a turn with <|im_end|>, which counts; of two answers --train-on last counts the second.

    "Hi." and its end are 4 tokens, "Again?" and its end 6, because "in" is one.
    """
    turns = [*CHAT, {"role": "assistant", "content": "Hi."}, CHAT[1], {"role": "assistant", "content": "Again?"}]
    (every,) = write("logps", [{"messages": turns}])
    (last,) = write("logps", [{"messages": turns}], "--train-on", "last")
    opened = "<s><|im_start|>system\nBe kind.<|im_end|><|im_start|>user\nHello!<|im_end|><|im_start|>assistant\n"
    middle = opened + "Hi.<|im_end|><|im_start|>user\nHello!<|im_end|><|im_start|>assistant\n"
    first_logp, first_tokens = plain_logp(plain, opened, "Hi.<|im_end|>")
    last_logp, last_tokens = plain_logp(plain, middle, "Again?<|im_end|>")
    assert last == {"logps": [pytest.approx(last_logp, abs=1e-4)], "num_tokens": [last_tokens]}
    assert every["logps"] == [pytest.approx(first_logp + last_logp, abs=1e-4)]
    assert every["num_tokens"] == [first_tokens + last_tokens] == [4 + 6]


def test_every_shape_has_a_number_a_completion(write: Write) -> None:
    """A pair 2 (chosen first), a ranking of K its K, the others 1: all equal to the completion's own line."""
    prompt, answers = "Pick: ", ["one", "two", "three"]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt, "completions": answers, "ranks": [2, 1, 3]},
        {"prompt": prompt, "completion": answers[2], "label": True},
        {"prompt": prompt, "completion": answers[0], "score": 0.5},
    ]
    for name, key, flags in (("logps", "logps", ()), ("score", "scores", ("--adapter", "trained/reward"))):
        alone = [write(name, [{"prompt": prompt, "completion": text}], *flags)[0][key][0] for text in answers]
        found = [line[key] for line in write(name, rows, *flags)]
        expected = [[alone[0], alone[1]], alone, [alone[2]], [alone[0]]]
        assert found == [pytest.approx(line, abs=1e-4) for line in expected]


def test_an_adapter_changes_the_numbers_and_its_absence_is_the_bare_base(write: Write, plain: Any) -> None:
    bare, adapted = write("logps", TEXTS), write("logps", TEXTS, "--adapter", "trained/sft")
    differences = [abs(a["logps"][0] - b["logps"][0]) for a, b in zip(bare, adapted, strict=True)]
    assert min(differences) > 1e-3


def test_rows_that_do_not_fit_keep_their_line(write: Write) -> None:
    """Null, with the reason; the others as if they were alone. "Say: yes" takes 9 tokens with <s> and </s>."""
    rows = [{"prompt": "a" * 50, "completion": "b"}, TEXTS[0], {"prompt": "b" * 50, "completion": "b"}]
    reason = {"reason": "the prompt leaves no room"}
    found = write("logps", rows, "--max-length", 10, "--batch-size", 1)
    assert found[0] == found[2] == {"logps": None, "num_tokens": None, **reason}
    assert found[1] == write("logps", [TEXTS[0]])[0]
    found = write("score", rows, "--max-length", 10, "--adapter", "trained/reward")
    assert found[0] == found[2] == {"scores": None, **reason}
    assert found[1]["scores"] == [
        pytest.approx(write("score", [TEXTS[0]], "--adapter", "trained/reward")[0]["scores"][0])
    ]


def test_cut_and_missing_rows_are_told(command: Command, tiny_llama: Path) -> None:
    """At 8 tokens "<s>Say: " leaves 2, so "yes" is cut; the second row is "x", "y" and fits; the third does not."""
    Path("rows.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [TEXTS[0], TEXTS[2], {**TEXTS[2], "prompt": "a" * 9}])
    )
    argv = ("logps", "--model", tiny_llama, "--data", "rows.jsonl", "--quantize", "none", "--max-length", 8)
    outcome = command(*argv, "--out", "out.jsonl")
    assert outcome.out == (
        "rows.jsonl: 1 of 3 rows cut at max_length 8\nout.jsonl: 3 lines\n"
        "  1 of them without figures (first: the prompt leaves no room)\n"
    )
    assert [line["num_tokens"] for line in map(json.loads, Path("out.jsonl").read_text().splitlines())] == [
        [2],
        [2],
        None,
    ]


def test_bad_rows_keep_their_line_with_skip_bad(command: Command, write: Write, tiny_llama: Path) -> None:
    """Without it the first one ends the command."""
    rows = [{"prompt": "a", "completion": ""}, TEXTS[0], {"messages": [{"role": "tool", "content": "x"}]}]
    rows[2]["messages"].append({"role": "assistant", "content": "b"})
    found = write("logps", rows, "--skip-bad", "--chat-template", "plain")
    assert found[0] == {"logps": None, "num_tokens": None, "reason": "rows.jsonl:1: completion: empty"}
    assert found[1] == write("logps", [TEXTS[0]])[0]
    assert found[2]["reason"].startswith("rows.jsonl:3: messages: the chat template refuses this conversation")


def test_conversions_are_told(command: Command, tiny_llama: Path) -> None:
    Path("alpaca.json").write_text('[{"instruction": "Say", "output": "yes"}]')
    Path("hh.jsonl").write_text(
        '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}'
    )
    argv = ("--model", tiny_llama, "--quantize", "none", "--out")
    told = command("logps", "--data", "alpaca.json", *argv, "1.jsonl").out
    assert told.startswith("alpaca.json: 1 rows read as Alpaca\n")
    told = command("generate", "--prompts", "hh.jsonl", *argv, "2.jsonl", "--max-new-tokens", 2).out
    assert told.startswith("hh.jsonl: 1 rows read as HH\n")


# ---- score


def test_shifted_scores_differ_by_the_shift(write: Write) -> None:
    """raw - shift, with the shift that `reward.json` holds."""
    shift = json.loads(Path("trained/reward/reward.json").read_text())["shift"]
    assert shift != 0
    raw = write("score", TEXTS, "--adapter", "trained/reward")
    shifted = write("score", TEXTS, "--adapter", "trained/reward", "--shifted")
    for one, other in zip(raw, shifted, strict=True):
        assert one["scores"][0] - other["scores"][0] == pytest.approx(shift, abs=1e-6)


def test_shifted_training_scores_have_mean_zero(write: Write) -> None:
    """The shift is taken over all completions of the training rows, which are the run's `pairs.jsonl`."""
    rows = [json.loads(line) for line in Path("trained/pairs.jsonl").read_text().splitlines()]
    scores = [
        score for line in write("score", rows, "--adapter", "trained/reward", "--shifted") for score in line["scores"]
    ]
    assert len(scores) == 12
    assert sum(scores) / 12 == pytest.approx(0, abs=1e-5)


# ---- generate


def test_greedy_answers_are_those_of_plain_transformers(write: Write, plain: Any) -> None:
    """Temperature 0, each prompt alone in `generate` of transformers; the lines in the order of the prompts."""
    model, tokenizer = plain
    found = write("generate", TEXTS, "--temperature", 0, "--max-new-tokens", 12)
    assert [line["prompt"] for line in found] == [row["prompt"] for row in TEXTS]
    for line in found:
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)
        assert line["completion"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert line["finished"] == (tokenizer.eos_token_id in out[0, ids.shape[1] :])


def test_completions_and_seeds(write: Write) -> None:
    """-n lines a prompt, together; the seed decides which, and at temperature 0 it decides nothing."""
    flags = ("-n", 3, "--max-new-tokens", 8, "--batch-size", 4)
    found = write("generate", TEXTS, *flags)
    assert [line["prompt"] for line in found] == [row["prompt"] for row in TEXTS for _ in range(3)]
    assert len({line["completion"] for line in found}) > 6
    assert write("generate", TEXTS, *flags) == found
    assert write("generate", TEXTS, *flags, "--seed", 1) != found
    greedy = [write("generate", TEXTS, *flags, "--temperature", 0, "--seed", seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    assert len({line["completion"] for line in greedy[0]}) <= 3
    likely = write("generate", TEXTS, *flags, "--top-p", 1e-6)  # of the likeliest tokens one is left
    assert [line["completion"] for line in likely] == [line["completion"] for line in greedy[0]]


def test_any_row_that_has_a_prompt(write: Write) -> None:
    """The prompt of a pair, of a demonstration, of a conversation; none of their answers is seen."""
    rows: list[dict[str, Any]] = [
        {"prompt": "Say: "},
        {"prompt": "Say: ", "completion": "yes"},
        {"prompt": "Say: ", "chosen": "yes", "rejected": "no"},
    ]
    found = write("generate", rows, "--temperature", 0, "--max-new-tokens", 4)
    assert found[0] == found[1] == found[2]


def test_conversations_get_messages(write: Write) -> None:
    """In the rows' own layout, so that they can be scored or trained on; answers begin and end with a letter."""
    rows: list[dict[str, Any]] = [{"prompt": CHAT}, {"messages": [*CHAT, {"role": "assistant", "content": "Hi."}]}]
    found = write("generate", rows, "--temperature", 0, "--max-new-tokens", 6)
    assert found[0] == found[1]
    assert found[0]["prompt"] == CHAT
    ((answer,),) = [line["completion"] for line in found[:1]]
    assert answer["role"] == "assistant"
    assert answer["content"] == answer["content"].strip()
    assert len(write("score", found, "--adapter", "trained/reward", "--skip-bad")) == 2


def test_prompts_too_long_are_left_out_and_named(command: Command, tiny_llama: Path) -> None:
    """With 4 new tokens within 12, "<s>" and 7 letters are the longest prompt."""
    rows = [{"prompt": "a" * length} for length in (7, 8, 3, 200)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("generate", "--model", tiny_llama, "--prompts", "rows.jsonl", "--quantize", "none", "--max-new-tokens", 4)
    outcome = command(*argv, "--max-length", 12, "--out", "out.jsonl")
    assert outcome.code == 0
    left_out = "2 of 4 prompts left out, no room for 4 new tokens within max_length 12: rows.jsonl:2, rows.jsonl:4"
    assert outcome.out.splitlines()[:2] == [left_out, "out.jsonl: 2 lines"]
    answered = [json.loads(line)["prompt"] for line in Path("out.jsonl").read_text().splitlines()]
    assert answered == ["a" * 7, "a" * 3]
    Path("rows.jsonl").write_text(json.dumps(rows[3]))
    outcome = command(*argv, "--max-length", 12, "--out", "none.jsonl")
    message = (
        "rows.jsonl:1: no room for 4 new tokens within max_length 12, nor for any other prompt; lower --max-new-tokens"
    )
    assert (outcome.code, outcome.err) == (2, f"error: {message}\n")
    assert not Path("none.jsonl").exists()


def test_empty_answers_are_counted(
    write: Write, command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says nothing but the end: its answers are written as they are, and can be scored with --skip-bad."""

    def silence(base: Any, prompts: list[list[int]], *, end_ids: list[int], **_options: Any) -> list[list[Rollout]]:
        return [[Rollout(prompt, end_ids[:1], finished=True)] for prompt in prompts]

    monkeypatch.setattr(import_module("lowrank_align.commands.rows"), "sample", silence)
    Path("rows.jsonl").write_text(json.dumps(TEXTS[0]) + "\n" + json.dumps({"prompt": CHAT}))
    argv = ("generate", "--model", tiny_llama, "--prompts", "rows.jsonl", "--quantize", "none", "--out", "out.jsonl")
    told = command(*argv).out
    assert told == "out.jsonl: 2 lines\n  2 of them empty: score and logps take them with --skip-bad\n"
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert answers[0] == {"prompt": "Say: ", "completion": "", "finished": True}
    found = write("logps", [*answers, TEXTS[0]], "--skip-bad")
    assert [line.get("reason") for line in found] == [
        "rows.jsonl:1: completion: empty",
        "rows.jsonl:2: completion[0].content: empty",
        None,
    ]


# ---- files


def test_the_file_is_replaced_only_when_asked(command: Command, tiny_llama: Path) -> None:
    Path("rows.jsonl").write_text(json.dumps(TEXTS[0]))
    argv = ("logps", "--model", tiny_llama, "--data", "rows.jsonl", "--quantize", "none", "--out", "out.jsonl")
    assert command(*argv).code == 0
    first = Path("out.jsonl").read_text()
    assert command(*argv).code == 2
    Path("out.jsonl").write_text("old\n")
    assert command(*argv, "--overwrite").code == 0
    assert Path("out.jsonl").read_text() == first


# ---- show


def test_show_marks_trained_tokens(command: Command, tiny_llama: Path) -> None:
    """Without a terminal between brackets: the answers and what ends them, of a pair both sides, of a conversation both
    turns, or the last."""
    turns = [CHAT[1], {"role": "assistant", "content": "Hi."}, CHAT[1], {"role": "assistant", "content": "Again?"}]
    pair = {"prompt": "Say: ", "chosen": "yes", "rejected": "no"}
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [pair, {"messages": turns}, TEXTS[0]]))
    argv = ("show", "--model", tiny_llama, "--data", "rows.jsonl")
    outcome = command(*argv, "-n", 2)
    assert (outcome.code, outcome.err) == (0, "")
    for part in (
        "<s>Say: ",
        "\u27e6yes</s>\u27e7",
        "\u27e6no</s>\u27e7",
        "\u27e6Hi.<|im_end|>\u27e7",
        "\u27e6Again?<|im_end|>\u27e7",
    ):
        assert part in outcome.out
    assert "rows.jsonl:3" not in outcome.out
    assert "2 of 2 rows" in outcome.out
    last = command(*argv, "-n", 2, "--train-on", "last").out
    assert "\u27e6Again?<|im_end|>\u27e7" in last
    assert "\u27e6Hi." not in last


def test_show_needs_no_weights(command: Command, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("rows.jsonl").write_text(json.dumps(TEXTS[0]))
    assert command("show", "--model", "model", "--data", "rows.jsonl").code == 0
