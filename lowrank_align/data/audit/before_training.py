"""The part of the audit that costs next to nothing: training runs it always."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_align.config import AuditSettings
from lowrank_align.data.audit.findings import Finding
from lowrank_align.data.audit.judgements import length_bias, length_bias_findings
from lowrank_align.data.audit.overlap import contradiction_findings, duplicate_findings, leakage_findings
from lowrank_align.data.audit.special import plain_template_findings
from lowrank_align.data.audit.tokens import Measured, calls_tool, end_findings, trains_end
from lowrank_align.errors import UserError

if TYPE_CHECKING:
    from lowrank_align.config import TrainSettings
    from lowrank_align.data.chat import Renderer
    from lowrank_align.data.formats import Row
    from lowrank_align.trees import TreeRow


def check_rows(
    settings: "TrainSettings",
    renderer: "Renderer",
    rows: "Sequence[Row]",
    trees: "Sequence[TreeRow]",
    held_out: "Sequence[Row]",
) -> list[str]:
    """What is worth a line about the training rows, their tree rows (as cut) and the held-out rows; mostly nothing.

    Raises `UserError` where the model would not learn to end its answers. O(rows).
    """
    audit = _command(settings)
    of_index = {row.index: row for row in rows}
    measured = [_measured(of_index[tree.index], tree, renderer) for tree in trees]
    ends = " or ".join(str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in renderer.end_ids)
    bias = length_bias(rows, {tree.index: m.completion_tokens for tree, m in zip(trees, measured, strict=True)})
    found = [
        *end_findings(measured, ends),
        *plain_template_findings(renderer.template_source, rows, asked_for=settings.chat_template == "plain"),
        *duplicate_findings(rows),
        *contradiction_findings(rows),
        *leakage_findings(rows, held_out),
        *length_bias_findings(bias),
    ]
    for finding in found:
        if finding.severity == "error":
            raise UserError(f"{_line(finding, settings.rows)}; {finding.advice} ({audit} tells more)")
    lines = [_line(finding, settings.rows) for finding in found if finding.severity == "warning"]
    return [*lines, f"{audit} tells more"] if lines else []


def _measured(row: "Row", tree: "TreeRow", renderer: "Renderer") -> Measured:
    """As `tokens.measure`, from the cut row alone: what fills `max_length` counts as cut."""
    end_ids, room = set(renderer.end_ids), renderer.max_length - len(tree.prompt_ids)
    ends = (
        not row.finished or len(c.ids) >= room or c.ids[-1] in end_ids or calls_tool(row, k)
        for k, c in enumerate(tree.completions)
    )
    lengths = tuple(len(completion.ids) for completion in tree.completions)
    return Measured(
        row.where,
        row.shape,
        len(tree.prompt_ids),
        lengths,
        finished=row.finished,
        ends=all(ends),
        trains_end=trains_end(tree, end_ids),
    )


def _line(finding: Finding, source: str) -> str:
    first = f" (first: {finding.places[0]}" if finding.places else ""
    twin = f", see {finding.twins[0]}" if finding.twins else ""
    return f"{source}: {finding.what}{first}{twin}" + ")" * bool(first)


def _command(settings: "TrainSettings") -> str:
    """The whole audit of the same rows."""
    flags = {"model": settings.model, "data": settings.rows, "eval_data": settings.eval_data}
    flags |= {"chat_template": settings.chat_template}
    if settings.max_length != AuditSettings.model_fields["max_length"].default:
        flags["max_length"] = str(settings.max_length)
    given = (f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in flags.items() if value is not None)
    return f"`lowrank-align audit {' '.join(given)}`"
