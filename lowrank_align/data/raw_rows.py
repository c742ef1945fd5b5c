"""The raw rows of a file: JSON Lines or a JSON array (gzipped or not), or Parquet.

What a file is, its content decides, not its name. Every row comes with where it stands, and a row that cannot be read
comes as its error, so that the ones after it are still looked at.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from lowrank_align.errors import UserError

_MOST_TIMES, _UNPACKED_BYTES = 300, 2**28  # gzip: rows of text shrink to a tenth, and a file of zeros to a thousandth


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its source: the value, or the error that reading it gave."""

    where: str
    text: str  # as it stands in the file; Parquet and hub rows as JSON
    value: Any = None
    error: str = ""


def rows_of(name: str, content: bytes) -> Iterator[RawRow]:
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
        raise UserError(f"{name}: damaged gzip file ({one_line(error)})") from None
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
                yield row_of_value(f"{name}:row {number}", value)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: damaged Parquet file ({one_line(error)})") from None


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
    return "nested too deep" if isinstance(error, RecursionError) else one_line(error)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def row_of_value(where: str, value: Any) -> RawRow:
    return RawRow(where, json.dumps(value, ensure_ascii=False, default=str), value)
