"""The audit of a file of rows before anything is trained on it."""

import json
from collections.abc import Iterable, Sequence

from rich.progress import track

from lowrank_align.config import AuditSettings
from lowrank_align.data.audit import UNCUT, Finding, audit_rows, print_audit, read_rows, special_tokens
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row
from lowrank_align.loading import read_config, read_tokenizer
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.terminal import make_console, say


def audit(settings: AuditSettings) -> int:
    """Print the report, or with `as_json` one JSON object. 0 where the rows can be trained on, else 2."""
    tokenizer, context = read_tokenizer(settings.model)
    data = read_rows(settings.data)
    eval_data = read_rows(settings.eval_data) if settings.eval_data is not None else None

    def renderer(max_length: int) -> Renderer:
        return Renderer(
            tokenizer,
            chat_template=settings.chat_template,
            train_on=settings.train_on,
            max_length=max_length,
            thinking=settings.thinking,
            thinking_if_possible=from_preset(settings, "thinking"),
        )

    cut = renderer(min(settings.max_length, context))
    advice = "mend the preset, or leave --preset out"
    differs = [
        Finding("warning", "preset-differs", line, advice=advice)
        for line in preset_lines(settings, cut, read_config(settings.model))
    ]
    found = audit_rows(
        data,
        eval_data,
        special_tokens(cut, settings.chat_template),
        whole=renderer(UNCUT),
        cut=cut,
        context_tokens=context,
        plain_asked_for=settings.chat_template == "plain",
        also=differs,
        track=_track,
    )
    if settings.as_json:
        say(json.dumps({"model": settings.model, **found.as_json()}, ensure_ascii=False, indent=2))
    else:
        print_audit(found, settings.model, make_console())
    return found.verdict.exit_code


def _track(rows: Sequence[Row]) -> Iterable[Row]:
    console = make_console(stderr=True)
    return track(rows, "tokenising", console=console, transient=True, disable=not console.is_terminal)
