"""What goes to the terminal: a row, a name or an answer must not work it, whoever wrote that.

`visible` escapes what a terminal would obey. `make_console` gives rich's console behind it, `say` is `print`, and
`Visible` is for log lines. rich's own colours and cursor moves go through.
"""

import builtins
import logging
import os
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# They reorder the rest of the line, so that it reads as what it is not.
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LINES = frozenset("\u2028\u2029")


def visible(text: str, keep: str = "\n") -> str:
    """Control characters and what reorders a line as Python writes them, but for what is in `keep`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep or not _obeyed(char) else _escaped(char) for char in text)


def _obeyed(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in BIDI or char in LINES


def _escaped(char: str) -> str:
    """As Python and JSON both read it, but for what JSON has escaped before: it holds no character below U+0080."""
    return char.encode("unicode_escape").decode() if char < "\x80" else f"\\u{ord(char):04x}"


def say(*values: object, **options: Any) -> None:
    """`print`, of what may come from other people's files."""
    builtins.print(*(visible(str(value), keep="\n\t") for value in values), **options)


def make_console(**options: Any) -> "Console":
    """A console of rich, without its guesses what to highlight, that shows control characters instead of obeying."""
    from rich.console import Console, ConsoleOptions, RenderableType, RenderHook, RenderResult
    from rich.segment import Segment

    class Shown:
        def __init__(self, inner: RenderableType) -> None:
            self.inner = inner

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for segment in console.render(self.inner, options):
                clean = segment.control or segment.text.isprintable()
                yield segment if clean else Segment(visible(segment.text), segment.style)

    class Guard(RenderHook):
        def process_renderables(self, renderables: Iterable[Any]) -> list[Any]:
            return [Shown(renderable) for renderable in renderables]

    class Unread(Console):
        def on_broken_pipe(self) -> None:
            """Rich would exit here: a run goes on when nobody reads it any more."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    console = Unread(**{"highlight": False, **options})
    console.push_render_hook(Guard())
    return console


class Visible(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
