"""Files that a kill or a full disk leaves whole: the old content or the new, never a part."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from lowrank_align.errors import EnvironmentProblem

LEFT_OVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")  # what a kill leaves of `write_atomic`, which names it so


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write one file so that a reader, or a kill, finds either the old content or the new, never a part.

    Text is written as UTF-8 with its line ends as they are. Raises EnvironmentProblem where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            write_synced(temporary, content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # a disk that has turned read-only keeps it
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses in here is an EnvironmentProblem that names `path`."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"{path}: could not be written: {error.strerror or error}") from error


def write_synced(path: Path, content: bytes) -> None:
    """Write one file and wait until the disk has it; a kill may leave a part."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` durable; Windows neither needs nor allows it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
