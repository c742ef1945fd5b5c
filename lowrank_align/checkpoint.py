"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a lost run.

A checkpoint is a folder `step-N/` of `tensors.safetensors`, `state.json` and, written last, `manifest.json` with the
SHA-256 and the size of the other two. It is written under another name, fsynced, verified, and only then renamed;
older ones go only after that. Nothing is pickled. torch is imported inside the functions that need it, so that a list
of runs is there at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_align.durable import sync_folder, write_synced
from lowrank_align.errors import EnvironmentProblem, NumericError, is_out_of_memory, said_shortly
from lowrank_align.json_files import read_json
from lowrank_align.training_state import State, decode, encode

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 1
TENSORS, VALUES, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
SPACE_MARGIN_BYTES = 16 * 2**20
HEADER_BYTES_PER_TENSOR = 512  # name, dtype, shape and offsets in the safetensors header, generously


def save(folder: Path, step: int, state: State, keep: int) -> Path:
    """Write `folder/step-N`, then remove all but the `keep` newest. Returns the new checkpoint's path.

    Raises NumericError for a tensor with NaN or infinity (nothing is written), EnvironmentProblem where the disk is
    full or fails: the earlier checkpoints are then as they were.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the new checkpoint stays")
    values_json = json.dumps({"format": FORMAT, "values": encode(state.values)}, allow_nan=False).encode()
    temporary, final = folder / f".tmp-step-{step}", folder / f"step-{step}"
    try:
        _refuse_non_finite(state, step)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*/"):
            shutil.rmtree(stale)
        _refuse_full_disk(folder, step, state, len(values_json))
        _write(temporary, step, state, values_json)
        if problem := verify(temporary, step):
            raise OSError(f"read back wrong: {problem}")
        _publish(temporary, final)
    except (OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or said_shortly(error)
        raise EnvironmentProblem(
            f"{final}: could not save the checkpoint: {reason}; earlier ones are untouched, and `--resume` finds them"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        _rotate(folder, step, keep)
    except OSError as error:  # the new one is safe: too many checkpoints are no reason to stop
        log.warning("could not remove old checkpoints of %s: %s", folder, error)
    return final


def latest(folder: Path) -> tuple[Path, State] | None:
    """The newest checkpoint that verifies, or None; each one skipped is named in one log line."""
    for step, path in _candidates(folder):
        problem = verify(path, step)
        if problem is None:
            try:
                return path, _read(path)
            except Exception as error:  # the hashes hold, so a writer of another version: fall back as well
                problem = f"unreadable: {error}"
        log.warning("skipped checkpoint %s: %s", path, problem)
    return None


def read(path: Path, step: int) -> State:
    """The checkpoint of `step` at `path`; EnvironmentProblem where it does not verify."""
    if problem := verify(path, step):
        raise EnvironmentProblem(f"{path}: {problem}")
    return _read(path)


def verify(path: Path, step: int) -> str | None:
    """What is wrong with the checkpoint `path`, naming the file that failed; None when all is as it was written."""
    try:
        manifest = read_json(path / MANIFEST)
        listed = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
        found_format, found_step = manifest["format"], manifest["step"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__})"
    if found_format != FORMAT:
        return f"{MANIFEST} has format {found_format}, this version reads {FORMAT}"
    if found_step != step:
        return f"{MANIFEST} is that of step {found_step}"
    if set(listed) != {TENSORS, VALUES}:  # so no listed path can lead out of the folder
        return f"{MANIFEST} lists {sorted(listed)} where {TENSORS} and {VALUES} belong"
    for name, (sha256, size_bytes) in listed.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size_bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {size_bytes}"
        try:
            if _sha256(file) != sha256:
                return f"{name} is damaged (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def sealed_steps(folder: Path) -> list[int]:
    """Steps that have a manifest, newest first; not verified, so cheap enough for a listing."""
    return [step for step, path in _candidates(folder) if (path / MANIFEST).is_file()]


def any_there(folder: Path) -> bool:
    """Whether there is a checkpoint at all, whole or damaged; a kill leaves none that is half written."""
    return bool(_candidates(folder))


def _refuse_non_finite(state: State, step: int) -> None:
    import torch

    for name, tensor in state.tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
            if not torch.isfinite(wide).all():
                raise NumericError(
                    f"step {step}: {name} holds NaN or infinity; not saved, `--resume` goes on from before"
                )


def _refuse_full_disk(folder: Path, step: int, state: State, values_bytes: int) -> None:
    tensor_bytes = sum(t.numel() * t.element_size() + HEADER_BYTES_PER_TENSOR for t in state.tensors.values())
    needed, free = tensor_bytes + values_bytes + SPACE_MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder}: no room for the checkpoint of step {step}: {needed / 1e6:.1f} MB needed, "
            f"{free / 1e6:.1f} MB free; earlier checkpoints are untouched, free some space and `--resume`"
        )


def _write(temporary: Path, step: int, state: State, values_json: bytes) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary.mkdir()
    try:
        save_file(_for_disk(state.tensors), temporary / TENSORS)
    except SafetensorError as error:  # how its writer reports a full disk
        raise OSError(str(error)) from error
    with open(temporary / TENSORS, "r+b") as written:
        os.fsync(written.fileno())
    write_synced(temporary / VALUES, values_json)
    files = {
        name: {"sha256": _sha256(temporary / name), "bytes": (temporary / name).stat().st_size}
        for name in (TENSORS, VALUES)
    }
    sync_folder(temporary)
    write_synced(temporary / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": files}).encode())
    sync_folder(temporary)


def _for_disk(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, each with memory of its own, as safetensors demands (8-bit optimisers share theirs)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(address)
        result[name] = tensor
    return result


def _read(path: Path) -> State:
    from safetensors.torch import load_file

    values = decode(json.loads((path / VALUES).read_bytes())["values"])
    # Copies: a memory-mapped file could not be removed on Windows when its turn to go comes.
    return State({name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}, values)


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place. One of the same step steps aside as `step-N.old`, which `latest` still finds."""
    aside = final.with_name(final.name + ".old")
    if final.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(final, aside)
    try:
        os.replace(temporary, final)
    except OSError:
        with contextlib.suppress(OSError):  # back, if it stood aside
            os.replace(aside, final)
        raise
    sync_folder(final.parent)


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Keep the `keep` newest up to `step`; later ones, of a run that went back, only while they verify."""
    kept = 0
    for number, path in _candidates(folder):
        current = not path.name.endswith(".old")
        if number > step:
            stays = current and verify(path, number) is None
        else:
            stays = current and kept < keep
            kept += stays
        if not stays:
            shutil.rmtree(path)


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, newest first, a `.old` after the one that replaces it."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d+)(\.old)?", path.name))]
    ordered = sorted(found, key=lambda pair: (-int(pair[0][1]), pair[1].name))
    return [(int(match[1]), path) for match, path in ordered if path.is_dir() and not path.is_symlink()]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
