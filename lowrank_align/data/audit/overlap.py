"""Rows that say the same, or the opposite: duplicates, contradictions, leakage. One pass each, by hashes."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from lowrank_align.data.audit.findings import Finding, Severity, Tally, part
from lowrank_align.data.audit.judgements import decided
from lowrank_align.data.formats import Row, Shape, Text

REPEATED_PROMPTS = 10  # rows a prompt: from here on the same prompt in both files is the data's nature, no accident


def duplicate_findings(rows: Sequence[Row], prefix: str = "") -> list[Finding]:
    """Rows with the same prompt, answers and judgement; and those that differ in case and white space alone.

    `prefix` is put before the codes: `eval-` for held-out rows.
    """
    exact: dict[bytes, str] = {}
    loose: dict[bytes, str] = {}
    same, alike = Tally(), Tally()
    for row in rows:
        said = (row.shape, *_said(row), row.preference, row.target_margin, row.ranks, row.label, row.score)
        if twin := _seen(exact, said, row):
            same.add(row.where, twin)
        elif twin := _seen(loose, _loosely(said), row):
            alike.add(row.where, twin)
    found = []
    if same.rows:
        what = f"exact copies of an earlier row: {part(same.rows, len(rows))}"
        advice = "keep one of each: the others only weigh it more"
        trained = not prefix and rows[0].shape is not Shape.prompts  # prompts may well be asked again
        severity: Severity = same.severity(len(rows)) if trained else "note"
        found.append(same.finding(severity, f"{prefix}duplicates", what, advice))
    if alike.rows:
        what = f"copies but for case and white space: {part(alike.rows, len(rows))}"
        found.append(alike.finding("note", f"{prefix}near-duplicates", what, "keep one of each"))
    return found


def contradiction_findings(rows: Sequence[Row]) -> list[Finding]:
    """The same two answers to the same prompt preferred both ways; the same answer judged otherwise."""
    choices: dict[bytes, tuple[bool, str]] = {}
    judged: dict[bytes, tuple[Any, str]] = {}
    answered: dict[bytes, tuple[bytes, str]] = {}
    opposite, labels, scores, several = (Tally() for _ in range(4))
    for row in rows:
        prompt, answers = _said(row)
        asked, hashes = _hash(prompt), [_hash(answer) for answer in answers]
        if row.shape in (Shape.pair, Shape.ranking):
            if twin := _contradicts(asked, hashes, row, choices):
                opposite.add(row.where, twin)
        elif row.shape in (Shape.unpaired, Shape.scored):
            verdict = row.label if row.shape is Shape.unpaired else row.score
            before, twin = judged.setdefault(_hash((row.shape, asked.hex(), hashes[0].hex())), (verdict, row.where))
            if before != verdict:
                (labels if row.shape is Shape.unpaired else scores).add(row.where, twin)
        elif row.shape is Shape.demonstration and prompt:
            answer, twin = answered.setdefault(asked, (hashes[0], row.where))
            if answer != hashes[0]:
                several.add(row.where, twin)
    return _contradictions(opposite, labels, scores, several, len(rows))


def leakage_findings(rows: Sequence[Row], held_out: Sequence[Row]) -> list[Finding]:
    """Held-out rows whose prompt, or prompt and answer, is trained on; case and white space make no difference."""
    prompts: dict[bytes, str] = {}
    whole: dict[bytes, str] = {}
    for row in rows:
        asked, answers = _keys(row)
        if asked:
            prompts.setdefault(asked, row.where)
        for answer in answers:
            whole.setdefault(answer, row.where)
    same_prompt, same_answer = Tally(), Tally()
    for row in held_out:
        asked, answers = _keys(row)
        if twin := next((whole[answer] for answer in answers if answer in whole), ""):
            same_answer.add(row.where, twin)
        elif asked in prompts:
            same_prompt.add(row.where, prompts[asked])
    found = []
    if same_answer.rows:
        what = f"prompt and answer of {part(same_answer.rows, len(held_out), 'held-out row')} are trained on"
        advice = "take them out of one of the two: the evaluation would flatter"
        found.append(same_answer.finding(same_answer.severity(len(held_out)), "leakage", what, advice))
    if same_prompt.rows:
        what = f"the prompt of {part(same_prompt.rows, len(held_out), 'held-out row')} is trained on"
        advice = "split by prompt, so that the evaluation asks for something new"
        by_nature = len(rows) >= REPEATED_PROMPTS * len(prompts)
        severity: Severity = "note" if by_nature else same_prompt.severity(len(held_out))
        found.append(same_prompt.finding(severity, "prompt-leakage", what, advice))
    return found


def _contradicts(asked: bytes, answers: list[bytes], row: Row, choices: dict[bytes, tuple[bool, str]]) -> str:
    """The row whose preference is the opposite of one of this row's; this row's are remembered."""
    found = ""
    for better, worse in decided(row):
        one, other = sorted((answers[better], answers[worse]))
        ascending = answers[better] == one
        before, where = choices.setdefault(asked + one + other, (ascending, row.where))
        if before != ascending and not found:
            found = where
    return found


def _contradictions(opposite: Tally, labels: Tally, scores: Tally, several: Tally, of: int) -> list[Finding]:
    found: list[Finding] = []

    def add(tally: Tally, code: str, what: str, advice: str = "") -> None:
        if tally.rows:
            severity = tally.severity(of) if code == "contradictions" else "note"
            found.append(tally.finding(severity, code, f"{what}: {part(tally.rows, of)}", advice))

    advice = "decide for one, or make it a tie (preference 0.5, equal ranks)"
    add(opposite, "contradictions", "the opposite preference on the same two answers in an earlier row", advice)
    add(labels, "contradictions", "the opposite label of the same answer in an earlier row", "decide for one")
    add(scores, "several-scores", "another score of the same answer in an earlier row")
    add(several, "several-answers", "another answer to the same prompt in an earlier row")
    return found


def _said(row: Row) -> tuple[Any, list[Any]]:
    """Prompt and answers in one form: a turn alone is its text, a conversation is split before its last answer."""
    prompt, answers = row.prompt, row.completions
    if not prompt and len(answers) == 1 and not isinstance(answers[0], str):  # of a pair, segments without a prompt
        turns, last = answers[0], len(answers[0])
        while last and turns[last - 1]["role"] == "assistant":
            last -= 1
        prompt, answers = turns[:last], [turns[last:]]
    asked = _plain(prompt, "user")
    return ([asked, row.template_kwargs] if row.template_kwargs else asked), [_plain(a, "assistant") for a in answers]


def _plain(text: Text, role: str) -> Any:
    alone = (
        not isinstance(text, str) and len(text) == 1 and {*text[0]} == {"role", "content"} and text[0]["role"] == role
    )
    return text[0]["content"] if alone else text  # type: ignore[index]


def _keys(row: Row) -> tuple[bytes | None, list[bytes]]:
    """Hashes of the prompt (None where there is none), and of the prompt with each answer."""
    prompt, answers = (_loosely(part) for part in _said(row))
    return (_hash(prompt) if prompt else None), [_hash((prompt, answer)) for answer in answers]


def _loosely(value: Any) -> Any:
    """Every text in lower case, with single spaces."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, list | tuple):
        return [_loosely(inner) for inner in value]
    return {key: _loosely(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _seen(places: dict[bytes, str], value: Any, row: Row) -> str:
    """Where the first row with this value stands, if there is one; otherwise this row is remembered as the first."""
    key = _hash(value)
    if key in places:
        return places[key]
    places[key] = row.where
    return ""


def _hash(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).digest()
