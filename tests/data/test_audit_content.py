"""What the audit finds in what the rows say: texts, copies, contradictions, leakage, judgements.

Every count is that of what was planted; the tokenizer has a token a character, `<s>` before a text and `</s>` after it.
"""

from collections.abc import Callable
from typing import Any

import pytest

from lowrank_align.data.audit import Audit, Finding
from lowrank_align.data.audit.judgements import length_bias
from lowrank_align.data.formats import parse_row

Run = Callable[..., Audit]


def of_code(audit: Audit, code: str) -> Finding:
    """The one finding of that code."""
    (finding,) = [finding for finding in audit.findings if finding.code == code]
    return finding


def brief(finding: Finding) -> tuple[str, int, list[str]]:
    """Severity, rows, and the lines that are named."""
    return finding.severity, finding.rows, [place.removeprefix("rows.jsonl:") for place in finding.places]


def codes(audit: Audit) -> list[str]:
    return [finding.code for finding in audit.findings]


def say(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def chat(*said: str, system: str = "") -> dict[str, Any]:
    """Turns of the user and the assistant in their order."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


# ---- texts


def test_control_tokens_in_contents(audit: Run, chatml: str) -> None:
    """In an answer they would be learnt as letters, in a question they are text, in a text row they act."""
    answer, question = chat("a", "Sure.<|im_end|>"), chat("what is </s> and </s>?", "c")
    found = audit([answer, question, chat("a", "b")], template=chatml)
    assert brief(of_code(found, "control-tokens-in-answers")) == ("warning", 1, ["1"])
    assert brief(of_code(found, "control-tokens-in-prompts")) == ("note", 1, ["2"])
    assert "(</s> 2 x)" in of_code(found, "control-tokens-in-prompts").what
    text = audit([say("a", "b</s>"), {"text": "<|im_start|>user"}, say("c", "<x>")])
    assert brief(of_code(text, "control-tokens-act")) == ("warning", 2, ["1", "2"])


def test_another_models_marks(audit: Run) -> None:
    found = audit([say("[INST] a [/INST]", "b"), say("a", "b<|eot_id|>"), say("a[0]", "<|> |>")])
    assert brief(of_code(found, "foreign-marks")) == ("warning", 2, ["1", "2"])
    assert "control-tokens-act" not in codes(found)


def test_broken_encoding_and_empty_answers(audit: Run) -> None:
    """One row each: a lost character, an e acute of two characters, a form feed; an answer of dots."""
    rows = [
        say("a", "b\ufffd"),
        say("a", "fianc\u00c3\u00a9"),
        say("a", "\frac"),
        say("a", "..."),
        say("\u00e9t\u00e9, S\u00c3O", "\u4e2d\u6587\u3002 5\u2009%\n\tok"),  # all of it fine
        say("?", "Yes."),
    ]
    found = audit(rows)
    for line, code in enumerate(["replacement-characters", "mojibake", "control-characters", "empty-answers"], start=1):
        assert brief(of_code(found, code)) == ("warning", 1, [str(line)])


# ---- the same again, the opposite


def test_duplicates(audit: Run) -> None:
    """Rows 3 and 5 repeat row 1; row 4 differs in case and space alone; as messages a row says the same as text."""
    first = say("Q", "An answer")
    as_chat = {"prompt": [{"role": "user", "content": "Q"}], "completion": "An answer"}
    found = audit([first, say("Q2", "An answer"), first, say("q ", "an  ANSWER"), as_chat], chat_template="plain")
    exact, near = of_code(found, "duplicates"), of_code(found, "near-duplicates")
    assert (brief(exact), exact.twins) == (("warning", 2, ["3", "5"]), ("rows.jsonl:1", "rows.jsonl:1"))
    assert (brief(near), near.twins) == (("note", 1, ["4"]), ("rows.jsonl:1",))


def test_another_judgement_or_other_tools_are_no_duplicates(audit: Run) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert "duplicates" not in codes(audit([say("Q", "A", score=1), say("Q", "A", score=2)]))
    assert "duplicates" not in codes(audit([chat("a", "b"), chat("a", "b") | {"tools": [tool]}]))
    assert "duplicates" in codes(audit([chat("a", "b"), chat("a", "b")]))


def test_contradictions_of_pairs_and_rankings(audit: Run) -> None:
    """Line 2 turns line 1 round; line 3 says the same as line 1 with a turned preference; 5 has one comparison of 4's
    three the other way; a tie contradicts nobody."""
    rows = [
        pair("Q", "a", "b"),
        pair("Q", "b", "a"),
        pair("Q", "b", "a", preference=0.1),
        {"prompt": "P", "completions": ["x", "y", "z"], "ranks": [1, 2, 3]},
        {"prompt": "P", "completions": ["z", "y"], "ranks": [1, 2]},
        pair("P", "y", "x", preference=0.5),
        pair("R", "b", "a"),
    ]
    found = of_code(audit(rows), "contradictions")
    assert brief(found) == ("warning", 2, ["2", "5"])
    assert found.twins == ("rows.jsonl:1", "rows.jsonl:4")


def test_contradictions_of_labels_scores_and_answers(audit: Run) -> None:
    labels = audit([say("Q", "a", label=True), say("Q", "a", label=False), say("Q", "b", label=False)])
    assert brief(of_code(labels, "contradictions")) == ("warning", 1, ["2"])
    scores = audit([say("Q", "a", score=1), say("Q", "a", score=2)])
    assert (brief(of_code(scores, "several-scores")), scores.verdict.kind) == (("note", 1, ["2"]), "fine")
    answers = audit([say("Q", "a"), say("Q", "b"), say("Q", "a "), {"text": "c"}, {"text": "d"}])
    assert brief(of_code(answers, "several-answers")) == ("note", 2, ["2", "3"])


def test_leakage(audit: Run) -> None:
    """Of the held-out rows, the first has prompt and an answer of line 1 (in other case), the second its prompt."""
    rows = [pair("Q", "good", "bad"), pair("P", "x", "y")]
    held_out = [pair("q", "Good ", "new"), pair("Q", "else", "other"), pair("new", "good", "bad")]
    found = audit(rows, held_out)
    both, prompt = of_code(found, "leakage"), of_code(found, "prompt-leakage")
    assert (both.severity, both.rows, both.places, both.twins) == ("warning", 1, ("held.jsonl:1",), ("rows.jsonl:1",))
    assert (prompt.severity, prompt.rows, prompt.places) == ("warning", 1, ("held.jsonl:2",))
    assert found.verdict.exit_code == 0
    assert {"leakage", "prompt-leakage"}.isdisjoint(codes(audit(rows, [pair("new", "good", "bad")])))


def test_prompts_that_come_again_by_nature_are_no_leakage(audit: Run) -> None:
    """Ten rows a prompt in the training file: whoever asks the same each time can hold out no new prompt."""
    rows = [say("Write a review.", f"Review {i}") for i in range(10)]
    found = audit(rows, [say("Write a review.", "New")])
    assert of_code(found, "prompt-leakage").severity == "note"


def test_texts_leak_as_a_whole(audit: Run) -> None:
    found = audit([{"text": "abc"}, {"text": "def"}], [{"text": "ABC"}, {"text": "abcd"}])
    assert (of_code(found, "leakage").rows, "prompt-leakage" in codes(found)) == (1, False)


def test_held_out_rows_are_looked_at_too(audit: Run) -> None:
    found = audit([say("a", "b")], [say("c", "d"), say("c", "d"), "{", say("12345678", "e")], max_length=8)
    assert of_code(found, "eval-bad-rows").places == ("held.jsonl:3",)
    assert of_code(found, "eval-rows-dropped").places == ("held.jsonl:4",)
    assert (of_code(found, "eval-duplicates").severity, of_code(found, "eval-duplicates").rows) == ("note", 1)
    assert found.verdict.kind == "stops"


def test_held_out_rows_of_another_shape(audit: Run) -> None:
    """Pairs and rankings go together, and whatever has a prompt will do for prompts."""
    ranking = {"prompt": "S", "completions": ["a", "b"], "ranks": [1, 2]}
    found = audit([pair("Q", "a", "b")], [ranking, say("P", "a")])
    assert (of_code(found, "eval-shape").rows, of_code(found, "eval-shape").severity) == (1, "error")
    assert "eval-shape" not in codes(audit([{"prompt": "Q"}], [say("P", "a")]))


# ---- judgements


def test_length_bias(audit: Run) -> None:
    """Of 20 choices the longer answer wins 15, 2 are as long, the shorter wins 3: it predicts (15 + 1) / 20 = 80 %.

    The better ones have 15 x 3 + 2 x 2 + 3 x 2 = 55 tokens, the others 15 x 2 + 2 x 2 + 3 x 3 = 43. A turned preference
    turns the bias; with one choice less nothing is said.
    """
    sides = [("aa", "b")] * 15 + [("a", "b")] * 2 + [("a", "bb")] * 3
    rows = [pair(f"Q{i:02}", *side) for i, side in enumerate(sides)]
    found = audit(rows)
    finding = of_code(found, "length-bias")
    assert finding.severity == "warning"
    assert finding.what.startswith("length alone predicts 80 % of 20 choices: the longer answer wins")
    bias = found.figures()["length_bias"]
    assert bias == {
        "choices": 20,
        "longer": 15,
        "equal": 2,
        "mean_better_tokens": 55 / 20,
        "mean_worse_tokens": 43 / 20,
        "share": 0.8,
    }
    turned = of_code(audit([row | {"preference": 0.0} for row in rows]), "length-bias")
    assert "80 % of 20 choices: the shorter answer wins" in turned.what
    assert "length-bias" not in codes(audit(rows[1:]))


def test_a_lean_is_a_note(audit: Run) -> None:
    """13 of 20 is 65 %; 11 of 20 is nothing."""
    rows = [pair(f"Q{i:02}", *(("aa", "b") if i < 13 else ("a", "bb"))) for i in range(20)]
    assert of_code(audit(rows), "length-bias").severity == "note"
    rows[:2] = [pair(f"P{i}", "a", "bb") for i in range(2)]
    assert "length-bias" not in codes(audit(rows))


def test_rankings_count_every_comparison_that_is_no_tie() -> None:
    """Ranks 2, 1, 2, 3 of answers of 4, 3, 2, 1 tokens: 1 beats 0, 2 and 3; 0 and 2 beat 3: 5 choices, 4 longer."""
    ranking = {"prompt": "Q", "completions": list("abcd"), "ranks": [2, 1, 2, 3]}
    rows = [parse_row(ranking, "rows.jsonl:1", 0), parse_row(pair("Q", "a", "b", preference=0.5), "rows.jsonl:2", 1)]
    bias = length_bias(rows, {0: [4, 3, 2, 1], 1: [5, 1]})
    assert bias is not None
    assert (bias.choices, bias.longer, bias.equal) == (5, 4, 0)


def test_judgements_that_teach_nothing(audit: Run) -> None:
    ties = audit([pair("Q", "a", "b", preference=0.5), {"prompt": "P", "completions": ["a", "b"], "ranks": [1, 1]}])
    assert (of_code(ties, "only-ties").severity, of_code(ties, "only-ties").rows) == ("warning", 2)
    assert ties.figures()["ties"] == 2
    label = audit([say("Q", "a", label=True), say("Q", "b", label=True)])
    assert (of_code(label, "one-label").what, label.figures()["label_true_share"]) == ("every label is true", 1.0)
    score = audit([say("Q", "a", score=2), say("Q", "b", score=2)])
    assert of_code(score, "constant-scores").what == "every score is 2"
    turned = audit([pair("Q", "a", "b", preference=0.2), pair("P", "a", "b")])
    assert brief(of_code(turned, "preference-reversed")) == ("note", 1, ["1"])


def test_labels_and_scores_in_figures(audit: Run) -> None:
    labels = [say("Q", "a", label=True), say("Q", "b", label=False), say("P", "a", label=False)]
    assert audit(labels).figures()["label_true_share"] == pytest.approx(1 / 3)
    scores = audit([say("Q", "a", score=-1.5), say("Q", "b", score=4)]).figures()
    assert (scores["score_min"], scores["score_max"], scores["ties"]) == (-1.5, 4, None)
