"""A model built without weights, from its config alone: which linear layers it has, and how large everything is."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank_align.architecture import Architecture, Linear, figures_of
from lowrank_align.errors import UserError
from lowrank_align.loading import language_model


def linear_layers(config: Any) -> list[str]:
    """The names of the layers that can have an adapter."""
    return [name for name, module in _skeleton(config).named_modules() if isinstance(module, nn.Linear | Conv1D)]


def measure(config: Any, name: str) -> Architecture:
    """The figures of a model, its layers and weights counted rather than taken from a formula.

    UserError naming what its config lacks.
    """
    config, _ = language_model(config)
    figures = figures_of(config.to_dict(), name)
    model = _skeleton(config)
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
    if not figures.tie_word_embeddings:
        counted += model.get_output_embeddings().weight.numel()
    linears = tuple(Linear(*size, layers) for size, layers in sizes.items())
    every = sum(parameter.numel() for parameter in model.parameters())
    return figures.model_copy(update={"linears": linears, "other_parameters": every - counted})


def _skeleton(config: Any) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(language_model(config)[0])
    except ValueError as error:
        raise UserError(f"a {config.model_type} is no causal language model; give one as --model") from error
