"""`lowrank-align doctor`: what it looks at is in `doctor.py`; here it is printed."""

import json
from dataclasses import asdict
from textwrap import wrap

from rich.text import Text

from lowrank_align.config import DoctorSettings
from lowrank_align.doctor import Finding, can_train, examine
from lowrank_align.errors import EXIT_DONE, EXIT_ENVIRONMENT
from lowrank_align.terminal import make_console, say

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
WIDTH, LEVEL_WIDTH, TOPIC_WIDTH = 80, 9, 13


def doctor(settings: DoctorSettings) -> int:
    """Print the findings; 3 where training with the defaults cannot run."""
    findings = examine()
    good = can_train(findings)
    if settings.as_json:
        report = {"can_train": good, "findings": [asdict(finding) for finding in findings]}
        say(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        console = make_console()
        for finding in findings:
            console.print(_lines(finding), soft_wrap=True)
        count = sum(finding.level == "problem" for finding in findings)
        problems = f"{count} problem" + "s" * (count != 1)
        console.print("training can run here" if good else f"training as it is by default cannot run: {problems}")
    return EXIT_DONE if good else EXIT_ENVIRONMENT


def _lines(finding: Finding) -> Text:
    """The level, the topic, what was found, and under it what to do; no line wider than WIDTH unless a word is."""
    indent = LEVEL_WIDTH + TOPIC_WIDTH
    options = {"width": WIDTH - indent, "break_long_words": False, "break_on_hyphens": False}
    lines = wrap(finding.found, **options) or [""]  # type: ignore[arg-type]
    if finding.advice:
        lines += wrap(finding.advice, initial_indent="-> ", subsequent_indent="   ", **options)  # type: ignore[arg-type]
    text = Text(f"{finding.level:<{LEVEL_WIDTH}}", style=STYLES[finding.level])
    text.append(f"{finding.topic:<{TOPIC_WIDTH}}", style="bold")
    return text.append(("\n" + " " * indent).join(lines), style="not bold default")
