"""Files that hold no rows, and what is no file; each with the line that its user sees."""
# ruff: noqa: E501 -- messages are long lines

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from tests.torture.rows import GOOD, PAIR, lines, packed

# name: (method, the file's bytes, the whole line)
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    # --- no JSON
    "malformed on line 2": (
        "sft",
        lines(GOOD) + b'{"prompt": "a", \n',
        "rows.jsonl:2: not JSON: Expecting property name enclosed in double quotes (column 17)",
    ),
    "two objects on a line": (
        "sft",
        lines(GOOD).strip() + lines(GOOD),
        "rows.jsonl:1: not JSON: Extra data (column 44)",
    ),
    "single quotes": (
        "sft",
        b"{'prompt': 'a', 'completion': 'b'}\n",
        "rows.jsonl:1: not JSON: Expecting property name enclosed in double quotes (column 2)",
    ),
    "raw line break in a text": (
        "sft",
        b'{"prompt": "a\tb", "completion": "b"}\n',
        "rows.jsonl:1: not JSON: Invalid control character at (column 14)",
    ),
    "cut in the middle": (
        "sft",
        lines(GOOD, GOOD)[:-12],
        "rows.jsonl:2: not JSON: Expecting ':' delimiter (column 33)",
    ),
    "bad escape": (
        "sft",
        b'{"prompt": "\\x41", "completion": "b"}\n',
        "rows.jsonl:1: not JSON: Invalid \\escape (column 13)",
    ),
    "NaN": ("reward", lines({**PAIR, "margin": float("nan")}), "rows.jsonl:1: not JSON: NaN is not JSON"),
    "Infinity": ("reward", lines({**PAIR, "margin": float("inf")}), "rows.jsonl:1: not JSON: Infinity is not JSON"),
    "a number of 5,000 digits": (
        "reward",
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + b"1" * 5000 + b"}\n",
        "rows.jsonl:1: not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; "
        "use sys.set_int_max_str_digits() to increase the limit",
    ),
    "3,000 deep": (
        "sft",
        b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "rows.jsonl:1: not JSON: nested too deep",
    ),
    "3,000 deep in an array": ("sft", b"[" * 3000 + b"]" * 3000, "rows.jsonl:1: not JSON: nested too deep"),
    "a key twice": (
        "sft",
        b'{"prompt": "a", "completion": "b", "prompt": "c"}\n',
        "rows.jsonl:1: prompt: stands twice in one object; which of them is meant?",
    ),
    "a key twice in a turn": (
        "sft",
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n',
        "rows.jsonl:1: content: stands twice in one object; which of them is meant?",
    ),
    "pretty-printed": (
        "sft",
        json.dumps(GOOD, indent=2).encode(),
        "rows.jsonl:1: an object over several lines; rows are one object a line, or an array of objects",
    ),
    "array with a comma too many": (
        "sft",
        b"[" + lines(GOOD).strip() + b",\n]",
        "rows.jsonl:2: not JSON: Expecting value (column 1)",
    ),
    "array that is not closed": (
        "sft",
        b"[" + lines(GOOD).strip(),
        "rows.jsonl:1: not JSON: Expecting ',' or ']' (column 45)",
    ),
    "text after the array": (
        "sft",
        b"[" + lines(GOOD).strip() + b"] ok",
        "rows.jsonl:1: not JSON: Extra data after the array (column 47)",
    ),
    # --- no text, or another format
    "empty": ("sft", b"", "rows.jsonl: the file is empty"),
    "blank lines alone": ("sft", b"\n \r\n", "rows.jsonl: the file is empty"),
    "byte order mark alone": ("sft", b"\xef\xbb\xbf\n", "rows.jsonl: the file is empty"),
    "an empty array": ("sft", b"[]", "rows.jsonl: no rows"),
    "UTF-16": (
        "sft",
        lines(GOOD).decode().encode("utf-16"),
        "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8",
    ),
    "UTF-16 without a mark": (
        "sft",
        lines(GOOD).decode().encode("utf-16-le"),
        "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8",
    ),
    "Latin-1 on line 2": (
        "sft",
        lines(GOOD) + '{"prompt": "é"}\n'.encode("latin-1"),
        "rows.jsonl:2: not UTF-8 (at byte 12 of the line), save it as UTF-8",
    ),
    "Latin-1 in an array": (
        "sft",
        '[{"prompt": "é"}]'.encode("latin-1"),
        "rows.jsonl:1: not UTF-8 (at byte 13), save it as UTF-8",
    ),
    "CSV": (
        "sft",
        b"prompt,completion\na,b\n",
        "rows.jsonl:1: not JSON: Expecting value (column 1) (and 1 more bad row; --skip-bad sets them aside)",
    ),
    "zip": ("sft", packed("zip"), "rows.jsonl: a zip archive; unpack it, or compress the rows with gzip"),
    "damaged gzip": (
        "sft",
        b"\x1f\x8b\x08\0",
        "rows.jsonl: damaged gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "gzip cut short": (
        "sft",
        gzip.compress(lines(GOOD), mtime=0)[:-9],
        "rows.jsonl: damaged gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "gzip of gzip": (
        "sft",
        gzip.compress(gzip.compress(lines(GOOD), mtime=0), mtime=0),
        "rows.jsonl: gzipped twice; unpack it once",
    ),
    "Parquet cut short": (
        "sft",
        packed("parquet")[:60],
        "rows.jsonl: damaged Parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this "
        "is not a parquet file)",
    ),
}

PLACES: dict[str, tuple[int, Callable[[Path], object], str]] = {
    "a folder without data": (
        2,
        lambda path: path.mkdir(),
        "rows.jsonl: no data files in this folder (looked for .jsonl, .json, .ndjson, .jsonl.gz, .json.gz, .ndjson.gz, "
        ".parquet)",
    ),
    "a link to nothing": (
        2,
        lambda path: path.symlink_to("gone.jsonl"),
        "rows.jsonl: a link to gone.jsonl, which is not there",
    ),
    "a link to itself": (
        2,
        lambda path: path.symlink_to(path.name),
        "rows.jsonl: a link to rows.jsonl, which is not there",
    ),
    "a device": (
        2,
        lambda path: path.symlink_to("/dev/zero"),
        "rows.jsonl: a device, which never ends; give a file of rows",
    ),
    "nothing": (2, lambda path: None, "rows.jsonl: no such file"),
    "a file that is closed to this user": (
        2,
        lambda path: (path.write_bytes(lines(GOOD)), path.chmod(0)),
        "rows.jsonl: cannot be read (Permission denied)",
    ),
    "gzip that unpacks to gigabytes": (
        2,
        lambda path: path.write_bytes(gzip.compress(bytes(2**20), mtime=0) * 600),
        "rows.jsonl: unpacks to over 268 MB, 300 times its size; no rows are so alike: unpack it to see",
    ),
}
