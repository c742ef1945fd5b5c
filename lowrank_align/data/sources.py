"""The raw rows of a source: JSON Lines or a JSON array (gzipped or not), Parquet, a folder of these, a hub dataset.

What a file is, its content decides, not its name. Every row comes with where it stands, and a row that cannot be read
comes as its error, so that the ones after it are still looked at.
"""

import gzip
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lowrank_align.errors import EnvironmentProblem, UserError, nearest
from lowrank_align.links import stays

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz", ".parquet")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_MOST_TIMES, _UNPACKED_BYTES = 300, 2**28  # gzip: rows of text shrink to a tenth, and a file of zeros to a thousandth
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its source: the value, or the error that reading it gave."""

    where: str
    text: str  # as it stands in the file; Parquet and hub rows as JSON
    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class RawSource:
    """All rows of a source, and the hash of the bytes they came from (of a hub dataset, its fingerprint)."""

    rows: Iterator[RawRow]
    sha256: str


def open_source(source: str | Path, split: str = "train") -> RawSource:
    """The rows of a file, a folder or a hub dataset id. Raises `UserError` where there is nothing that can be read."""
    path = Path(source).expanduser()
    if path.is_symlink() and not os.path.exists(path):
        raise UserError(f"{source}: a link to {os.readlink(path)}, which is not there")
    if path.is_dir():
        return _open_folder(path, split)
    if path.exists():  # also a pipe, as of `--data <(zcat rows.gz)`
        return _open_files([path], path.parent)
    if isinstance(source, Path) or _is_path(source) or source.count("/") != 1:  # a dataset's id is owner/name
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f", nor is its folder {path.parent}"
        raise UserError(f"{source}: no such file{where}{nearest(path.name, siblings)}")
    return _open_hub(source, split)


def _is_path(source: str) -> bool:
    """Whether a name that is no file was meant as one: a hub id has at most one slash and no data suffix."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith(".")
    return not is_id or source.lower().endswith((*DATA_SUFFIXES, ".csv", ".tsv", ".txt", ".gz"))


def _open_files(paths: list[Path], root: Path) -> RawSource:
    contents = [(str(path.relative_to(root)), _read_bytes(path)) for path in paths]
    digest = hashlib.sha256(b"".join(content for _, content in contents)).hexdigest()
    return RawSource((row for name, content in contents for row in _rows_of(name, content)), digest)


def _read_bytes(path: Path) -> bytes:
    try:
        kind = path.stat().st_mode
        if stat.S_ISBLK(kind) or (stat.S_ISCHR(kind) and path.resolve() != Path(os.devnull)):
            raise UserError(f"{path}: a device, which never ends; give a file of rows")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _open_folder(folder: Path, split: str) -> RawSource:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved_dataset(folder, split)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(DATA_SUFFIXES) and path.name not in _NOT_DATA and path.is_file()
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"{folder}: no data files in this folder (looked for {', '.join(DATA_SUFFIXES)})")
    splits = {path: _split_in_name(path) for path in files}
    if any(splits.values()):  # a hub dataset's files say which split they are
        files = [path for path in files if splits[path] == split]
        if not files:
            there = ", ".join(sorted({name for name in splits.values() if name}))
            raise UserError(f"{folder}: no file of the split {split} (there are: {there})")
    _refuse_outside(files, folder)
    return _open_files(files, folder)


def _refuse_outside(files: list[Path], folder: Path) -> None:
    """A folder may be somebody else's, and its rows are shown, trained on and passed on."""
    for file in files:
        if not stays(file, folder):
            raise UserError(f"{file}: leads out of {folder}; put the file itself there, or name it alone")


def _split_in_name(path: Path) -> str | None:
    words = re.split(r"[-_.]", path.name.lower())
    return next((split for split in _SPLITS if split in words), None)


def _open_saved_dataset(folder: Path, split: str) -> RawSource:
    """A folder that `datasets.save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` raises a dozen kinds; all of them mean that the folder is broken
        raise UserError(f"{folder}: not a readable saved dataset ({_one_line(error)})") from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{folder}: no split {split} (there are: {', '.join(dataset)})")
        dataset = dataset[split]
    digest = hashlib.sha256()
    files = [Path(name) for name in sorted(entry["filename"] for entry in dataset.cache_files)]
    _refuse_outside(files, folder)
    for file in files:
        digest.update(file.read_bytes())
    return RawSource(_dataset_rows(folder.name, dataset), digest.hexdigest())


def _open_hub(name: str, split: str) -> RawSource:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except ConnectionError:  # also `OfflineModeIsEnabled`
        raise EnvironmentProblem(
            f"{name}: neither a file here nor a dataset in the cache, and the hub cannot be reached "
            "(check the name, go online once, or give a file)"
        ) from None
    except Exception as error:  # not found, gated, no such split, no such configuration, a loading script, ...
        raise UserError(f"{name}: neither a file here nor a dataset that the hub gives ({_one_line(error)})") from None
    return RawSource(_dataset_rows(name, dataset), dataset._fingerprint)


def _dataset_rows(name: str, dataset: Any) -> Iterator[RawRow]:
    for number, value in enumerate(dataset, start=1):
        yield _row_of_value(f"{name}:row {number}", value)


def _row_of_value(where: str, value: Any) -> RawRow:
    return RawRow(where, json.dumps(value, ensure_ascii=False, default=str), value)


def _rows_of(name: str, content: bytes) -> Iterator[RawRow]:
    """The rows of one file by what it holds."""
    if content[:2] == b"\x1f\x8b":
        content = _unpacked(name, content)
    if content[:4] == b"PK\x03\x04":
        raise UserError(f"{name}: a zip archive; unpack it, or compress the rows with gzip")
    if content[:4] == b"PAR1":
        return _parquet_rows(name, content)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or content[1:2] == b"\0":
        raise UserError(f"{name}:1: looks like UTF-16 (at byte 0), save it as UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise UserError(f"{name}: the file is empty")
    if content.split(b"\n", 1)[0].strip() == b"{":
        raise UserError(f"{name}:1: an object over several lines; rows are one object a line, or an array of objects")
    return _array_rows(name, content) if content.lstrip()[:1] == b"[" else _line_rows(name, content)


def _unpacked(name: str, content: bytes) -> bytes:
    """A gzip file's content, in pieces, so that a small one cannot fill the memory."""
    most = max(_MOST_TIMES * len(content), _UNPACKED_BYTES)
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: damaged gzip file ({_one_line(error)})") from None
    if len(unpacked) > most:
        times = f"{_MOST_TIMES} times its size; no rows are so alike: unpack it to see"
        raise UserError(f"{name}: unpacks to over {most // 10**6} MB, {times}")
    if unpacked[:2] == b"\x1f\x8b":
        raise UserError(f"{name}: gzipped twice; unpack it once")
    return unpacked


def _parquet_rows(name: str, content: bytes) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield _row_of_value(f"{name}:row {number}", value)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: damaged Parquet file ({_one_line(error)})") from None


def _line_rows(name: str, content: bytes) -> Iterator[RawRow]:
    """JSON Lines. A line that cannot be read spoils only itself."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        yield row_of_line(f"{name}:{number}", line)


def row_of_line(where: str, line: bytes) -> RawRow:
    """One line of JSON Lines, without its end."""
    try:
        text = line.decode("utf-8")
        return RawRow(where, text, _DECODER.decode(text))
    except UnicodeDecodeError as error:
        text = line.decode("utf-8", errors="backslashreplace")
        return RawRow(where, text, error=f"{where}: not UTF-8 (at byte {error.start} of the line), save it as UTF-8")
    except json.JSONDecodeError as error:
        return RawRow(where, text, error=f"{where}: not JSON: {error.msg} (column {error.colno})")
    except _Twice as error:
        return RawRow(where, text, error=f"{where}: {error}")
    except (RecursionError, ValueError) as error:
        return RawRow(where, text, error=f"{where}: not JSON: {_reason(error)}")


def _array_rows(name: str, content: bytes) -> Iterator[RawRow]:
    """A JSON array, read element by element so that each has its line. What cannot be read ends the file."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8 (at byte {error.start}), save it as UTF-8") from None
    at = _skip_blank(text, text.index("[") + 1)
    number, line, previous_line, counted_to = 0, 1, 0, 0
    more = text[at : at + 1] != "]"
    while more:
        number += 1
        line, counted_to = line + text.count("\n", counted_to, at), at
        where = f"{name}:{line}" if line != previous_line else f"{name}:{line}, row {number}"
        previous_line = line
        value, end = _decode_element(name, text, at, line)
        yield RawRow(where, text[at:end], value)
        at = _skip_blank(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_blank(text, at + 1)
        elif text[at : at + 1] != "]":
            _malformed(name, text, at, "Expecting ',' or ']'")
    if text[at + 1 :].strip():
        _malformed(name, text, _skip_blank(text, at + 1), "Extra data after the array")


def _decode_element(name: str, text: str, at: int, line: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        _malformed(name, text, error.pos, error.msg)
    except _Twice as error:
        raise UserError(f"{name}:{line}: {error}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{name}:{line}: not JSON: {_reason(error)}") from None


def _malformed(name: str, text: str, at: int, what: str) -> NoReturn:
    error = json.JSONDecodeError(what, text, at)
    raise UserError(f"{name}:{error.lineno}: not JSON: {what} (column {error.colno})")


def _skip_blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class _Twice(ValueError):
    """A key twice in one object; JSON's readers keep the last without a word."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise _Twice(f"{key}: stands twice in one object; which of them is meant?")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
