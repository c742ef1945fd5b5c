"""The adapter into the base's weights: PEFT's own merge in fp32, one layer at a time, each rounded once.

Peak memory is the model in its own precision and one layer in fp32.
"""

import shutil
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from lowrank_align.adapters import HEAD, Saved, copy_into
from lowrank_align.errors import NumericError, UserError
from lowrank_align.export.source import NAMES

SHARD_SIZE = "5GB"
ADAPTER = "merged"

Tick = Callable[[int, int], None]  # how many layers of how many


@dataclass(frozen=True)
class Merged:
    """A plain transformers model with the adapter in its weights."""

    model: Any
    transposed: frozenset[str]  # layers that keep their weight as (inputs, outputs)


def quantised_layers(model: nn.Module) -> frozenset[str]:
    """The layers whose weights an NF4 model keeps packed, by their names in the plain model."""
    names = (name for name, module in model.named_modules() if isinstance(module, Linear4bit))
    return frozenset(name.removesuffix(".base_layer") for name in names)


def through_nf4(weight: Tensor, transposed: bool = False) -> Tensor:
    """The weight as an NF4 model sees it, in fp32; `transposed` ones are (inputs, outputs)."""
    rows = weight.T if transposed else weight  # bitsandbytes packs a GPT-2 layer the other way round
    packed = Params4bit(rows.float().contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed.to(weight.device)
    seen: Tensor = dequantize_4bit(packed.data, packed.quant_state)
    return seen.T.contiguous() if transposed else seen


def merge(
    model: Any,
    saved: Saved,
    dtype: torch.dtype,
    *,
    nf4: Collection[str] = (),
    tick: Tick | None = None,
) -> Merged:
    """Put `saved` into the weights of `model`, which becomes `dtype`.

    Layers named in `nf4` take the 4-bit weights of an NF4 model instead of their own. NumericError where a weight is
    not finite in `dtype`, UserError for an adapter on a head that is tied.
    """
    _refuse_tied_head(model, saved)
    own = model.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's talk of a GPT-2 layer's other orientation
        tuner = LoraModel(model, {ADAPTER: saved.config}, ADAPTER)  # type: ignore[no-untyped-call]
    parameters = {HEAD: nn.Parameter(torch.empty_like(saved.tensors[HEAD]))} if HEAD in saved.tensors else {}
    marker = f".{ADAPTER}.weight"
    for key, parameter in model.named_parameters():
        if key.endswith(marker) and ".lora_" in key:
            parameter.data = parameter.data.float()
            parameters[key.removesuffix(marker) + ".weight"] = parameter
    copy_into(saved, parameters)
    layers = {name: m for name, m in model.named_modules() if _to_settle(name, m, nf4)}
    transposed = frozenset(name for name, m in model.named_modules() if isinstance(_plain(m), Conv1D))
    for done, (name, module) in enumerate(layers.items()):
        _settle(module, name, dtype, own, name in nf4)
        if tick is not None:
            tick(done + 1, len(layers))
    plain = tuner.unload()
    for key, parameter in plain.named_parameters():
        if parameter.dtype == own and own != dtype:
            parameter.data = _rounded(parameter.data, dtype, key)
    plain.config.dtype = dtype
    return Merged(plain, transposed)


def empty_classifier(config: Any) -> Any:
    """A sequence classifier without weights; UserError for a family that has none."""
    try:
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"a {config.model_type} has no sequence-classification class in transformers, so its reward model "
            "cannot be merged; export it with --to adapter"
        ) from error
    return classifier


def as_classifier(merged: Merged, saved: Saved, dtype: torch.dtype, pad_id: int | None) -> Merged:
    """The merged model as a sequence classifier with the run's head; UserError for a family that has none."""
    causal, config = merged.model, merged.model.config
    config.num_labels, config.pad_token_id = 1, pad_id
    classifier = empty_classifier(config)
    prefix = classifier.base_model_prefix
    if type(getattr(classifier, prefix, None)) is not type(causal.base_model) or not hasattr(classifier, "score"):
        raise UserError(f"a {config.model_type} classifier is built another way than its language model; not merged")
    setattr(classifier, prefix, causal.base_model)
    classifier.score.weight = nn.Parameter(saved.tensors[HEAD].to(dtype), requires_grad=False)
    return Merged(classifier.eval(), merged.transposed)


def save(model: Any, folder: Path, max_shard_size: str = SHARD_SIZE, *, own_names: bool = False) -> None:
    """Write the weights as safetensors, in shards with an index where they are larger than `max_shard_size`.

    By the names that the base's files have; with `own_names` by the model's, for a part of one that also sees.
    transformers' `config.json` and `generation_config.json` come with them; `companions` replaces both.
    """
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not own_names)
    finally:
        transformers_logging.enable_progress_bar()
    for file in folder.glob("*.safetensors"):  # safetensors writes for the owner's eyes only
        shutil.copymode(folder / "config.json", file)


def _settle(module: nn.Module, name: str, dtype: torch.dtype, own: torch.dtype, nf4: bool) -> None:
    """One layer: its weight in fp32 (as NF4 has it, if so), the adapter added, rounded once."""
    weight = _weight(module)
    before = weight.data
    weight.data = through_nf4(before, isinstance(_plain(module), Conv1D)) if nf4 else before.float()
    if isinstance(module, LoraLayer):
        try:
            module.merge(safe_merge=True, adapter_names=[ADAPTER])  # type: ignore[operator]
        except ValueError as error:
            raise NumericError(f"{name}: not finite after merging; the adapter is damaged") from error
    weight.data = _rounded(weight.data, dtype if before.dtype == own else before.dtype, name)


def _rounded(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    found = weight.to(dtype)
    if not torch.isfinite(found).all():
        largest = weight.abs().max().item()
        raise NumericError(f"{name}: {largest:.3g} does not fit into {NAMES[dtype]}; take --dtype bf16 or fp32")
    return found


def _refuse_tied_head(model: Any, saved: Saved) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if f"{name}.lora_A.weight" in saved.tensors:
        raise UserError(
            f"{saved.folder}: adapts {name}, whose weights are the embeddings too; merging would change both, "
            "so export it with --to adapter"
        )


def _to_settle(name: str, module: nn.Module, nf4: Collection[str]) -> bool:
    """Whether a module is adapted, or a plain layer that NF4 packs; not a part of an adapted one."""
    return isinstance(module, LoraLayer) or (name in nf4 and isinstance(module, nn.Linear | Conv1D))


def _weight(module: Any) -> nn.Parameter:
    """What an adapted layer's difference is added to: mostly a layer's weight, of experts one of their parameters."""
    found: nn.Parameter = getattr(_plain(module), getattr(module, "parameter_name", "weight"))
    return found


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module
