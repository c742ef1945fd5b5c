"""Bad rows on their way to the user: one error for all of them, or set aside in a file with `--skip-bad`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_align.errors import UserError


@dataclass
class BadRows:
    """Collects the bad rows of one source, so that the user hears of all of them at once."""

    set_aside: Path | None = None  # where `--skip-bad` puts them, as {"where", "error", "row"}, one a line
    found: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, error: str, row: Any) -> None:
        """`row` is the raw text of the row where there is one, else what it was made of."""
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
        self.found.append({"where": where, "error": error, "row": text})

    def settle(self, good: int, *, append: bool = False) -> int:
        """Raises for the first bad row and counts the others; or writes them all down and returns how many they are.

        `append` adds to the file, for what a later check found. Where no good row remains, `UserError` and no file.
        """
        if not self.found:
            return 0
        first, more = self.found[0]["error"], len(self.found) - 1
        if self.set_aside is None:
            others = f" (and {more} more bad row{'s' * (more > 1)}; --skip-bad sets them aside)" if more else ""
            raise UserError(first + others)
        if not good:
            raise UserError(f"no good row remains: {more + 1} bad (the first: {first})")
        lines = "".join(json.dumps(bad) + "\n" for bad in self.found)
        try:
            self.set_aside.parent.mkdir(parents=True, exist_ok=True)
            with self.set_aside.open("a" if append else "w", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(f"{self.set_aside}: bad rows cannot be set aside there ({error.strerror})") from None
        return more + 1
