"""Memory, disks, the hub and threads."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from lowrank_align.doctor.finding import Finding, import_error, imports
from lowrank_align.provenance import cache_folder

GIB = 2**30
LITTLE_RAM_BYTES, LITTLE_DISK_BYTES, NO_DISK_BYTES = 4 * GIB, 20 * GIB, GIB // 16


def memory() -> list[Finding]:
    """Free RAM, within the limit of a container."""
    if not imports("psutil"):
        return []  # named among the packages
    import psutil

    state = psutil.virtual_memory()
    total, free = state.total, state.available
    limit = _container_limit()
    note = ""
    if limit is not None and limit < total:
        total, free, note = limit, min(free, limit), " (a container's limit)"
    what = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{note}"
    if free < LITTLE_RAM_BYTES:
        return [Finding("RAM", "warning", what, "little: close other programs; a model passes through it on its way")]
    return [Finding("RAM", "ok", what)]


def _container_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(file).read_text())
    return None


def disks() -> list[Finding]:
    """Room and permission where runs, models and caches go."""
    places = {"runs (here)": Path.cwd(), "own cache": cache_folder()}
    if imports("huggingface_hub"):
        from huggingface_hub import constants

        places["hub cache"] = Path(constants.HF_HUB_CACHE)
    advice = {
        "runs (here)": "go to another folder, or give --out",
        "own cache": "LOWRANK_ALIGN_CACHE names another folder",
        "hub cache": "HF_HUB_CACHE names another folder",
    }
    return [_disk(topic, place.expanduser(), advice[topic]) for topic, place in places.items()]


def _disk(topic: str, place: Path, advice: str) -> Finding:
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(topic, "problem", f"{place}: cannot be written ({error.strerror or error})", advice)
    what = f"{place}: {free / GIB:.1f} GiB free"
    if free < NO_DISK_BYTES:
        return Finding(topic, "problem", what, f"make room; {advice}")
    if free < LITTLE_DISK_BYTES:
        return Finding(topic, "warning", what, f"an 8B model's files take 16 GB; {advice}")
    return Finding(topic, "ok", what)


def hub() -> list[Finding]:
    """Whether models can be fetched, and as whom; the token itself is never shown."""
    if reason := import_error("huggingface_hub"):
        return [Finding("hub", "problem", f"huggingface_hub cannot be imported: {reason}", "reinstall it")]
    from huggingface_hub import constants, get_token

    try:
        known = get_token() is not None
    except Exception as error:  # a login that has to be renewed asks the network
        return [Finding("hub", "warning", f"the login cannot be read: {type(error).__name__}", "hf auth login")]
    login = "logged in" if known else "not logged in (only gated and private models need it: `hf auth login`)"
    elsewhere = ", at the address in HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else ""
    if constants.HF_HUB_OFFLINE:
        advice = "only models that are in the cache can be used; unset HF_HUB_OFFLINE for others"
        return [Finding("hub", "warning", f"offline (HF_HUB_OFFLINE is set){elsewhere}, {login}", advice)]
    return [Finding("hub", "ok", login + elsewhere)]


def threads() -> list[Finding]:
    """How many threads a CPU's arithmetic takes, and whether they wait without stealing each other's cores."""
    if not imports("torch"):
        return []
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "")
    what = f"{count} of {cores} cores, OMP_WAIT_POLICY={policy or 'unset'}"
    if count > cores:
        return [Finding("threads", "warning", what, f"more threads than cores: OMP_NUM_THREADS={cores}")]
    if policy.upper() != "PASSIVE":
        advice = "on the CPU, NF4 can be ten times slower then: OMP_WAIT_POLICY=PASSIVE, or leave it unset"
        return [Finding("threads", "warning", what, advice)]
    return [Finding("threads", "ok", what)]
