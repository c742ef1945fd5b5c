"""What the audit finds in rows as tokens, one planted fault at a time; every count is that of what was planted.

`test_audit_content.py` is about what the rows say. The tokenizers have a token a character and put `<s>` before a text;
`</s>` ends it.
"""

from collections.abc import Callable
from typing import Any

import pytest

from lowrank_align.data.audit import Audit, Finding

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


# ---- nothing to find

ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstration": [say("Q", "A"), say("Q2", "B")],
    "text": [{"text": "abc"}],
    "pair": [pair("Q", "A", "B"), pair("Q2", "A", "B", preference=0.5)],
    "ranking": [{"prompt": "Q", "completions": ["a", "bb", "c"], "ranks": [1, 2, 2]}],
    "unpaired": [say("Q", "A", label=True), say("Q", "B", label=False)],
    "scored": [say("Q", "A", score=1), say("Q", "B", score=-2.5)],
    "prompts": [{"prompt": "Q"}, {"prompt": "Q2"}],
}


@pytest.mark.parametrize("shape", ROWS)
def test_good_rows_of_every_shape_are_fine(audit: Run, shape: str) -> None:
    found = audit(ROWS[shape])
    assert codes(found) == []
    assert (found.verdict.kind, found.verdict.text, found.verdict.exit_code) == ("fine", "Fine to train.", 0)


def test_a_good_conversation_is_fine_and_its_ends_are_told(audit: Run, chatml: str) -> None:
    """The turn ends with <|im_end|>, the tokenizer's EOS is </s>: the model stops at both."""
    found = audit([chat("1", "one", "2", "two", system="Count.")], template=chatml)
    assert codes(found) == ["eos-differs"]
    assert found.verdict.text == "Fine to train."
    assert "ends a turn with <|im_end|>, the tokenizer's EOS is </s>" in of_code(found, "eos-differs").what
    assert [token.text for token in found.special.ends] == ["<|im_end|>", "</s>"]
    assert (found.figures()["assistant_turns"], found.figures()["system_prompts"]) == (2, 1)


# ---- lengths


def test_lengths(audit: Run) -> None:
    """Prompt `<s>` and its letters, completion its letters and `</s>`: 4+3, 2+10, 3+5 and 2+3 tokens.

    Nearest rank of four: the second and the fourth.
    """
    found = audit([say("abc", "de"), say("a", "123456789"), say("ab", "1234"), say("a", "de")])
    lengths = found.lengths
    assert {name: (s.median, s.p90, s.longest, s.where, s.total) for name, s in lengths.items()} == {
        "prompt": (2, 4, 4, "rows.jsonl:1", 11),
        "completion": (3, 10, 10, "rows.jsonl:2", 21),
        "prompt_and_completion": (7, 12, 12, "rows.jsonl:2", 32),
        "trained": (3, 10, 10, "rows.jsonl:2", 21),
    }
    assert found.figures()["uncut_at_max_length"] == 12


def test_lengths_of_pairs(audit: Run) -> None:
    """`<s>Q` is 2 tokens, the answers 3 and 6: the tree row has all 11, prompt and completion at most 8."""
    lengths = audit([pair("Q", "ab", "12345")]).lengths
    assert (lengths["tree_row"].longest, lengths["prompt_and_completion"].longest) == (11, 8)
    assert (lengths["completion"].median, lengths["trained"].longest) == (3, 9)


def test_what_is_cut_and_dropped(audit: Run) -> None:
    """At 8 tokens: 4+3 fits, 4+6 loses 2, 9+2 has no room; at 11 all would be whole."""
    rows = [say("abc", "de"), say("abc", "defgh"), say("12345678", "x")]
    found = audit(rows, max_length=8)
    assert brief(of_code(found, "rows-cut")) == ("warning", 1, ["2"])
    assert of_code(found, "rows-cut").what == "1 of 3 rows cut at max_length 8, by 2 tokens"
    assert brief(of_code(found, "rows-dropped")) == ("warning", 1, ["3"])
    assert of_code(found, "rows-dropped").advice == "--max-length 11 takes every row whole"
    assert found.verdict.text == "Can be trained; 2 things to look at first: rows-dropped, rows-cut."
    figures = found.figures()
    assert [figures[name] for name in ("rows_trained", "rows_cut", "tokens_cut", "rows_dropped")] == [2, 1, 2, 1]
    assert figures["rows_with_trained_end"] == 1  # the cut one has lost it
    assert found.lengths["trained"].total == 3 + 4  # what training sees
    by_its_end = audit(rows[1:2], max_length=9)
    assert of_code(by_its_end, "rows-cut").what == "the only row cut at max_length 9, by 1 token"
    assert "end-of-turn-missing" in codes(by_its_end)
    small = audit(rows, max_length=8, context=10)
    assert of_code(small, "rows-cut").advice.startswith("1 row longer than the model's context of 10 tokens")


def test_a_cut_row_in_a_hundred_is_a_warning_and_a_rarer_one_a_note(audit: Run) -> None:
    rows = [say(f"Q{i}", "a") for i in range(99)]
    assert of_code(audit([*rows, say("Q", "12345")], max_length=6), "rows-cut").severity == "warning"
    assert of_code(audit([*rows, say("P", "a"), say("Q", "12345")], max_length=6), "rows-cut").severity == "note"


def test_prompts_without_room(audit: Run) -> None:
    """`<s>` and 7 letters fill 8 tokens; nothing could be answered."""
    found = audit([{"prompt": "1234567"}, {"prompt": "a"}], max_length=8)
    assert brief(of_code(found, "rows-dropped")) == ("warning", 1, ["1"])
    assert of_code(found, "rows-dropped").advice == "--max-length 9 takes every row whole"


def test_answers_that_are_equal_once_they_are_written(audit: Run) -> None:
    """The plain template trims them; at 24 tokens the second pair is cut to the same beginning."""
    rows = [
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": chosen, "rejected": rejected}
        for chosen, rejected in (("yes", "yes "), ("12345", "12346"), ("a", "b"))
    ]
    found = audit(rows, max_length=24)  # "<s>User: Q\nAssistant:" is 19 tokens, " 1234" the 5 that are left
    assert brief(of_code(found, "answers-equal")) == ("warning", 1, ["1"])
    assert brief(of_code(found, "rows-dropped")) == ("warning", 1, ["2"])
    assert "equal after cutting" in of_code(found, "rows-dropped").what


def test_no_row_left(audit: Run) -> None:
    found = audit([say("1234567", "a")], max_length=8)
    assert of_code(found, "no-row-left").severity == "error"
    assert found.verdict.text == "Would stop before training: no row is left to train on, of 1."
    assert found.verdict.exit_code == 2


# ---- ends


def test_an_answer_without_its_end_is_an_error(audit: Run, chatml: str) -> None:
    """A template that closes some answers with another token: of three, the second; a call of a tool may."""
    template = chatml.replace(
        "+ '<|im_end|>\n'", "+ ('<|extra|>\n' if 'STOP' in message['content'] else '<|im_end|>\n')"
    )
    called = chat("c", "STOP")
    called["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    found = audit([chat("a", "b"), chat("a", "STOP"), called], template=template)
    assert brief(of_code(found, "end-of-turn-missing")) == ("error", 1, ["2"])
    verdict = found.verdict
    assert (verdict.kind, verdict.exit_code) == ("wrong", 2)
    assert verdict.text.startswith("Would train the wrong thing: not trained to end: 1 of 3 rows")


def test_no_end_at_all(audit: Run) -> None:
    """Every answer cut is an error, rows that say so themselves are not; one kept whole is enough."""
    long = [say(f"Q{i}", "12345678") for i in range(3)]
    found = audit(long, max_length=6)
    assert brief(of_code(found, "end-of-turn-missing")) == ("error", 3, ["1", "2", "3"])
    assert found.verdict.kind == "wrong"
    assert "end-of-turn-missing" not in codes(audit([*long, say("Q", "a")], max_length=6))
    declared = audit([row | {"finished": False} for row in long])
    assert brief(of_code(declared, "no-end-trained")) == ("warning", 3, ["1", "2", "3"])
    assert declared.verdict.exit_code == 0
    one = audit([*long, say("Q", "a", finished=False)])
    assert brief(of_code(one, "unfinished")) == ("note", 1, ["4"])


def test_earlier_answers_without_an_end(audit: Run, chatml: str) -> None:
    """A template that ends the last turn alone; the first row has no earlier answer."""
    template = chatml.replace("+ '<|im_end|>\n'", "+ ('<|im_end|>\n' if loop.last else '\n')")
    rows = [chat("1", "one"), chat("1", "one", "2", "two")]
    assert brief(of_code(audit(rows, template=template), "turn-end-missing")) == ("warning", 1, ["2"])
    assert "turn-end-missing" not in codes(audit(rows, template=template, train_on="last"))


def test_rows_without_trained_tokens(audit: Run) -> None:
    """A template that prints nothing of answers that begin with `#`."""
    template = "{% for m in messages %}{% if m['content'][0] != '#' %}{{ m['content'] }}|{% endif %}{% endfor %}"
    found = audit([chat("a", "b"), chat("a", "#b")], template=template)
    assert brief(of_code(found, "nothing-trained")) == ("warning", 1, ["2"])
    assert brief(of_code(found, "answer-not-found")) == ("warning", 1, ["2"])


def test_doubled_tokens(audit: Run, chatml: str) -> None:
    """<|im_end|> written out before the </s> that is added; <s> twice before a text, of which one is taken away."""
    found = audit([say("a", "b<|im_end|>"), say("a", "c"), say("<s><s>a", "d"), {"text": "<s><s>ab"}], template=chatml)
    assert brief(of_code(found, "double-eos")) == ("warning", 1, ["1"])
    assert brief(of_code(found, "double-bos")) == ("warning", 2, ["3", "4"])


# ---- special tokens and template


def test_pads(audit: Run) -> None:
    missing = audit([say("a", "b")], pad_token=None)
    assert (codes(missing), missing.verdict.kind) == (["pad-missing"], "fine")
    assert missing.special.pad is None
    ends = audit([say("a", "b")], pad_token="</s>")
    assert of_code(ends, "pad-is-end").severity == "note"
    assert "never stops" in of_code(ends, "pad-is-end").advice


def test_bos_is_written_once_and_the_audit_says_so(audit: Run, chatml: str) -> None:
    """The template writes it and the tokenizer adds it; in a text it may be written out too."""
    both = audit([chat("a", "b")], template="{{ bos_token }}" + chatml)
    assert of_code(both, "double-bos-avoided").severity == "note"
    assert "double-bos" not in codes(both)
    assert "double-bos-avoided" not in codes(audit([chat("a", "b")], template="{{ bos_token }}" + chatml, bos=False))
    assert "double-bos-avoided" not in codes(audit([chat("a", "b")], template=chatml))
    written_out = audit([say("<s>a", "b"), say("a", "b")])
    assert brief(of_code(written_out, "double-bos-avoided")) == ("note", 1, ["1"])
    assert "double-bos" not in codes(written_out)


def test_the_plain_template_is_a_warning_unless_it_was_asked_for(audit: Run, chatml: str) -> None:
    rows = [chat("a", "b"), say("a", "b")]
    assert of_code(audit(rows), "plain-template").severity == "warning"
    assert of_code(audit(rows), "plain-template").rows == 1
    assert of_code(audit(rows, template=chatml, chat_template="plain"), "plain-template").severity == "note"
    assert "plain-template" not in codes(audit(rows, template=chatml))
    assert "plain-template" not in codes(audit([say("a", "b")]))


def test_text_that_the_chat_template_does_not_touch(audit: Run, chatml: str) -> None:
    found = audit([chat("a", "b"), say("a", "b"), {"prompt": "Q"}], template=chatml)
    assert brief(of_code(found, "text-beside-template")) == ("warning", 2, ["2", "3"])


def test_the_template_is_named_by_its_hash(audit: Run, chatml: str) -> None:
    """SHA-256 of the fixture's text, as sha256sum gives it."""
    special = audit([chat("a", "b")], template=chatml).special
    assert special.template_sha256 == "f950548988e50713a9975a11be0eaf1d29c4fe4be0ba22a57daeebbc27a7adb9"
    assert (special.template_source, special.thinking_switch) == ("the model's own", None)


def test_what_the_renderer_found_odd(audit: Run, chatml: str) -> None:
    """`t` + `he` merge to the token `th`; a generation prompt of its own; a template without system turns."""
    merged = audit([say("t", "he"), say("a", "b")], merges=[("t", "h")])
    assert brief(of_code(merged, "prompt-merges")) == ("warning", 1, ["1"])
    other = chatml.replace("%}{{ '<|im_start|>assistant", "%}{{ '<|im_start|>model")
    differs = audit([chat("a", "b"), chat("c", "d")], template=other)
    assert brief(of_code(differs, "generation-prompt-differs")) == ("warning", 2, ["1", "2"])
    mute = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '|' }}{% endfor %}"
    left_out = audit([chat("a", "b"), chat("a", "c", system="Zeta")], template=mute)
    assert brief(of_code(left_out, "template-leaves-out")) == ("warning", 1, ["2"])


def test_rows_that_the_template_refuses(audit: Run, chatml: str) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + chatml
    found = audit([chat("a", "b"), chat("a", "b", system="c")], template=strict)
    assert brief(of_code(found, "template-refuses")) == ("error", 1, ["2"])
    told = "rows.jsonl:2: messages: the chat template refuses this conversation (no system turns)"
    assert of_code(found, "template-refuses").details == (told,)
    assert found.verdict.text == "Would stop before training: the chat template refuses 1 of 2 rows."


# ---- reading


def test_bad_rows_are_collected_and_the_rest_is_looked_at(audit: Run) -> None:
    found = audit(["{]", say("Q", "a"), {"prompt": "Q", "chosen": "a"}, [1], say("Q", " "), say("Q", "a")])
    finding = of_code(found, "bad-rows")
    assert brief(finding) == ("error", 4, ["1", "3", "4", "5"])
    assert finding.details[1] == "rows.jsonl:3: rejected: missing (fields: prompt, chosen)"
    assert brief(of_code(found, "duplicates"))[1:] == (1, ["6"])
    assert found.verdict.text == "Would stop before training: 4 rows cannot be used."
    assert (found.figures()["rows"], found.figures()["bad_rows"]) == (2, 4)


def test_rows_of_several_shapes(audit: Run) -> None:
    """A row with the fields of two shapes is read as the richer; a file of two shapes is for no method."""
    both = pair("Q", "a", "b") | chat("Q", "a")
    found = audit([both, pair("P", "a", "b")])
    assert brief(of_code(found, "several-shapes")) == ("note", 1, ["1"])
    assert found.figures()["shapes"] == {"pair": 2}
    mixed = audit([say("Q", "a"), pair("P", "a", "b"), say("R", "a")])
    assert of_code(mixed, "mixed-shapes").what == "rows of several shapes: 2 demonstration, 1 pair"


def test_fields_that_nothing_reads(audit: Run) -> None:
    found = audit([{"prompt": "Q", "response": "a"}, {"prompt": "P", "response": "b"}])
    finding = of_code(found, "unread-fields")
    assert (finding.rows, finding.what.split(": ")[1]) == (2, "response")
    assert "unread-fields" not in codes(audit([{"prompt": "Q"}]))
