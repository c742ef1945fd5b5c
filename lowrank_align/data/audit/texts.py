"""What stands in the rows' texts and should not: control tokens, broken encoding, answers that say nothing."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lowrank_align.data.audit.findings import Finding, Tally, part
from lowrank_align.data.audit.special import is_chat
from lowrank_align.data.formats import Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoders put in the place of what they could not read
# UTF-8 that somebody read as Windows-1252: an e acute is two characters then, a quotation mark three.
MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00bf]|\u00e2\u20ac|\u00f0\u0178|\u00ef\u00bb\u00bf"
)
# Turns as other models' templates mark them: text that was rendered for one of those.
MARKUP = re.compile(r"<\|[a-z_]{2,24}\|>|</?(?:start|end)_of_turn>|\[/?INST\]|<\uff5c[^\uff5c]{2,24}\uff5c>")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
TOKENS_NAMED = 5


def text_findings(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """One pass over all texts."""
    control, of = control_tokens(tokenizer), len(rows)
    as_text, in_answers, acting, foreign = (_Written() for _ in range(4))
    empty, replaced, mojibake, invisible = (Tally() for _ in range(4))
    for row in rows:
        chat = is_chat(row)
        written: dict[str, Counter[str]] = {"prompt": Counter(), "answer": Counter()}
        marks, odd = Counter[str](), set[str]()
        for text, is_answer in texts_of(row):
            if control:
                written["answer" if is_answer else "prompt"].update(control.findall(text))
            marks.update(mark for mark in MARKUP.findall(text) if not (control and control.fullmatch(mark)))
            if is_answer and not any(map(str.isalnum, text)):
                odd.add("empty")
            if text.isascii():
                odd |= {"invisible"} if CONTROL.search(text) else set()
                continue
            odd |= {"replaced"} if REPLACEMENT in text else set()
            odd |= {"mojibake"} if MOJIBAKE.search(text) else set()
            odd |= {"invisible"} if CONTROL.search(text) else set()
        if chat and written["answer"]:
            in_answers.add(row, written["answer"])
        elif chat:
            as_text.add(row, written["prompt"])
        else:
            acting.add(row, written["answer"] + written["prompt"])
        foreign.add(row, marks)
        for name, tally in (("empty", empty), ("replaced", replaced), ("mojibake", mojibake), ("invisible", invisible)):
            if name in odd:
                tally.add(row.where)
    found = _control_findings(as_text, in_answers, acting, of)
    if foreign.rows.rows:
        what = (
            f"another model's turn marks, plain text to this one, in {part(foreign.rows.rows, of)} ({foreign.named()})"
        )
        advice = "give messages, without any marks: the template writes this model's own"
        found.append(foreign.rows.finding(foreign.rows.severity(of), "foreign-marks", what, advice))
    if empty.rows:
        what = f"an answer without a letter or digit in {part(empty.rows, of)}"
        found.append(empty.finding(empty.severity(of), "empty-answers", what, "remove them, unless that is the answer"))
    if replaced.rows:
        what = f"the replacement character U+FFFD in {part(replaced.rows, of)}"
        found.append(
            replaced.finding(
                replaced.severity(of),
                "replacement-characters",
                what,
                "what stood there is lost: read the source again",
            )
        )
    if mojibake.rows:
        what = f"UTF-8 that was read as Windows-1252, by the look of it, in {part(mojibake.rows, of)}"
        found.append(mojibake.finding(mojibake.severity(of), "mojibake", what, "read the source again as UTF-8"))
    if invisible.rows:
        what = f"control characters in {part(invisible.rows, of)}"
        found.append(
            invisible.finding(
                invisible.severity(of),
                "control-characters",
                what,
                "remove them, unless the model is to write them",
            )
        )
    return found


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Matches the tokens that steer a model and are no text; None for a tokenizer without any."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted((text for text in tokens if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def texts_of(row: Row) -> Iterator[tuple[str, bool]]:
    """Every text of a row, and whether it is the assistant's. A turn that only calls a tool has none."""
    yield from _texts(row.prompt, False)
    for completion in row.completions:
        yield from _texts(completion, True)


def _texts(text: Text, is_answer: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(text, str):
        if text:
            yield text, is_answer
        return
    for message in text:
        if message["content"]:
            yield message["content"], message["role"] == "assistant"


class _Written:
    """Control tokens that are written out."""

    def __init__(self) -> None:
        self.rows, self.tokens = Tally(), Counter[str]()

    def add(self, row: Row, tokens: Counter[str]) -> None:
        if tokens:
            self.rows.add(row.where)
            self.tokens.update(tokens)

    def named(self) -> str:
        return ", ".join(f"{token} {count:,} x" for token, count in self.tokens.most_common(TOKENS_NAMED))


def _control_findings(as_text: _Written, in_answers: _Written, acting: _Written, of: int) -> list[Finding]:
    found = []
    if in_answers.rows.rows:
        what = f"control tokens inside the assistant's words, taken as text, in {part(in_answers.rows.rows, of)}"
        advice = "the model would learn to spell them out; leave them out: the template writes its own"
        what += f" ({in_answers.named()})"
        found.append(in_answers.rows.finding(in_answers.rows.severity(of), "control-tokens-in-answers", what, advice))
    if as_text.rows.rows:
        what = f"control tokens inside messages, taken as text, in {part(as_text.rows.rows, of)}"
        what += f" ({as_text.named()})"
        found.append(as_text.rows.finding("note", "control-tokens-in-prompts", what))
    if acting.rows.rows:
        what = f"control tokens inside plain text, where they act as such, in {part(acting.rows.rows, of)}"
        what += f" ({acting.named()})"
        advice = "for conversations give messages: in text, what the user says is trained too"
        found.append(acting.rows.finding(acting.rows.severity(of), "control-tokens-act", what, advice))
    return found
