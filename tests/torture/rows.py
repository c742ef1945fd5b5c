"""Good rows of every shape, the bytes of files of them, and such that are only unusual."""

import gzip
import io
import json
import zipfile
from typing import Any

GOOD = {"prompt": "Say: ", "completion": "a word"}
PAIR = {"prompt": "Say: ", "chosen": "a word", "rejected": "no"}
RANKED = {"prompt": "Say: ", "completions": ["a word", "two"], "ranks": [1, 2]}
LABELLED = {**GOOD, "label": True}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"says the {role}"} for role in roles]


def chat(*roles: str, **last: Any) -> dict[str, Any]:
    messages = turns(*roles)
    messages[-1] |= last
    return {"messages": messages}


def packed(kind: str) -> bytes:
    """Rows in a form that is no form of rows."""
    into = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(into, "w") as archive:
            archive.writestr(zipfile.ZipInfo("rows.jsonl"), lines(GOOD))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([GOOD]), into)
    return into.getvalue()


UNUSUAL: dict[str, tuple[bytes, str]] = {
    "byte order mark": (b"\xef\xbb\xbf" + lines(GOOD), "a word"),
    "Windows' line ends": (lines(GOOD).replace(b"\n", b"\r\n"), "a word"),
    "no newline at the end": (lines(GOOD).strip(), "a word"),
    "blank lines": (b"\n\n" + lines(GOOD) + b"\n", "a word"),
    "gzip under a plain name": (gzip.compress(lines(GOOD)), "a word"),
    "gzip in two members": (gzip.compress(lines(GOOD)[:9]) + gzip.compress(lines(GOOD)[9:]), "a word"),
    "Parquet under a plain name": (packed("parquet"), "a word"),
    "an array": (b"[" + lines(GOOD).strip() + b"]", "a word"),
    "columns that nobody reads": (lines({**GOOD, "source": {"a": [1, None]}, "": 0}), "a word"),
    "integers of 400 digits in them": (lines({**GOOD, "id": 10**400}), "a word"),
    "emoji, joiners, right-to-left": (lines({**GOOD, "completion": "\U0001f468\u200d\U0001f469 \u05d0"}), "\U0001f468"),
    "control characters": (lines({**GOOD, "completion": "a\x1b[31mb"}), "a\\x1b[31mb"),
    "900 deep in a column that nobody reads": (
        b'{"prompt": "a ", "completion": "a word", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        "a word",
    ),
}
