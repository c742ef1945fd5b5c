"""The shapes of rows, and which of them a row has by its fields."""

import shlex
from collections.abc import Set
from enum import StrEnum, auto
from typing import Any

from lowrank_align.data.convert import Columns
from lowrank_align.data.messages import FieldError, Message, clean_messages, clean_text, kind_of
from lowrank_align.errors import nearest

Text = str | list[Message]  # a prompt or a completion


class Shape(StrEnum):
    """What a row has to teach with."""

    demonstration = auto()
    pair = auto()
    ranking = auto()
    unpaired = auto()
    scored = auto()
    prompts = auto()


SHAPE_FIELDS = {
    Shape.demonstration: "messages, or prompt and completion, or text",
    Shape.pair: "prompt, chosen, rejected",
    Shape.ranking: "prompt, completions, ranks",
    Shape.unpaired: "prompt, completion, label",
    Shape.scored: "prompt, completion, score",
    Shape.prompts: "prompt",
}
CONVERTIBLE: dict[Shape, tuple[str, ...]] = {  # what `data convert --to` makes of them
    Shape.scored: ("pairs", "rankings", "unpaired", "demonstrations"),
    Shape.ranking: ("pairs", "unpaired", "demonstrations"),
    Shape.unpaired: ("pairs", "rankings", "demonstrations"),
    Shape.pair: ("unpaired", "demonstrations"),
}
TARGETS = {  # what people call rows of a shape
    Shape.pair: "pairs",
    Shape.ranking: "rankings",
    Shape.unpaired: "unpaired",
    Shape.demonstration: "demonstrations",
}
_KNOWN_FIELDS = sorted(
    {name for fields in SHAPE_FIELDS.values() for name in fields.replace(",", "").split()} - {"or", "and"}
)


def convert_line(shape: Shape, expect: Set[Shape], source: str) -> str:
    """The command that makes rows of a wanted shape out of a source of rows of `shape`; nothing where none does."""
    targets = [TARGETS[wanted] for wanted in Shape if wanted in expect and wanted in TARGETS]
    for target in targets:
        if target in CONVERTIBLE.get(shape, ()):
            return f"; `lowrank-align data convert {shlex.quote(source)} --to {target} --out OUT.jsonl` makes them"
    return ""


class Fields:
    """The columns of a row, called by the names that the user's file has for them."""

    def __init__(self, columns: Columns) -> None:
        self.columns, self.values = columns, columns.fields

    def name(self, field: str) -> str:
        return self.columns.names.get(field, field)

    def listed(self) -> str:
        return ", ".join(dict.fromkeys(self.name(field) for field in self.values))

    def need(self, field: str) -> Any:
        if field not in self.values:
            hint = nearest(field, set(self.values) - set(_KNOWN_FIELDS))
            raise FieldError(self.name(field), f"missing (fields: {self.listed()}){hint}")
        return self.values[field]

    def misspelt(self) -> str:
        """A hint for the first field that is almost a known one."""
        unknown = [name for name in self.values if name not in _KNOWN_FIELDS]
        return next((hint for name in unknown if (hint := nearest(name, _KNOWN_FIELDS))), "")

    def text(self, field: str, value: Any) -> Text:
        """Text or messages under the field's name."""
        if isinstance(value, str):
            return clean_text(self.name(field), value)
        if isinstance(value, list):
            return clean_messages(self.name(field), value)
        raise FieldError(self.name(field), f"{kind_of(value)}, must be text or a list of messages")


def recognise(fields: Fields, expect: Set[Shape]) -> Shape:
    """The shape by which fields are there; of several, the only wanted one."""
    marks = {
        Shape.pair: ("chosen", "rejected"),
        Shape.ranking: ("completions", "ranks"),
        Shape.unpaired: ("label",) if "completion" in fields.values else (),
        Shape.scored: ("score",) if "completion" in fields.values else (),
        Shape.demonstration: ("messages", "text", "completion"),
    }
    found = {shape: [name for name in names if name in fields.values] for shape, names in marks.items()}
    found = {shape: names for shape, names in found.items() if names}
    if Shape.unpaired in found or Shape.scored in found:  # `completion` is then theirs
        found = {s: n for s, n in found.items() if n != ["completion"]}
    if not found:
        return _without_completion(fields, expect)
    wanted = [shape for shape in found if shape in expect]
    if len(found) > 1 and len(wanted) != 1 and expect != {Shape.prompts}:
        clash = ", ".join(fields.name(name) for names in found.values() for name in names)
        raise FieldError(clash, f"fields of several shapes ({', '.join(found)}): keep those of one")
    shape = wanted[0] if len(wanted) == 1 else next(iter(found))
    if shape is Shape.demonstration and len(found[shape]) > 1 and expect != {Shape.prompts}:
        raise FieldError(", ".join(fields.name(n) for n in found[shape]), "several forms of a demonstration: keep one")
    return shape


def _without_completion(fields: Fields, expect: Set[Shape]) -> Shape:
    if "prompt" not in fields.values:
        known = "; ".join(SHAPE_FIELDS.values())
        listed = fields.listed() or "none"
        raise FieldError("row", f"no known fields (fields: {listed}){fields.misspelt()}; a row needs: {known}")
    for mark, shape in (("label", Shape.unpaired), ("score", Shape.scored)):
        if mark in fields.values and shape in expect:
            return shape
    return Shape.prompts
