"""Models from the hub: only the files that are read, fetched so that an interruption costs nothing.

huggingface_hub finds, authenticates, shows progress and keeps the cache. Of a file that was interrupted its versions
from 1.x on keep nothing for the next attempt, so weights are fetched here, one file at a time, with Range requests that
go on where the last attempt stopped. They are checked against the hub's SHA-256 and lie where its cache has them.
"""

import errno
import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import are_symlinks_supported, http_get, repo_folder_name, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm  # type: ignore[attr-defined]

from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, Stopped, UserError
from lowrank_align.json_files import read_json

log = logging.getLogger(__name__)

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SUFFIXES = (".json", ".jinja", ".model", ".txt")  # beside the weights: tokenizer, template, settings
FOLDERS = ("", "additional_chat_templates")  # never original/, onnx/, gguf/: the same model in other formats
LISTING_SECONDS = 10.0
MARGIN_BYTES = 64 * 2**20
PARTIAL = ".resumable.incomplete"
# A network's errors are httpx's, or httpx2's, whichever this version of huggingface_hub is built on.
NETWORK_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class _File:
    name: str
    size: int
    sha256: str | None  # of files in large-file storage

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(".safetensors")


@cache  # asked for several times a run, each with a call to the hub
def fetch(name: str, *, weights: bool = True, hint: str = "") -> Path:
    """The folder of a hub model in the hub's cache, with all of its files that we read; what is missing is fetched.

    Without `weights` only what lies beside them, which is enough for rows and plans. Where the hub cannot be reached,
    a complete copy in the cache does. `hint` names a folder that `name` may have meant instead. Raises UserError where
    there is no such model or it has no safetensors, EnvironmentProblem for network, disk, login and licence, Stopped
    where Ctrl-C ended the download.
    """
    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=LISTING_SECONDS)
    except (NETWORK_ERROR, OSError, ValueError) as error:  # ValueError: a bad id, or a page that is no answer
        return _from_cache(name, weights, error, hint)
    commit = str(info.sha)
    files = _wanted(name, info.siblings or [], weights)
    missing = [file for file in files if not _in_cache(name, file.name, commit)]
    if missing:
        _check_disk(name, missing)
        try:
            _download(name, commit, files, missing)
        except KeyboardInterrupt:
            raise Stopped(f"{name}: download interrupted; the same command goes on where it stopped") from None
        except (NETWORK_ERROR, OSError, RuntimeError) as error:  # RuntimeError: what hf_xet raises
            raise _problem(name, error) or _broke_off(name, error) from error
    config = try_to_load_from_cache(name, CONFIG, revision=commit)
    if not isinstance(config, str):
        raise EnvironmentProblem(f"{name}: {CONFIG} is not in {constants.HF_HUB_CACHE} after the download; try again")
    return Path(config).parent


# ---- which files


def _wanted(name: str, siblings: list[Any], weights: bool) -> list[_File]:
    every = [_File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in siblings]
    files = [file for file in every if _is_read(file, weights)]
    if CONFIG not in [file.name for file in files]:
        raise UserError(f"{name}: its repository has no {CONFIG}, so no model that transformers reads")
    if weights and not any(file.is_weights for file in files):
        others = [f.name for f in every if PurePosixPath(f.name).suffix in (".bin", ".pth", ".pt", ".gguf", ".h5")]
        only = f" (only {others[0]} and its like)" if others else ""
        raise UserError(f"{name}: its repository has no safetensors{only}; other weights are not read, choose another")
    return files


def _is_read(file: _File, weights: bool) -> bool:
    path = PurePosixPath(file.name)
    if str(path.parent).removeprefix(".") not in FOLDERS:
        return False
    if file.is_weights:  # consolidated.safetensors: all weights once more, in Mistral's own naming
        return weights and not path.name.startswith("consolidated")
    return path.suffix in SUFFIXES


def _in_cache(name: str, file: str, commit: str | None = None) -> bool:
    return isinstance(try_to_load_from_cache(name, file, revision=commit), str)


# ---- without the hub


def _from_cache(name: str, weights: bool, error: Exception, hint: str) -> Path:
    """The cached folder where it is whole; else what is wrong, from why the hub gave no listing."""
    config = None if isinstance(error, HFValidationError) else try_to_load_from_cache(name, CONFIG)
    problem = _problem(name, error, hint)
    if not isinstance(config, str):
        raise problem or UserError(
            f"{name}: no such folder{hint}, and the hub cannot be reached for it{_offline()}"
        ) from error
    folder = Path(config).parent
    if lacking := _lacking(folder) if weights else None:
        raise problem or EnvironmentProblem(
            f"{name}: {lacking} is not in the hub's cache, and the hub cannot be reached{_offline()}; run the same "
            "command with a network once"
        ) from error
    if not constants.HF_HUB_OFFLINE:
        log.warning("%s: taken from the hub's cache (%s)", name, problem or "the hub cannot be reached")
    return folder


def _lacking(folder: Path) -> str | None:
    """The first weight file that a cached folder should have and has not."""
    index = folder / INDEX
    if not index.is_file():
        return None if any(folder.glob("*.safetensors")) else SINGLE
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return INDEX
    return next((shard for shard in shards if not (folder / shard).is_file()), None)


# ---- fetching


def _check_disk(name: str, missing: list[_File]) -> None:
    """EnvironmentProblem before the download where the disk has no room for it; says what is about to come."""
    store = Path(constants.HF_HUB_CACHE)
    have = sum(partial.stat().st_size for f in missing if f.sha256 and (partial := _partial(name, f.sha256)).is_file())
    needed = sum(file.size for file in missing) - have
    free = shutil.disk_usage(next(place for place in (store, *store.absolute().parents) if place.exists())).free
    if free < needed + MARGIN_BYTES:
        raise EnvironmentProblem(
            f"{name}: {_size(needed)} to download, but {store} has {_size(free)} free; "
            "make room, or name another folder with HF_HUB_CACHE"
        )
    going_on = f", {_size(have)} more are there from before" if have else ""
    log.info("%s: downloading %d files, %s%s, to %s", name, len(missing), _size(needed), going_on, store)


def _download(name: str, commit: str, files: list[_File], missing: list[_File]) -> None:
    """Small files first, so that a gated or broken model shows before gigabytes have come."""
    resumable = [file for file in missing if file.is_weights and file.sha256]
    whole = [file.name for file in files if file not in resumable]
    snapshot_download(name, revision=commit, allow_patterns=whole, tqdm_class=_Bar)  # of the files that were listed
    branch = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs" / "main"
    branch.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(branch, commit)  # as the hub's library notes it, which finds the model by it without a network
    for file in resumable:
        _fetch_resumably(name, commit, file)
        hf_hub_download(name, file.name, revision=commit)  # finds the blob, and links it


class _Bar(tqdm):  # type: ignore[misc]
    """Bars are for terminals; the library draws the one that counts files elsewhere too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"disable": None, **options})


def _fetch_resumably(name: str, commit: str, file: _File) -> None:
    """Fetch one file to where the hub's cache keeps its blobs, going on where an earlier attempt stopped."""
    sha256, partial = str(file.sha256), _partial(name, str(file.sha256))
    blob = partial.with_name(sha256)
    if not are_symlinks_supported(constants.HF_HUB_CACHE):  # there the hub's library would copy the blob
        blob = partial.parents[1] / "snapshots" / commit / file.name
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / partial.parents[1].name / f"{sha256}.lock"  # the hub library's own
    for folder in (partial.parent, blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with partial.open("ab") as target:
            if target.tell() > file.size:
                target.truncate(0)
            url, headers = hf_hub_url(name, file.name, revision=commit), build_hf_headers()
            http_get(
                url,
                target,
                resume_size=target.seek(0, os.SEEK_END),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
            )
        with partial.open("rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
        if found != sha256:
            partial.unlink()
            raise EnvironmentProblem(f"{name}: {file.name} arrived damaged and was removed; run the same command again")
        os.replace(partial, blob)


def _partial(name: str, sha256: str) -> Path:
    folder = repo_folder_name(repo_id=name, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs" / f"{sha256}{PARTIAL}"


# ---- what went wrong


def _problem(name: str, error: Exception, hint: str = "") -> UserError | None:
    """What the hub, or the disk, refused, in one line; None where the network failed."""
    if isinstance(error, UserError):
        return error
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        if get_token() is None:
            return EnvironmentProblem(f"{name}: gated; accept its licence on {page}, then log in with `hf auth login`")
        return EnvironmentProblem(
            f"{name}: gated, and this login has no access yet; accept its licence on {page} (some are granted by hand)"
        )
    if isinstance(error, RepositoryNotFoundError):
        private = "; a private one needs `hf auth login`" if get_token() is None else ""
        return UserError(f"{name}: neither a folder here{hint} nor a model on the hub{private}")
    if isinstance(error, HFValidationError):
        return UserError(f"{name}: no such folder{hint}, and no name that the hub allows")
    if isinstance(error, HfHubHTTPError):
        return _refused(name, error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return EnvironmentProblem(
            f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror} while downloading {name}; "
            "HF_HUB_CACHE names another folder"
        )
    return None


def _refused(name: str, error: HfHubHTTPError) -> UserError:
    status = error.response.status_code
    if status == 401:
        return EnvironmentProblem(f"{name}: the hub does not know this login (expired?); renew it: `hf auth login`")
    said = " ".join((error.server_message or "").split())
    if status == 403:
        return EnvironmentProblem(f"{name}: this login may not read it ({said or 'forbidden'})")
    return EnvironmentProblem(f"{name}: the hub answered with error {status}{f' ({said})' * bool(said)}; try later")


def _broke_off(name: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return EnvironmentProblem(f"{name}: the download broke off ({reason}); the same command goes on where it stopped")


def _offline() -> str:
    return " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
