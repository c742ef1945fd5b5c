"""The audit for people, in 80 columns."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowrank_align.data.audit.findings import Finding, counted
from lowrank_align.data.audit.report import LENGTHS, Audit
from lowrank_align.data.audit.special import HASH_SHOWN, Token

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
VERDICTS = {"fine": "bold green", "look": "bold yellow", "wrong": "bold red", "stops": "bold red"}
NAMES = 12  # columns for the names of facts and severities
TABLE = "{:<20}{:>9}{:>9}{:>9}  {}"


def print_audit(audit: Audit, model: str, console: "Console") -> None:
    """Figures, findings with the gravest first, the verdict last, where a reader looks."""
    from rich.text import Text

    def write(lines: str, style: str = "") -> None:
        console.print(Text(lines, style=style), soft_wrap=True)

    for line in _sources(audit):
        write(line)
    for name, fact in _facts(audit, model):
        write(_wrapped(fact, console.width, name))
    write("")
    for line in _lengths(audit):
        write(line)
    for name, fact in _judgements(audit):
        write(_wrapped(fact, console.width, name))
    write("")
    advised = ""
    for finding in audit.findings:
        write(_wrapped(f"{finding.code}: {finding.what}", console.width, finding.severity), STYLES[finding.severity])
        for detail in finding.details:
            write(_wrapped(detail, console.width, " "))
        if finding.places and not finding.details:
            write(_wrapped(f"at {places_of(finding)}", console.width, " "))
        elif finding.rows > len(finding.details) > 0:
            write(_wrapped(f"and {finding.rows - len(finding.details):,} more", console.width, " "))
        if finding.advice not in ("", advised):
            write(_wrapped(f"-> {finding.advice}", console.width, " "))
        advised = finding.advice
    write("\n" * bool(audit.findings) + _wrapped(audit.verdict.text, console.width), VERDICTS[audit.verdict.kind])


def places_of(finding: Finding) -> str:
    """`pairs.jsonl:17 (see pairs.jsonl:2), pairs.jsonl:30 (see pairs.jsonl:4), and 9 more`."""
    twins = finding.twins or ("",) * len(finding.places)
    places = [f"{at} (see {twin})" if twin else at for at, twin in zip(finding.places, twins, strict=True)]
    more = finding.rows - len(places)
    return ", ".join([*places, *([f"and {more:,} more"] if more > 0 else [])])


def _sources(audit: Audit) -> Iterator[str]:
    for read, what in ((audit.data, ""), (audit.eval_data, "held out: ")):
        if read is not None:
            shapes = ", ".join(f"{count:,} {shape}" for shape, count in read.shapes.most_common())
            converted = "".join(f"; {count:,} read as {name}" for name, count in read.read_as.items())
            held = f"({shapes}{converted})" if shapes else "that can be used"
            yield f"{what}{_printable(read.source)}: {counted(len(read.rows), 'row')} {held}"


def _facts(audit: Audit, model: str) -> Iterator[tuple[str, str]]:
    special = audit.special
    yield "model", model
    limit = ", the model's context" if audit.max_length >= audit.context_tokens else ""
    yield "max_length", f"{audit.max_length:,} tokens{limit}"
    switch = f", thinking switch {special.thinking_switch}" if special.thinking_switch else ""
    yield "template", f"{special.template_source}, SHA-256 {special.template_sha256[:HASH_SHOWN]}{switch}"
    yield "tokens", f"BOS {_token(special.bos)}, EOS {_token(special.eos)}, pad {_token(special.pad)}"
    yield "stops at", ", ".join(map(_token, special.ends))


def _token(token: Token | None) -> str:
    return f"{token.text} ({token.id})" if token else "none"


def _lengths(audit: Audit) -> Iterator[str]:
    spreads = audit.lengths
    if spreads:
        yield TABLE.format("tokens", "median", "90 %", "longest", "where")
    for name in LENGTHS:
        if spread := spreads.get(name):
            figures = (f"{value:,}" for value in (spread.median, spread.p90, spread.longest))
            yield TABLE.format(name.replace("_and_", " + ").replace("_", " "), *figures, _printable(spread.where))


def _judgements(audit: Audit) -> Iterator[tuple[str, str]]:
    """What the rows hold, a line each, where they have such a thing."""
    figures = audit.figures()
    if audit.measured:
        dropped = figures["rows_dropped"] + figures["rows_refused"]
        kept = f"{figures['rows_trained']:,} kept, {figures['rows_cut']:,} of them cut"
        whole = f"nothing is cut at max_length {figures['uncut_at_max_length']:,}"
        yield "rows", f"{kept}; {dropped:,} dropped; {whole}"
    if bias := audit.bias:
        longer = f"the better answer is the longer one in {100 * bias.longer / bias.choices:.0f} %"
        means = f"mean {bias.mean_better_tokens:.0f} tokens against {bias.mean_worse_tokens:.0f}"
        yield (
            "choices",
            f"{bias.choices:,}; {longer}, as long in {bias.equal:,} ({means}); {counted(figures['ties'], 'tie')}",
        )
    if figures["label_true_share"] is not None:
        yield "labels", f"{100 * figures['label_true_share']:.0f} % true"
    if figures["score_min"] is not None:
        yield "scores", f"from {figures['score_min']:g} to {figures['score_max']:g}"
    if figures["assistant_turns"] is not None:
        system = f"rows with a system prompt: {figures['system_prompts']:,}"
        yield "turns", f"{figures['assistant_turns']:,} of the assistant; {system}"


def _wrapped(text: str, width: int, name: str = "") -> str:
    """Lines of at most `width`, but for words that are longer; behind the name where there is one."""
    begins, indent = (f"{name:<{NAMES}}", " " * NAMES) if name else ("", "")
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(_printable(text), width, initial_indent=begins, subsequent_indent=indent, **options)  # type: ignore[arg-type]


def _printable(text: str) -> str:
    """Control characters, which a file's text may hold, as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
