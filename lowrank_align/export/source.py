"""What is exported: an adapter, the base it was made for, and how the two were trained; all checked without weights."""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowrank_align import adapters
from lowrank_align.config import ExportSettings
from lowrank_align.data.chat import Renderer
from lowrank_align.data.template import read_template
from lowrank_align.devices import DTYPES, Quantize
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.loading import language_model, model_folder, read_config, read_tokenizer
from lowrank_align.preset_check import from_preset
from lowrank_align.provenance import read_provenance, weights_hash
from lowrank_align.runs import read_state

log = logging.getLogger(__name__)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEADER_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Source:
    """An adapter with its base. `record` is the run's provenance, empty for a plain PEFT adapter."""

    run: Path  # the run's folder, or the adapter's own
    adapter: Path
    kind: adapters.Kind
    model: str  # the base, as the user or the run names it
    base: Path
    base_hash: str
    config: Any
    saved: adapters.Saved
    record: dict[str, Any]
    renderer: Renderer
    own_dtype: torch.dtype  # of the base's weights
    context: int

    @property
    def public_name(self) -> str:
        """The base's hub id where it has one, else the last part of its path: what other people may read."""
        return self.hub_id or Path(self.model).name

    @property
    def hub_id(self) -> str | None:
        """The base's name on the hub: what has one slash and is no folder here. None where nothing looks like one."""
        named = (self.record.get("base"), self.saved.config.base_model_name_or_path, self.model)
        ids = [str(name) for name in named if name and HUB_ID.fullmatch(str(name)) and not Path(str(name)).is_dir()]
        return ids[0] if ids else None

    @property
    def renamed(self) -> dict[str, str]:
        """Of a base that also sees, only the language model is exported: how its weights are called in the files."""
        return language_model(self.config)[1]

    @property
    def trained_with(self) -> Quantize | None:
        """How the base's weights lay in memory when the adapter was trained; None where nobody knows."""
        found = (self.record.get("config") or {}).get("quantize")
        return found if found in ("nf4", "int8", "none") else None

    @property
    def trained_dtype(self) -> str:
        """What was computed in, as `--dtype` had it."""
        return str((self.record.get("config") or {}).get("dtype") or "auto")


@dataclass
class Job:
    """One export, resolved."""

    source: Source
    to: str
    dtype: torch.dtype  # of the weights; of an adapter's base
    nf4: bool  # merged into the dequantised 4-bit weights
    device: str  # to compare on
    layers: frozenset[str] = frozenset()  # those that NF4 packs, where `nf4`
    transposed: frozenset[str] = frozenset()  # those that keep their weight as (inputs, outputs)

    @property
    def is_adapter(self) -> bool:
        return self.to == "adapter"

    @property
    def is_reward(self) -> bool:
        return self.source.kind == "reward"


def find_source(settings: ExportSettings) -> Source:
    """Everything about the adapter and its base that can be known before the weights are read.

    UserError for an unfinished run, a value model, an adapter of another base or with settings that are not supported,
    and where the base is not to be found.
    """
    adapter = adapters.locate(settings.adapter)
    run = adapters.run_of(adapter)
    _refuse_unfinished(run)
    _refuse_value_model(adapter)
    record = read_provenance(run) or {}
    run = run if record else adapter  # a plain PEFT adapter whose folder happens to be called `adapter`
    model, base = _base(settings, run, adapter, record)
    config, base_hash = read_config(model), weights_hash(base)
    adapters.check_before_load(settings.adapter, None, model, base_hash, config)
    saved = adapters.read(settings.adapter, model, base_hash)
    renderer, context = _renderer(settings, model, record, run)
    kind: adapters.Kind = "reward" if saved.config.task_type == "SEQ_CLS" else "policy"
    own = own_dtype(config, base)
    return Source(run, adapter, kind, model, base, base_hash, config, saved, record, renderer, own, context)


def _renderer(settings: ExportSettings, model: str, record: dict[str, Any], run: Path) -> tuple[Renderer, int]:
    """The base's tokenizer with the template and the thinking switch that the run was trained with; its context."""
    tokenizer, context = read_tokenizer(model)
    trained = record.get("config") or {}
    thinking, unasked = settings.thinking, settings.thinking is None or from_preset(settings, "thinking")
    if unasked and (thinking is None or trained.get("thinking") is not None):
        thinking = trained.get("thinking")
    renderer = Renderer(
        tokenizer,
        chat_template=settings.chat_template or _trained_template(record, tokenizer, run),
        max_length=min(_length(trained.get("max_length"), context), context),
        thinking=thinking,
        thinking_if_possible=unasked,
    ).with_prefix(adapters.answer_prefix(run))
    if record.get("template_hash") not in (None, renderer.template_hash()) and settings.chat_template is None:
        log.warning("%s: the chat template is no longer the one that %s was trained with", model, run)
    return renderer, context


def _trained_template(record: dict[str, Any], tokenizer: Any, run: Path) -> str | None:
    """The template on record. A file only with the text that the record has the hash of: it names any of the user's,
    and what it holds is published."""
    named, own = (record.get("config") or {}).get("chat_template"), tokenizer.chat_template
    if not isinstance(named, str):
        return None
    if named == "plain" or (isinstance(own, dict) and named in own):
        return named
    try:
        found = hashlib.sha256(read_template(Path(named).expanduser()).encode()).hexdigest()
    except (OSError, ValueError):
        found = None
    if found is None or found != record.get("template_hash"):
        raise UserError(f"{run}: its chat template {named} is gone or has changed since; name one with --chat-template")
    return named


def _length(recorded: Any, context: int) -> int:
    return recorded if type(recorded) is int and recorded > 1 else context


def own_dtype(config: Any, folder: Path) -> torch.dtype:
    """The precision a model is kept in: what its config says, else what most of its first weight file is."""
    said = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(said, str):
        said = getattr(torch, said, None)
    if said is None:
        with safe_open(sorted(folder.glob("*.safetensors"))[0], framework="pt") as file:
            kinds = [file.get_slice(key).get_dtype() for key in file.keys()]  # noqa: SIM118 - not a mapping
        said = HEADER_DTYPES.get(max(set(kinds), key=kinds.count))
    if said not in NAMES:
        raise UserError(f"{folder}: its weights are of type {said}; only bf16, fp16 and fp32 ones can be merged")
    found: torch.dtype = said
    return found


def _refuse_unfinished(run: Path) -> None:
    state = read_state(run)
    if state is not None and state["state"] != "finished":
        how = "still running" if state["state"] == "running" else f"stopped at step {state.get('steps')}"
        raise UserError(f"{run}: not finished ({how}); --resume it first")


def _refuse_value_model(adapter: Path) -> None:
    """A critic is saved as CAUSAL_LM with a head: it neither speaks nor ranks answers."""
    try:
        with safe_open(adapter / adapters.WEIGHTS, framework="pt") as file:
            has_head = any(key.endswith(adapters.HEAD) for key in file.keys())  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{adapter / adapters.WEIGHTS}: cannot be read ({error}); the file is damaged") from error
    task = adapters.read_config(adapter).get("task_type")
    if has_head and task != "SEQ_CLS":
        raise UserError(f"{adapter}: is a value model, of use to PPO alone; export the run it lies in")


def _base(settings: ExportSettings, run: Path, adapter: Path, record: dict[str, Any]) -> tuple[str, Path]:
    """The base's name and folder: the one given, else the one on record."""
    if settings.model is not None:
        return settings.model, model_folder(settings.model)
    config = adapters.read_config(adapter)
    named = record.get("base") or config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{run}: does not name its base; give it with --model")
    try:
        return str(named), model_folder(str(named))
    except EnvironmentProblem:
        raise
    except UserError as error:
        raise UserError(f"{run}: its base is not found ({error}); give it with --model") from error
