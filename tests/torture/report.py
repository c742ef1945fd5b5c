"""docs/reliability.md of pytest's report of a run: python tests/torture/report.py RESULTS.xml [--print]."""

import datetime
import json
import os
import platform
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
MARK = "<!-- what follows until the next mark is written by `make torture` -->"
SECTIONS = (
    "Kill and resume",
    "Out of memory",
    "Numbers",
    "Rows and settings",
    "Store",
    "Strangers' files",
    "The page",
    "Past one GPU",
)


def main(results: Path, only_print: bool) -> None:
    suite = ElementTree.parse(results).getroot()[0]
    tests = sorted(suite.findall("testcase"), key=lambda test: (test.attrib["classname"], test.attrib["name"]))
    rows = [
        json.loads(found.attrib["value"]) for test in tests for found in test.findall(".//property[@name='counts']")
    ]
    unknown = {row["section"] for row in rows} - set(SECTIONS)
    if unknown or not rows:
        sys.exit(f"{results}: " + (f"no such sections: {sorted(unknown)}" if unknown else "no counts in it"))
    found = [*summary(rows, float(suite.attrib["time"])), *tables(rows), *without_counts(tests)]
    if only_print:
        print("\n".join(found))
        return
    before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
    PAGE.write_text("\n".join([before + MARK, *found, "", MARK + after]), encoding="utf-8")
    print(f"{PAGE}: {found[1]}")


def summary(rows: list[dict[str, Any]], seconds: float) -> list[str]:
    """Where and how long it ran, and how often all promises together held."""
    held, of = (sum(row[name] for row in rows) for name in ("held", "of"))
    return [
        f"{measured_on()} The run took {seconds / 60:.0f} minutes.",
        f"In all, {of:,} times a fault met a promise; {held:,} times it held.",
    ]


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each section that has counts; of several rows about one fault, such as one a method, the sum."""
    lines: list[str] = []
    for section in SECTIONS:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for row in (row for row in rows if row["section"] == section):
            total = found.setdefault((row["fault"], row["promise"]), {"held": 0, "of": 0, "notes": []})
            total["held"], total["of"] = total["held"] + row["held"], total["of"] + row["of"]
            total["notes"] += [row["note"]] if row["note"] and row["note"] not in total["notes"] else []
        if found:
            lines += [
                "",
                f"### {section}",
                "",
                "| fault | promise | held | of | |",
                "| --- | --- | ---: | ---: | --- |",
            ]
        for (fault, promise), total in found.items():
            held = f"{total['held']:,}" if total["held"] == total["of"] else f"**{total['held']:,}**"
            lines.append(f"| {fault} | {promise} | {held} | {total['of']:,} | {'; '.join(total['notes'])} |")
    return lines


def without_counts(tests: list[ElementTree.Element]) -> list[str]:
    """The tests that the tables do not show, or not whole."""
    listed: dict[str, Counter[str]] = {how: Counter() for how in ("Failed", "Skipped", "Passed, and count nothing")}
    for test in tests:
        file, name = test.attrib["classname"].rpartition(".")[2], test.attrib["name"]
        skipped = test.find("skipped")
        if test.find("failure") is not None or test.find("error") is not None:
            listed["Failed"][f"`{file}::{name}`"] += 1
        elif skipped is not None:
            listed["Skipped"][f"`{file}::{name.partition('[')[0]}`: {skipped.get('message')}"] += 1
        elif test.find("properties") is None:
            listed["Passed, and count nothing"][f"`{file}::{name.partition('[')[0]}`"] += 1
    lines = ["", "### Tests that are not in the tables"]
    for how, found in listed.items():
        lines += ["", f"{how}: {found.total()}", *([""] if found else [])]
        lines += [f"- {test}" + (f" ({count} cases)" if count > 1 else "") for test, count in found.items()]
    return lines


def measured_on() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "gradio"))
    machine = f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores, no GPU"
    return f"{datetime.date.today()}, {machine}, Python {platform.python_version()}, {versions}."


if __name__ == "__main__":
    main(Path(sys.argv[1]), only_print="--print" in sys.argv)
