"""What every group of settings is made of: the types of the knobs, the model, and where its rows come from."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]  # well within 32 bits
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take


class Settings(BaseModel):
    """A group of knobs. Unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


class ModelSettings(Settings):
    """Which base, and how it lies in memory."""

    model: str
    """The base: a model folder, a hub id, or `tiny`. A preset names one."""
    preset: str | None = None
    """Settings that are known to work for a model, by name or as a .yaml file (`lowrank-align presets` lists them)."""
    adapter: str | None = None
    """The run (or PEFT adapter folder) to start from; without it, the bare base."""
    quantize: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen weights are kept: 4-bit NF4 with double quantisation, 8-bit, or as they are."""
    device: str = "auto"
    """auto (first GPU, else CPU), cpu, cuda, cuda:N, xpu or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What to compute in. auto: bf16 where the GPU has it, fp16 on older ones, fp32 on CPU."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """The attention implementation of transformers."""
    chat_template: str | None = None
    """A .jinja file, or the name of one of the tokenizer's templates, in place of the model's own."""
    thinking: bool | None = None
    """Let the model think before it answers, where its chat template has a switch; else as preset or template say."""
    max_length: Positive = 1024
    """Longest prompt + completion in tokens (at most the model's context); longer completions are cut."""
    seed: Seed = 0
    """Seeds the order of rows, new adapters, rollouts and samples."""


def kinds(annotation: Any) -> list[Any]:
    """The plain types in a knob's annotation: `int | None` -> [int], `list[str]` -> [list]; a Literal stays whole."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) if part is not NoneType for kind in kinds(part)]
    if hasattr(annotation, "__metadata__"):
        return kinds(get_args(annotation)[0])
    return [annotation if origin is None or origin is Literal else origin]
