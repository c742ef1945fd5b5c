"""How the page behaves: a mistake is one sentence in the page, never a stack trace; and what every event has alike."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lowrank_align.errors import UserError
from lowrank_align.studio.words import sentence

log = logging.getLogger(__name__)

OWN_FAULT = (
    "Something went wrong in the studio itself; what it was stands in the terminal. Nothing that was kept is lost."
)
SECONDS_SHOWN = 8

# A quiet event: no spinner over what people read, and no entry in the list of endpoints.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

AT_ONCE: dict[str, Any] = QUIET | {"queue": False}  # for what answers within milliseconds: no place in a queue first


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with its errors told as one sentence in the page; what it would have changed stays as it was."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def streaming(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except Exception as error:
                raise _shown(error) from None

        return streaming

    @functools.wraps(handler)
    def answering(*values: Any) -> Any:
        try:
            return handler(*values)
        except Exception as error:
            raise _shown(error) from None

    return answering


def plain(
    element: str, *, lines: int = 1, max_lines: int | None = None, scale: int | None = None, visible: bool = True
) -> gr.Textbox:
    """Text to read: what it says is never taken for markup."""
    return gr.Textbox(
        show_label=False,
        container=False,
        interactive=False,
        lines=lines,
        max_lines=max_lines or lines,
        scale=scale,
        visible=visible,
        elem_id=element,
        elem_classes="plain",
        autoscroll=False,
    )


def told_in(line: gr.Textbox, outputs: list[Any], handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with its errors in a line of the page, which is one of the outputs.

    For events that are `AT_ONCE`: Gradio shows no toast for those.
    """

    @functools.wraps(handler)
    def answering(*values: Any) -> Any:
        try:
            return handler(*values)
        except Exception as error:
            return [_words(error) if part is line else gr.skip() for part in outputs]

    return answering


def _shown(error: Exception) -> Exception:
    if isinstance(error, gr.Error):
        return error
    return gr.Error(_as_text(_words(error)), title="", duration=SECONDS_SHOWN, print_exception=False)


def _words(error: Exception) -> str:
    if isinstance(error, UserError):
        return sentence(str(error))
    log.error("a handler of the page failed", exc_info=error)
    return OWN_FAULT


def _as_text(text: str) -> str:
    """Toasts are HTML: names and paths within are told as they are."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
