"""What a user can have got wrong about a run, looked at before a model loads and before anything is written.

The rows have checks of their own (`data`). Each of these raises UserError, or EnvironmentProblem for the machine.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from pydantic import ValidationError

from lowrank_align import adapters
from lowrank_align.config import OnlineSettings, TrainSettings, is_function, read_yaml
from lowrank_align.devices import check_device
from lowrank_align.errors import EnvironmentProblem, UserError, nearest
from lowrank_align.loading import model_folder, read_config
from lowrank_align.out_folders import check_place
from lowrank_align.plan import size_bytes
from lowrank_align.provenance import read_provenance, weights_hash
from lowrank_align.rewards import load_function
from lowrank_align.rollout_server import RolloutServer
from lowrank_align.runs import read_state
from lowrank_align.workers import launched_processes

log = logging.getLogger(__name__)

ROOM_BYTES = 64 * 2**20  # below this much free disk no run is begun
INPUTS = ("model", "adapter", "reward", "data", "prompts", "eval_data", "pretrain_data", "chat_template")

# What may differ between a run and its resumption: how far it goes (with it the rate's schedule), how often it
# reports, what of it is in memory at once, and where a rollout server is to be found.
RESUMABLE_CHANGES = {
    "max_steps", "epochs", "micro_batch_size", "log_steps", "eval_steps", "sample_steps",
    "save_steps", "keep_checkpoints", "report_to", "device", "early_stopping", "out",
    "rollout_server", "rollout_server_key_env", "rollout_server_prompts", "rollout_server_seconds",
}  # fmt: skip


def check_machine(settings: TrainSettings, out: Path) -> None:
    """The device that was asked for, its memory where that is given, the packages, and room on the disk."""
    if settings.gpu is not None:
        size_bytes(settings.gpu)
    device = check_device(settings.device, settings.quantize, settings.attention)
    if settings.optimizer != "adamw" and device.type != "cuda":
        raise EnvironmentProblem(f"--optimizer {settings.optimizer} needs a CUDA GPU; use adamw")
    for tracker in settings.report_to:
        if tracker not in LoggerType.list():
            raise UserError(f"report_to: {tracker}: no such tracker{nearest(tracker, LoggerType.list())}")
        if tracker != "all" and tracker not in [str(available) for available in get_available_trackers()]:
            raise EnvironmentProblem(f"--report-to {tracker}: its package is not installed")
    free = shutil.disk_usage(check_place(out)).free
    if free < ROOM_BYTES:
        raise EnvironmentProblem(
            f"{out}: only {free / 1e6:.0f} MB free on its disk; a run needs {ROOM_BYTES / 1e6:.0f} MB"
        )


def check_inputs_stay(settings: TrainSettings, out: Path) -> None:
    """--overwrite empties OUT: nothing that the run begins with may lie in there."""
    named = [(name, getattr(settings, name, None)) for name in INPUTS if settings.overwrite]
    for name, given in [
        (name, one) for name, value in named for one in (value if isinstance(value, list) else [value])
    ]:
        found = Path(given).expanduser().resolve() if given else None
        if found and found.exists() and out.resolve() in (found, *found.parents):
            flag = name.replace("_", "-")
            raise UserError(f"--overwrite would remove {given}, which --{flag} names; choose another --out")


def check_adapters(settings: TrainSettings) -> None:
    """That the adapters named fit the model, and the layers to adapt are its own; only names and headers are read."""
    config, folder = read_config(settings.model), model_folder(settings.model)
    given: list[tuple[str, adapters.Kind | None]] = []
    if settings.adapter is not None:
        given.append((settings.adapter, None if settings.method == "reward" else "policy"))
    else:
        if settings.target_modules:
            adapters.check_targets(settings.target_modules, config)
        if settings.lora_layers:
            adapters.check_layers(settings.lora_layers, config)
    for reward in settings.reward if isinstance(settings, OnlineSettings) else ():
        if is_function(reward):
            load_function(reward)
        else:
            given.append((reward, "reward"))
    for start, kind in given:
        adapters.check_before_load(start, kind, settings.model, weights_hash(folder), config)


def check_rollout_server(settings: TrainSettings) -> None:
    """That a server which is to draw the rollouts is there and takes the key."""
    if isinstance(settings, OnlineSettings) and settings.rollout_server is not None:
        if launched_processes() > 1:
            raise UserError(
                "--rollout-server: draws for a run of one process only; leave out the server or the launcher"
            )
        RolloutServer(settings).check()


def finished_before(settings: TrainSettings, out: Path) -> dict[str, Any] | None:
    """The `run.json` of a finished run that --resume finds; UserError where it is of another method."""
    state = read_state(out) if settings.resume else None
    if state is None:
        return None
    method = state.get("method") or settings.method
    if method != settings.method:
        raise UserError(f"--resume: {out} is a run of {method}, not {settings.method}; choose another --out")
    return state if state["state"] == "finished" else None


def check_resumable(settings: TrainSettings, out: Path, data_hash: str, pretrain_hash: str | None = None) -> None:
    """A resumed run must be the same run: same data, same knobs but for those that only say how far and how often."""
    if not settings.resume or not out.is_dir():
        return
    if not (out / "config.yaml").is_file():
        if (out / "checkpoints").is_dir():
            raise UserError(f"--resume: {out} has checkpoints but no config.yaml to go on with; choose another --out")
        return
    before = _as_read_today(read_yaml(out / "config.yaml"), settings)
    now = settings.model_dump()
    for name in sorted(before.keys() - RESUMABLE_CHANGES):
        if name in now and now[name] != before[name]:
            raise UserError(
                f"--resume: {name} is {now[name]!r} here but {before[name]!r} in {out}; use the run's, or a new --out"
            )
    record = _record(out)
    sources = [
        (settings.rows, record.get("data_hash"), data_hash),
        (settings.model, record.get("base_hash"), weights_hash(model_folder(settings.model))),
    ]
    if pretrain_hash is not None:
        sources.append((getattr(settings, "pretrain_data", ""), record.get("pretrain_hash"), pretrain_hash))
    if settings.adapter is not None:  # with other bytes, DPO and PPO would get another reference half-way
        begun = (record.get("parent") or {}).get("adapter_hash")
        sources.append((settings.adapter, begun, adapters.weights_sha256(settings.adapter)))
    if isinstance(settings, OnlineSettings):
        hashes = record.get("reward_hashes") or {}
        only = record.get("reward_hash")  # of runs that began when there was one reward
        sources += [(run, hashes.get(run, only), adapters.weights_sha256(run)) for run in settings.reward_runs]
    for source, before_hash, hash_now in sources:
        if before_hash not in (None, hash_now):
            raise UserError(f"--resume: {source} has changed since {out} began; put it back, or use a new --out")


def _as_read_today(before: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    """A run's configuration in today's shape: `loss` and `reward` were one name before they were lists."""
    kind = type(settings)
    try:
        today = kind(**{name: value for name, value in before.items() if name in kind.model_fields}).model_dump()
    except ValidationError:
        return before
    return {name: today.get(name, value) for name, value in before.items()}


def _record(out: Path) -> dict[str, Any]:
    try:
        return read_provenance(out) or {}
    except UserError as error:
        log.warning("%s; it is written anew, and whether data and model are still the same cannot be told", error)
        return {}
