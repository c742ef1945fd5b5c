"""What the audit has to say: a finding, and the tally that one is made from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
SHOWN = 5  # how many rows a finding names
NOTABLE_SHARE = 0.01  # of the rows: from here on, what does little harm in a single row is worth a warning


@dataclass(frozen=True)
class Finding:
    """One thing that was found. An error is what would train something else than the rows say, or not at all."""

    severity: Severity
    code: str  # stable, for programs: `end-of-turn-missing`
    what: str  # a sentence without its full stop
    rows: int = 0  # how many rows; 0 where it is not about rows
    places: tuple[str, ...] = ()  # the first of them: `pairs.jsonl:17`
    twins: tuple[str, ...] = ()  # the row that each of these is like, or contradicts
    details: tuple[str, ...] = ()  # of the first rows, what exactly is wrong
    advice: str = ""  # what to do
    stops: bool = False  # of an error: training stops at it, instead of going wrong


@dataclass
class Tally:
    """Counts rows and keeps where the first of them stand."""

    rows: int = 0
    places: list[str] = field(default_factory=list)
    twins: list[str] = field(default_factory=list)

    def add(self, where: str, twin: str = "") -> None:
        self.rows += 1
        if len(self.places) < SHOWN:
            self.places.append(where)
            self.twins += [twin] * bool(twin)

    def severity(self, of: int) -> Severity:
        """A warning from `NOTABLE_SHARE` of the rows on, a note below."""
        return "warning" if self.rows >= NOTABLE_SHARE * of else "note"

    def finding(
        self,
        severity: Severity,
        code: str,
        what: str,
        advice: str = "",
        *,
        details: Iterable[str] = (),
        stops: bool = False,
    ) -> Finding:
        places, twins = tuple(self.places), tuple(self.twins)
        return Finding(severity, code, what, self.rows, places, twins, tuple(details), advice, stops)


def counted(number: int, name: str) -> str:
    """`1 row`, `1,204 rows`."""
    return f"{number:,} {name}{'s' * (number != 1)}"


def part(number: int, of: int, name: str = "row") -> str:
    """`5 of 299 rows`, `all 299 rows`, `the only row`."""
    if number == of:
        return f"the only {name}" if of == 1 else f"all {counted(of, name)}"
    return f"{number:,} of {counted(of, name)}"


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first, otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
