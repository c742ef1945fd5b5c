"""The whole audit of a file: its figures, its findings, and the verdict."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lowrank_align.data.audit.findings import Finding, by_severity
from lowrank_align.data.audit.judgements import (
    LengthBias,
    judgement_figures,
    judgement_findings,
    length_bias,
    length_bias_findings,
)
from lowrank_align.data.audit.overlap import contradiction_findings, duplicate_findings, leakage_findings
from lowrank_align.data.audit.reading import ReadRows, reading_findings
from lowrank_align.data.audit.special import Special, special_findings
from lowrank_align.data.audit.texts import text_findings
from lowrank_align.data.audit.tokens import (
    Measured,
    Spread,
    Track,
    end_findings,
    length_findings,
    measure,
    note_findings,
    spreads,
)
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.errors import EXIT_DATA_OR_CONFIG, EXIT_DONE

LENGTHS = ("prompt", "completion", "prompt_and_completion", "tree_row", "trained")
COMPARED = {Shape.pair, Shape.ranking}  # a method takes both


@dataclass(frozen=True)
class Verdict:
    """What all findings come to."""

    kind: Literal["fine", "look", "wrong", "stops"]
    text: str
    exit_code: int


@dataclass(frozen=True)
class Audit:
    """What was found out about a file and, where there are held-out rows, about those."""

    data: ReadRows
    eval_data: ReadRows | None
    special: Special
    max_length: int
    context_tokens: int
    measured: list[Measured]
    bias: LengthBias | None
    findings: list[Finding]

    @property
    def verdict(self) -> Verdict:
        """In plain words, with the exit code."""
        return verdict_of(self.findings)

    @property
    def lengths(self) -> dict[str, Spread]:
        return spreads(self.measured)

    def figures(self) -> dict[str, Any]:
        """Numbers by name; always the same names, None where there is no such thing."""
        kept = [m for m in self.measured if not m.dropped and not m.refused]
        lengths = self.lengths
        return {
            "rows": len(self.data.rows),
            "bad_rows": self.data.bad.rows,
            "eval_rows": len(self.eval_data.rows) if self.eval_data else None,
            "shapes": {str(shape): count for shape, count in self.data.shapes.items()},
            "read_as": dict(self.data.read_as),
            "max_length": self.max_length,
            "context_tokens": self.context_tokens,
            "uncut_at_max_length": max((m.longest for m in self.measured), default=0),
            "rows_trained": len(kept),
            "rows_dropped": sum(bool(m.dropped) for m in self.measured),
            "rows_refused": sum(bool(m.refused) for m in self.measured),
            "rows_cut": sum(bool(m.cut_tokens) for m in kept),
            "tokens_cut": sum(m.cut_tokens for m in kept),
            "rows_with_trained_end": sum(m.trains_end for m in kept),
            "lengths_tokens": {name: asdict(lengths[name]) if name in lengths else None for name in LENGTHS},
            "length_bias": asdict(self.bias) | {"share": self.bias.share} if self.bias else None,
            **judgement_figures(self.data.rows),
        }

    def as_json(self) -> dict[str, Any]:
        """The report for programs: its keys stay."""
        special = self.special
        return {
            "data": self.data.source,
            "eval_data": self.eval_data.source if self.eval_data else None,
            "verdict": asdict(self.verdict),
            "figures": self.figures(),
            "template": {
                "source": special.template_source,
                "sha256": special.template_sha256,
                "thinking_switch": special.thinking_switch,
            },
            "tokens": {
                **{name: _as_dict(getattr(special, name)) for name in ("bos", "eos", "pad", "turn_end")},
                "generation_stops_at": [asdict(token) for token in special.ends],
            },
            "findings": [asdict(finding) for finding in self.findings],
        }


def audit_rows(
    data: ReadRows,
    eval_data: ReadRows | None,
    special: Special,
    *,
    whole: Renderer,
    cut: Renderer,
    context_tokens: int,
    plain_asked_for: bool = False,
    also: Sequence[Finding] = (),
    track: Track = iter,
) -> Audit:
    """All findings about `data`, and about `eval_data` beside it.

    `whole` renders without cutting (`max_length` UNCUT), `cut` as training would. `plain_asked_for`: the user named
    the plain template. `also` are findings from elsewhere. `track` goes through the rows while they are rendered, to
    show how far it is.
    """
    rows = data.rows
    measured = measure(rows, whole, cut, track)
    bias = length_bias(rows, {row.index: m.completion_tokens for row, m in zip(rows, measured, strict=True)})
    findings = [
        *reading_findings(data),
        *also,
        *length_findings(measured, cut.max_length, context_tokens),
        *end_findings(measured, special.end_tokens),
        *special_findings(special, rows, plain_asked_for=plain_asked_for),
        *note_findings(measured),
        *text_findings(rows, cut.tokenizer),
        *duplicate_findings(rows),
        *contradiction_findings(rows),
        *judgement_findings(rows),
        *length_bias_findings(bias),
    ]
    if eval_data:
        held_out = measure(eval_data.rows, whole, cut, track)
        own = [*reading_findings(eval_data), *length_findings(held_out, cut.max_length, context_tokens)]
        findings += [replace(f, code=f"eval-{f.code}", what=f"held out: {f.what}") for f in own]
        findings += _shape_findings(rows, eval_data.rows)
        findings += duplicate_findings(eval_data.rows, "eval-")
        findings += leakage_findings(rows, eval_data.rows)
    return Audit(data, eval_data, special, cut.max_length, context_tokens, measured, bias, by_severity(findings))


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """An error of any kind is exit code 2, everything else 0."""
    errors = [finding for finding in findings if finding.severity == "error"]
    wrong = [finding for finding in errors if not finding.stops]
    if errors:
        first, more = (wrong or errors)[0], len(errors) - 1
        kind: Literal["wrong", "stops"] = "wrong" if wrong else "stops"
        begins = "Would train the wrong thing" if wrong else "Would stop before training"
        others = f" (and {more} more error{'s' * (more > 1)})" if more else ""
        return Verdict(kind, f"{begins}: {first.what}{others}.", EXIT_DATA_OR_CONFIG)
    codes = list(dict.fromkeys(finding.code for finding in findings if finding.severity == "warning"))
    if codes:
        things = f"{len(codes)} thing{'s' * (len(codes) > 1)} to look at first: {', '.join(codes)}"
        return Verdict("look", f"Can be trained; {things}.", EXIT_DONE)
    return Verdict("fine", "Fine to train.", EXIT_DONE)


def _shape_findings(rows: Sequence[Row], held_out: Sequence[Row]) -> list[Finding]:
    """Held-out rows of a shape that the training rows do not have; a prompt is in all of them."""
    shapes = {row.shape for row in rows}
    taken = shapes | (COMPARED if shapes & COMPARED else set())
    other = [row for row in held_out if row.shape not in taken]
    if not other or Shape.prompts in shapes:
        return []
    what = f"held out: rows of shape {other[0].shape}, the training rows are of shape {' or '.join(sorted(shapes))}"
    places = tuple(row.where for row in other[:1])
    return [Finding("error", "eval-shape", what, len(other), places, advice="both must be of one shape", stops=True)]


def _as_dict(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
