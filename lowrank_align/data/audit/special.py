"""The tokenizer's special tokens and the chat template: what ends a turn, what pads, what begins a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_align.data.audit.findings import Finding, Tally, counted, part
from lowrank_align.data.chat import Renderer
from lowrank_align.data.encoder import Encoder
from lowrank_align.data.formats import Message, Row
from lowrank_align.data.template import ChatTemplate

HASH_SHOWN = 12


@dataclass(frozen=True)
class Token:
    """A special token."""

    id: int
    text: str


@dataclass(frozen=True)
class Special:
    """The special tokens as the tokenizer names them, those at which generation stops here, and the template."""

    bos: Token | None
    eos: Token | None
    pad: Token | None
    turn_end: Token | None  # what the template ends an answer with
    ends: tuple[Token, ...]
    adds_bos: bool  # the tokenizer begins every text with it
    template_writes_bos: bool
    template_source: str  # "the model's own", "named by the user" or "plain"
    template_sha256: str
    thinking_switch: str | None  # the variable of the template

    @property
    def end_tokens(self) -> str:
        return " or ".join(token.text for token in self.ends)


def special_tokens(renderer: Renderer, chat_template: str | None) -> Special:
    """What `renderer`, made with `chat_template`, works with."""
    tokenizer, encoder = renderer.tokenizer, Encoder(renderer.tokenizer)
    template = ChatTemplate(tokenizer, chat_template, encoder.added)
    written = template.render([Message(role="user", content="a"), Message(role="assistant", content="b")], {})
    bos = _token(tokenizer, tokenizer.bos_token_id)
    return Special(
        bos=bos,
        eos=_token(tokenizer, tokenizer.eos_token_id),
        pad=_token(tokenizer, tokenizer.pad_token_id),
        turn_end=_token(tokenizer, renderer.turn_end_id),
        ends=tuple(token for i in renderer.end_ids if (token := _token(tokenizer, i))),
        adds_bos=bos is not None and encoder.text("a")[:1] == [bos.id],
        template_writes_bos=bos is not None and written.startswith(bos.text),
        template_source=renderer.template_source,
        template_sha256=renderer.template_hash(),
        thinking_switch=renderer.thinking_switch,
    )


def special_findings(special: Special, rows: Sequence[Row], *, plain_asked_for: bool) -> list[Finding]:
    """What to know about the special tokens and the template, for these rows."""
    chats = sum(is_chat(row) for row in rows)
    found = _pad_findings(special)
    if chats and special.turn_end and special.eos and special.turn_end != special.eos:
        what = f"the template ends a turn with {special.turn_end.text}, the tokenizer's EOS is {special.eos.text}"
        advice = "generation stops at both here; in other programs name both as stop tokens"
        found.append(Finding("note", "eos-differs", what, advice=advice))
    found += plain_template_findings(special.template_source, rows, asked_for=plain_asked_for)
    if chats and special.adds_bos and special.template_writes_bos and special.bos:
        what = f"template and tokenizer both write {special.bos.text}; here it stands once"
        advice = "elsewhere tokenise the template's text without special tokens"
        found.append(Finding("note", "double-bos-avoided", what, advice=advice))
    return found + _text_findings(special, rows)


def plain_template_findings(source: str, rows: Sequence[Row], *, asked_for: bool) -> list[Finding]:
    """Conversations in the stopgap template, though nobody asked for it."""
    chats = sum(is_chat(row) for row in rows)
    if source != "plain" or not chats:
        return []
    what = f"{counted(chats, 'conversation')} in the plain User: / Assistant: template"
    what += "" if asked_for else ", since the model has none of its own"
    advice = "right for a base model; where a chat model's own template is missing, --chat-template names a file"
    return [Finding("note" if asked_for else "warning", "plain-template", what, chats, advice=advice)]


def is_chat(row: Row) -> bool:
    return not isinstance(row.completions[0] if row.completions else row.prompt, str)


def _pad_findings(special: Special) -> list[Finding]:
    elsewhere = "harmless here, where padding is masked by its place; other trainers mask it by its id, and their model"
    elsewhere += " never stops"
    if special.pad is None:
        what = "the tokenizer has no pad token, and the usual remedy is to pad with EOS"
        return [Finding("note", "pad-missing", what, advice=elsewhere)]
    if special.pad in special.ends:
        return [Finding("note", "pad-is-end", f"the pad token {special.pad.text} is an end token", advice=elsewhere)]
    return []


def _text_findings(special: Special, rows: Sequence[Row]) -> list[Finding]:
    """Rows of text: the template does not touch them, and BOS may be written out in them."""
    texts, begins = Tally(), Tally()
    for row in rows:
        if not is_chat(row):
            texts.add(row.where)
            first = str(row.prompt or row.completions[0])
            if special.bos and special.adds_bos and first.startswith(special.bos.text):
                begins.add(row.where)
    found = []
    if texts.rows and special.template_source != "plain":
        what = f"plain text, which the chat template does not touch, in {part(texts.rows, len(rows))}"
        advice = "right for plain continuations; for a chat give prompt and answer as messages"
        found.append(texts.finding("warning", "text-beside-template", what, advice))
    if begins.rows and special.bos:
        what = f"{special.bos.text}, which the tokenizer adds, is written out in {part(begins.rows, len(rows))}"
        found.append(begins.finding("note", "double-bos-avoided", what + "; here it stands once", "leave it out"))
    return found


def _token(tokenizer: Any, token_id: int | None) -> Token | None:
    return None if token_id is None else Token(int(token_id), str(tokenizer.convert_ids_to_tokens(int(token_id))))
