"""The models that an export is compared with, one in memory at a time, and the exported one in plain transformers."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from lowrank_align.base import Base
from lowrank_align.devices import pick_device
from lowrank_align.errors import NumericError
from lowrank_align.evaluate.precision import fp32_arithmetic
from lowrank_align.export.companions import classifier_pad
from lowrank_align.export.source import NAMES, Source
from lowrank_align.loading import load_frozen

ROLE = "adapter"
HEADROOM = 1.3  # what a forward pass takes beside the weights, generously


@contextmanager
def reference(source: Source, device: str, nf4: bool) -> Iterator[Base]:
    """Base + adapter, unmerged, in fp32 arithmetic: on the base's own weights or, with `nf4`, on those as trained."""
    _let_go()
    if nf4:
        base = Base.load(source.model, quantize="nf4", device=device, dtype="fp32")
        base.add_role(ROLE, start_from=source.adapter, trainable=False)
        base.model.eval()
        yield base
    else:
        loaded = load_frozen(source.model, quantize="none", device=device, dtype=NAMES[source.own_dtype])
        with fp32_arithmetic(loaded.model):
            base = Base(replace(loaded, compute_dtype=torch.float32))
            base.add_role(ROLE, start_from=source.adapter, trainable=False)
            base.model.eval()
            yield base


@contextmanager
def as_trained(source: Source, device: str) -> Iterator[Base]:
    """The policy (or reward model) exactly as it was trained: its quantisation, its arithmetic."""
    _let_go()
    quantize = source.trained_with or "nf4"
    base = Base.load(source.model, quantize=quantize, device=device, dtype=source.trained_dtype)
    base.add_role(ROLE, start_from=source.adapter, trainable=False)
    base.model.eval()
    yield base


@contextmanager
def exported(source: Source, folder: Path, device: str, *, adapter: bool) -> Iterator[Any]:
    """What lies in `folder`, as its users load it: with transformers alone, or an `adapter` with PEFT.

    NumericError where weights are missing.
    """
    _let_go()
    where = pick_device(device)
    with _quiet():
        model = _with_peft(source, folder) if adapter else _plain(source, folder)
    model = model.to(where).eval()
    yield model


def place_for(source: Source, device: str) -> str:
    """The device to compare on: the one asked for, or the CPU where 16-bit weights do not fit into the GPU."""
    where = pick_device(device)
    if where.type != "cuda":
        return str(where)
    needed = sum(file.stat().st_size for file in source.base.glob("*.safetensors")) * HEADROOM
    return str(where) if torch.cuda.mem_get_info(where)[0] >= needed else "cpu"


def _plain(source: Source, folder: Path) -> Any:
    family = AutoModelForSequenceClassification if source.kind == "reward" else AutoModelForCausalLM
    model, info = family.from_pretrained(folder, dtype="auto", output_loading_info=True, trust_remote_code=False)
    if info["missing_keys"] or info["mismatched_keys"]:
        first = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])[0]
        raise NumericError(f"the export is not whole: transformers finds no weights for {first}")
    return model


def _with_peft(source: Source, folder: Path) -> Any:
    dtype = source.own_dtype
    if source.kind == "reward":
        pad = classifier_pad(source)
        model = AutoModelForSequenceClassification.from_pretrained(
            source.base, num_labels=1, pad_token_id=pad, dtype=dtype, trust_remote_code=False
        )
    elif source.renamed:
        model = load_frozen(source.model, quantize="none", device="cpu", dtype=NAMES[dtype]).model
    else:
        model = AutoModelForCausalLM.from_pretrained(source.base, dtype=dtype, trust_remote_code=False)
    return PeftModel.from_pretrained(model, str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the talk of a head that is not in the base's files."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _let_go() -> None:
    """What was there before; a base and its hooks hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
