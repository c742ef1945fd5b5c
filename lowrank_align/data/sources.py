"""Where rows come from: a file, a folder of files, a saved dataset, or a dataset of the hub."""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_align.data.raw_rows import RawRow, one_line, row_of_value, rows_of
from lowrank_align.errors import EnvironmentProblem, UserError, nearest
from lowrank_align.links import stays

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz", ".parquet")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


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
    return RawSource((row for name, content in contents for row in rows_of(name, content)), digest)


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
        raise UserError(f"{folder}: not a readable saved dataset ({one_line(error)})") from None
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
        raise UserError(f"{name}: neither a file here nor a dataset that the hub gives ({one_line(error)})") from None
    return RawSource(_dataset_rows(name, dataset), dataset._fingerprint)


def _dataset_rows(name: str, dataset: Any) -> Iterator[RawRow]:
    for number, value in enumerate(dataset, start=1):
        yield row_of_value(f"{name}:row {number}", value)
