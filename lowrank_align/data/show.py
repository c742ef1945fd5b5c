"""Rows as the model sees them: the prompt dim, trained tokens in green, the rest of a completion in yellow."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.encoder import panics_told
from lowrank_align.data.formats import Row, Shape
from lowrank_align.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

PROMPT, TRAINED, CONTEXT, CUT = "dim", "green", "yellow", "bold red"


def print_rows(renderer: Renderer, rows: Sequence[Row], n: int, console: "Console") -> None:
    """Prints the first `n` rows with their lengths, what is trained in them, and where they were cut.

    Without colour the trained tokens stand between brackets instead. Control characters are escaped.
    """
    from rich.rule import Rule
    from rich.text import Text

    marks = _marks(console)
    console.print(_legend(marks))
    for row in rows[:n]:
        rendered = renderer.tree_row(row)
        console.print(Rule(Text(_title(row, rendered)), align="left", style="bold"))
        for part in _row_parts(renderer, row, rendered, marks):
            console.print(part)
        for note in rendered.notes:
            console.print(Text(f"note: {note}", style="italic"))
    console.print(Rule(style="dim"))
    shown, template = f"{min(n, len(rows))} of {len(rows)} rows", f"chat template: {renderer.template_source}"
    console.print(Text(f"{shown} · max_length {renderer.max_length} tokens · {template}", style="dim"))


def _marks(console: "Console") -> tuple[str, str]:
    """What encloses trained tokens: nothing where colour shows them."""
    if console.color_system is not None and not console.no_color:
        return "", ""
    return ("⟦", "⟧") if console.encoding.lower().startswith("utf") else ("[[", "]]")


def _legend(marks: tuple[str, str]) -> "Text":
    from rich.text import Text

    trained = f"{marks[0]}trained{marks[1]}"
    parts = [("prompt", PROMPT), (trained, TRAINED), ("context, not trained", CONTEXT), ("cut", CUT)]
    return Text("   ").join(Text(*part) for part in parts)


def _title(row: Row, rendered: Rendered) -> str:
    facts = [row.where or f"row {row.index + 1}", row.shape.value]
    if row.read_as:
        facts.append(f"read as {row.read_as}")
    if rendered.tree:
        lengths = [str(len(completion.ids)) for completion in rendered.tree.completions]
        answers = f"({' + '.join(lengths)})" if len(lengths) > 1 else lengths[0]
        facts.append(f"{len(rendered.tree.prompt_ids)} + {answers} tokens")
    return " · ".join(facts)


def _row_parts(renderer: Renderer, row: Row, rendered: Rendered, marks: tuple[str, str]) -> Iterator["RenderableType"]:
    from rich.padding import Padding
    from rich.text import Text

    if rendered.tree is None:
        yield Text(f"dropped: {rendered.dropped}", style=CUT)
        return
    tree = rendered.tree
    yield _coloured(renderer, tree.prompt_ids, [], [False] * len(tree.prompt_ids), marks)
    for k, completion in enumerate(tree.completions):
        if len(tree.completions) > 1:
            yield Text(_label(row, k), style="bold")
        text = _coloured(renderer, tree.prompt_ids, completion.ids, completion.mask, marks)
        if rendered.cut_tokens[k]:
            text.append(f" [cut: {rendered.cut_tokens[k]} tokens more]", style=CUT)
        yield Padding(text, (0, 0, 0, 2))


def _label(row: Row, k: int) -> str:
    """What is known about completion k."""
    if row.shape is Shape.pair:
        more = [f"preference {row.preference:g}"] if row.preference != 1 else []
        more += [f"margin {row.target_margin:g}"] if row.target_margin else []
        return ", ".join([("chosen", "rejected")[k], *(more if k == 0 else [])])
    return f"rank {row.ranks[k]:g}" if row.ranks else f"completion {k + 1}"


def _coloured(
    renderer: Renderer, prompt_ids: list[int], ids: list[int], mask: list[bool], marks: tuple[str, str]
) -> "Text":
    """The prompt where `ids` is empty, else the completion, run by run of equally masked tokens.

    Tokens are decoded together with what comes before: alone, many of them lose a space or half a character.
    """
    from rich.text import Text

    shown = Text()
    if not ids:
        return shown.append(visible(_decode(renderer, prompt_ids)), style=PROMPT)
    before, at = _decode(renderer, prompt_ids), 0
    for is_trained, run in groupby(mask):
        at += len(list(run))
        upto = _decode(renderer, prompt_ids + ids[:at])
        piece = visible(upto[len(before) :])
        shown.append(f"{marks[0]}{piece}{marks[1]}" if is_trained else piece, style=TRAINED if is_trained else CONTEXT)
        before = upto
    return shown


def _decode(renderer: Renderer, ids: list[int]) -> str:
    with panics_told(renderer.tokenizer):
        return str(renderer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
