"""A model built without weights, from its config alone: which linear layers it has, and how large everything is."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank_align.architecture import NEEDED, Architecture, Linear, UnknownFigures, figures_of
from lowrank_align.errors import UserError
from lowrank_align.loading import language_model
from lowrank_align.remote_code import is_trusted

RENAMED = (*NEEDED, "num_key_value_heads", "max_position_embeddings", "head_dim", "sliding_window", "layer_types")


def linear_layers(config: Any) -> list[str]:
    """The names of the layers that can have an adapter."""
    try:
        return [name for name, module in _skeleton(config).named_modules() if isinstance(module, nn.Linear | Conv1D)]
    except ValueError as error:
        raise UserError(f"a {config.model_type} is no causal language model; give one as --model") from error


def stated_figures(config: Any, name: str, **measured: int) -> Architecture:
    """The figures that a model's config states, by whichever names its family has for them (GPT-2's `n_embd`).

    `measured` stands in for those that it does not state. UnknownFigures naming what is lacking.
    """
    config, _ = language_model(config)
    values = config.to_dict() | measured
    for key in RENAMED:
        try:
            found = getattr(config, key, None)
        except Exception:  # some families refuse to name what differs between their layers
            continue
        if found is not None and not (key in measured and isinstance(found, list | tuple)):
            values[key] = found
    return figures_of(values, name)


def measure(config: Any, name: str) -> Architecture:
    """The figures of a model, its layers and weights counted rather than taken from a formula.

    UnknownFigures naming what its config lacks, or where the model cannot be built without weights.
    """
    try:
        model = _skeleton(config)
    except Exception as error:  # what a family's own code makes of tensors without numbers is anything
        what = f"the family {config.model_type} cannot be built without its weights"
        raise UnknownFigures(f"{name}: {what}, so its memory cannot be planned") from error
    tables = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    sizes: Counter[tuple[str, int, int]] = Counter()
    counted = 0
    for path, module in model.named_modules():
        if id(module) in tables:
            counted += module.weight.numel() if id(module) == id(model.get_input_embeddings()) else 0
        elif isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            inputs, outputs = (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
            sizes[(path.rsplit(".", 1)[-1], inputs, outputs)] += 1
            counted += module.weight.numel()
    widest = max((inputs for _, inputs, _ in sizes), default=0)  # what the last layer of an MLP reads
    figures = stated_figures(config, name, intermediate_size=widest)
    if not figures.tie_word_embeddings:
        counted += model.get_output_embeddings().weight.numel()
    linears = tuple(Linear(*size, layers) for size, layers in sizes.items())
    every = sum(parameter.numel() for parameter in model.parameters())
    return figures.model_copy(update={"linears": linears, "other_parameters": every - counted})


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            language_model(config)[0], trust_remote_code=is_trusted(config.name_or_path)
        )
