"""A Jinja chat template as a Go template, which is what Ollama reads.

A template is a program; it is not translated but tried: conversations with known contents are rendered, and what stands
between two contents is read off. In most templates that text depends on the two roles alone (and on whether it is the
beginning or the end), which a Go template can say exactly. Whether it does is checked on longer conversations; where
not (Mistral's puts the system text into the last question), the result is the closest of that form, and says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lowrank_align.data.messages import Message
from lowrank_align.data.template import ChatTemplate
from lowrank_align.errors import UserError

BEGIN, END = "", "end"  # in place of a role, before the first message and after the last
S, U, A = "system", "user", "assistant"
TRIALS = ((U,), (S, U), (U, A, U), (S, U, A, U))  # from which the texts are read off
CHECKS = ((U, A, U, A, U), (S, U, A, U, A, U), (U,), (S, U), (U, A, U), (S, U, A, U))
WORDS = ("Qzxa", "Qzxb", "Qzxc", "Qzxd", "Qzxe", "Qzxf")  # contents that no template writes by itself
OTHER_WORDS = ("Kvja\nand {{ more }}", 'Kvjb "quoted"', "Kvjc", "Kvjd\n\nKvj", "Kvje", "Kvjf")


@dataclass(frozen=True)
class GoTemplate:
    """The template's text, and in words where it departs from the Jinja one."""

    text: str
    between: dict[tuple[str, str], str]  # what is written after a message of the first role and before the second's
    departures: list[str] = field(default_factory=list)


def go_template(template: ChatTemplate, bos: str | None = None, answer_prefix: str = "") -> GoTemplate:
    """Derive it. `bos` is a token that the reader puts before every prompt by itself, so it is left out here.

    `answer_prefix` stands behind the generation prompt.

    UserError where the template refuses a conversation of one question.
    """
    between: dict[tuple[str, str], str] = {}
    departures: list[str] = []
    for roles in TRIALS:
        try:
            text = _without(bos, template.render(_messages(roles, WORDS), {}, open_turn=True))
        except UserError:
            if S not in roles:
                raise
            departures.append("the chat template takes no system turn: a system text is left out")
            continue
        if (pieces := _pieces(text, roles, WORDS)) is None:
            departures.append(f"the chat template rewrites or leaves out turns of {' '.join(roles)}")
            continue
        for pair, piece in pieces:
            if between.setdefault(pair, piece) != piece:
                departures.append(f"what stands between {pair[0] or 'the beginning'} and {pair[1]} varies")
    for checked in CHECKS:
        departures += _departure(template, bos, checked, between)
    between |= {pair: piece + answer_prefix for pair, piece in between.items() if pair[1] == END}
    return GoTemplate(_emit(between), between, list(dict.fromkeys(departures)))


def render(between: Mapping[tuple[str, str], str], messages: Sequence[Message]) -> str:
    """What the Go template writes for a conversation that ends with a question."""
    text, last = "", BEGIN
    for message in messages:
        if any(after == message["role"] for _, after in between):
            text += _before(between, last, message["role"]) + message["content"]
            last = message["role"]
    return text + between.get((last, END), "")


def _departure(
    template: ChatTemplate, bos: str | None, roles: Sequence[str], between: Mapping[tuple[str, str], str]
) -> list[str]:
    """Whether a conversation of these roles, with other contents, comes out otherwise."""
    messages = _messages(roles, OTHER_WORDS)
    try:
        wanted = _without(bos, template.render(messages, {}, open_turn=True))
    except UserError:
        return []
    return [] if render(between, messages) == wanted else [f"another text for {' '.join(roles)}"]


def _messages(roles: Sequence[str], words: Sequence[str]) -> list[Message]:
    return [Message(role=role, content=word) for role, word in zip(roles, words, strict=False)]


def _without(bos: str | None, text: str) -> str:
    return text.removeprefix(bos) if bos else text


def _pieces(text: str, roles: Sequence[str], words: Sequence[str]) -> list[tuple[tuple[str, str], str]] | None:
    """The text between the contents, with the roles on both sides; None where a content is not there, once, in turn."""
    found, rest = [], text
    for (before, role), word in zip(pairwise([BEGIN, *roles]), words, strict=False):
        if rest.count(word) != 1:
            return None
        piece, rest = rest.split(word)
        found.append(((before, role), piece))
    return [*found, ((roles[-1], END), rest)]


def _before(between: Mapping[tuple[str, str], str], last: str, role: str) -> str:
    """What is written before a message; after a role that was not tried, as in the middle of a conversation."""
    choices = {before: piece for (before, after), piece in between.items() if after == role}
    return choices.get(last) if last in choices else _usual(choices)  # type: ignore[return-value]


def _usual(choices: Mapping[str, str]) -> str:
    return next((choices[before] for before in (A, U, S, BEGIN) if before in choices), "")


def _emit(between: Mapping[tuple[str, str], str]) -> str:
    """The Go template, in one line but for its texts: a line break of ours would be a part of the prompt."""
    blocks = []
    for number, role in enumerate(role for role in (S, U, A) if any(after == role for _, after in between)):
        choices = {before: piece for (before, after), piece in between.items() if after == role}
        word = "if" if number == 0 else "else if"
        blocks.append(f'{{{{ {word} eq .Role "{role}" }}}}{_choice(choices)}{{{{ .Content }}}}{{{{ $last = .Role }}}}')
    opening = _choice({before: piece for (before, after), piece in between.items() if after == END and before != A})
    return (
        '{{ $last := "" }}{{ range .Messages }}' + "".join(blocks) + "{{ end }}{{ end }}"
        f'{{{{ if ne $last "assistant" }}}}{opening}{{{{ end }}}}'
    )


def _choice(choices: Mapping[str, str]) -> str:
    """The text by the role before; the usual one comes last, without a condition."""
    usual = _usual(choices)
    others = {before: piece for before, piece in choices.items() if piece != usual}
    if not others:
        return _literal(usual)
    parts = [
        f'{{{{ {"else if" if i else "if"} eq $last "{before}" }}}}{_literal(piece)}'
        for i, (before, piece) in enumerate(others.items())
    ]
    return "".join(parts) + f"{{{{ else }}}}{_literal(usual)}{{{{ end }}}}"


def _literal(text: str) -> str:
    """A text that stands for itself; what Go, or the Modelfile around it, would read as more becomes a Go string."""
    plain = all(c.isprintable() or c == "\n" for c in text) and '"' not in text
    if plain and "{{" not in text and "}}" not in text and not text.startswith("}") and not text.endswith("{"):
        return text
    return f'{{{{ "{"".join(_escaped(c) for c in text)}" }}}}'


def _escaped(character: str) -> str:
    if character == "\n":
        return "\\n"
    if character.isprintable() and character not in '"\\':
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
