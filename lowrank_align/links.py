"""Links in folders that somebody else may have made: what is read stays inside, and nothing is written through them."""

import os
from collections.abc import Iterable
from pathlib import Path

from lowrank_align.errors import UserError


def stays(file: Path, given: Path) -> bool:
    """Whether a file lies in the folder that was named, links followed; the hub's cache keeps links to its blobs."""
    real, root = file.resolve(), given.resolve()
    blobs = next((folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots"), root)
    return real.is_relative_to(root) or real.is_relative_to(blobs)


def refuse_links(entries: Iterable[Path]) -> None:
    """UserError for the first that is a link or device: whoever made it chose what would be written or removed."""
    for entry in entries:
        if entry.is_symlink() or (entry.exists() and not entry.is_file() and not entry.is_dir()):
            raise UserError(f"{entry}: a link or device, not written through; remove it, or choose another --out")


def no_link(path: str, flags: int) -> int:
    """An `opener` of `open` that follows no link: one may have been put there after `refuse_links`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has none
