"""Rows of a file too large to hold: every one is checked once, and read and tokenised again when its turn comes.

What stays in memory is where each line begins and how long it is, 16 bytes a row. A row that turns out not to fit gives
way to the next one that does, since nobody knows beforehand how many tokens a text has.
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest
from pathlib import Path
from typing import BinaryIO, overload

from lowrank_align.data.bad_rows import BadRows
from lowrank_align.data.chat import Rendered
from lowrank_align.data.formats import Row
from lowrank_align.data.raw_rows import RawRow, row_of_line
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.trees import TreeRow

LARGE_BYTES = 64 * 2**20  # JSON Lines from this size on; below, rows are held as tokens
Parse = Callable[[RawRow, int], Row]
Seen = tuple[int, int, int]  # which file, when it was written last, its bytes: by these a change shows


def is_large(path: Path) -> bool:
    """Whether a source is one file of JSON Lines that is read this way."""
    if not path.is_file() or path.stat().st_size < LARGE_BYTES:
        return False
    with path.open("rb") as file:
        first = file.readline(2**20)
    return first.lstrip()[:1] == b"{" and first.strip() != b"{" and first[1:2] != b"\0"


class LargeFile(Sequence[Row]):
    """The good rows of a file, by their places in it."""

    def __init__(
        self,
        path: Path,
        parse: Parse,
        seen: Seen,
        places: "array[int]",
        lengths: "array[int]",
        numbers: "array[int]",
    ) -> None:
        self.path, self.parse, self.seen = path, parse, seen
        self.places, self.lengths, self.numbers = places, lengths, numbers  # byte, bytes, 1-based line
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if self.has_changed:
            raise EnvironmentProblem(f"{self.path}: was changed while it is trained on; put it back, then --resume")
        number = self.numbers[place]
        self._file.seek(self.places[place])
        line = self._file.read(self.lengths[place])
        return self.parse(row_of_line(f"{self.path.name}:{number}", line), number - 1)

    @property
    def has_changed(self) -> bool:
        """Whether the file is another than the one that was checked."""
        return _seen(self._file) != self.seen

    def split(self, held_out: Iterable[int]) -> tuple["LargeFile", list[Row]]:
        """The rows without those places, and those."""
        out = set(held_out)
        columns = [
            array(column.typecode, (value for place, value in enumerate(column) if place not in out))
            for column in (self.places, self.lengths, self.numbers)
        ]
        return LargeFile(self.path, self.parse, self.seen, *columns), [self[place] for place in sorted(out)]


def check_file(path: Path, parse: Parse, bad: BadRows) -> tuple[LargeFile, Counter[str], str]:
    """Every row parsed once and let go: the good ones, how many were read as which format, the SHA-256 of the bytes.

    EnvironmentProblem where the file changes meanwhile.
    """
    places, lengths, numbers = array("Q"), array("I"), array("I")
    read_as: Counter[str] = Counter()
    digest, at = hashlib.sha256(), 0
    with path.open("rb") as file:
        seen = _seen(file)
        for number, line in enumerate(file, start=1):
            digest.update(line)
            start, at = at, at + len(line)
            if not line.strip():
                continue
            raw = row_of_line(f"{path.name}:{number}", line.rstrip(b"\n"))
            try:
                row = parse(raw, number - 1)
            except UserError as error:
                bad.add(raw.where, str(error), raw.text)
                continue
            if row.read_as:
                read_as[row.read_as] += 1
            places.append(start)
            lengths.append(len(line.rstrip(b"\n")))
            numbers.append(number)
    found = LargeFile(path, parse, seen, places, lengths, numbers)
    if found.has_changed:
        raise EnvironmentProblem(f"{path}: was changed while it was read; begin again")
    return found, read_as, digest.hexdigest()


def _seen(file: BinaryIO) -> Seen:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_mtime_ns, found.st_size


class LargeTrees(Sequence[TreeRow]):
    """The rows of a large file as tokens, one at a time; `tell` hears of the first that gave way to another."""

    def __init__(
        self, rows: LargeFile, render: Callable[[Row], Rendered], *, skip_bad: bool, tell: Callable[[str], None]
    ) -> None:
        self.rows, self.render, self.skip_bad, self.tell = rows, render, skip_bad, tell
        self.told = False

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> TreeRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[TreeRow]: ...
    def __getitem__(self, place: int | slice) -> TreeRow | list[TreeRow]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        for step in range(len(self)):
            tree, reason = self._tree(self.rows[(place + step) % len(self)])
            if tree is not None:
                return tree
            if not self.told:
                self.told = True
                self.tell(f"{reason}; in the place of such rows stands the next one (told once)")
        raise UserError(f"{self.rows.path}: no row fits; raise --max-length or shorten the prompts")

    def longest(self, count: int) -> list[TreeRow]:
        """Those of most bytes, the one of most tokens first: what memory is planned for."""
        places = nlargest(count, range(len(self)), key=self.rows.lengths.__getitem__)
        trees = [self[place] for place in places]
        return sorted(trees, key=lambda row: -row.tokens)

    def _tree(self, row: Row) -> tuple[TreeRow | None, str]:
        try:
            rendered = self.render(row)
        except UserError as error:
            if not self.skip_bad:
                raise
            return None, str(error)
        return rendered.tree, f"{row.where}: {rendered.dropped}"
