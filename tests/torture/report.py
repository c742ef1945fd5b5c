"""docs/reliability.md of what the torture left in a folder: python tests/torture/report.py FOLDER."""

import datetime
import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def main(folder: Path) -> None:
    rows = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    unknown = {row["section"] for row in rows} - set(SECTIONS)
    if unknown or not rows:
        sys.exit(f"{folder}: " + (f"no such sections: {sorted(unknown)}" if unknown else "no counts in it"))
    before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
    PAGE.write_text("\n".join([before + MARK, measured_on(), *tables(rows), "", MARK + after]), encoding="utf-8")
    short = [row for row in rows if row["held"] < row["of"]]
    print(f"{PAGE}: {len(rows)} rows, {sum(row['of'] for row in rows)} faults, {len(short)} rows with shortfalls")


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


def measured_on() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "gradio"))
    machine = f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores, no GPU"
    return f"{datetime.date.today()}, {machine}, Python {platform.python_version()}, {versions}."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
