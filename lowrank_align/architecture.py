"""A model's figures, as its `config.json` has them: what a preset states and a plan counts with. No torch here."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowrank_align.errors import UserError

NEEDED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
FUSED = ("phi3",)  # query, key and value in one layer, gate and up in another
NORMALISE_QUERIES = ("qwen3", "qwen3_moe", "qwen3_5_text", "gemma3_text", "gemma4_text", "olmo2", "olmo3")
FOUR_NORMS = ("gemma2", "gemma3_text", "gemma4_text")  # before and after each half of a layer; elsewhere two
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
RECURRENT = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")  # layer types with a state instead of a cache

# Far above any model there is: a figure beyond them is a slip, and what is computed from it means nothing.
Size = Annotated[int, Field(gt=0, le=2**24)]  # a width, a vocabulary, a number of heads
Layers = Annotated[int, Field(ge=0, le=10_000)]
Count = Annotated[int, Field(ge=0, le=100_000)]
Tokens = Annotated[int, Field(gt=0, le=2**31)]  # 2^31: a model that states no limit


class UnknownFigures(UserError):
    """A model's config lacks figures without which its memory cannot be planned."""


class Linear(NamedTuple):
    """A linear layer of the decoder blocks, by its last name."""

    name: str
    inputs: Size
    outputs: Size
    layers: Annotated[int, Field(gt=0, le=10**7)]  # how many of its size the model has

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs * self.layers


class Architecture(BaseModel):
    """The figures of a causal decoder, under transformers' names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers = Field(gt=0)
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Size
    tie_word_embeddings: bool
    max_position_embeddings: Tokens
    sliding_window: Tokens | None = None
    """How far back the layers with a window see; their cache holds no more."""
    sliding_layers: Layers = 0
    """How many layers have that window."""
    recurrent_layers: Layers = 0
    """How many layers keep a state instead of a cache (gated delta nets, mamba, convolutions): these need flat rows."""
    hybrid_layers: Layers = 0
    """How many layers keep both, a state and a cache: these need flat rows, too."""
    num_experts: Count = 0
    """Experts a layer, as 3-D tensors that quantisation leaves alone; 0 for a dense model."""
    num_experts_per_tok: Count = 0
    """Experts that each token goes through."""
    moe_intermediate_size: int = Field(default=0, ge=0, le=2**24)
    """An expert's width."""
    linears: tuple[Linear, ...] = ()
    """The linear layers, where they are not those of a Llama (or, fused, of a Phi-3)."""
    other_parameters: int | None = Field(default=None, ge=0, le=10**14)
    """Weights beside linear layers, embeddings and head (experts, convolutions), where not just Llama's norms."""
    config: dict[str, bool | int | float | str | list[str] | None] = {}
    """What else transformers' config class needs to build the family."""

    @model_validator(mode="after")
    def _possible(self) -> "Architecture":
        layers = self.num_hidden_layers
        if self.sliding_layers and self.sliding_window is None:
            raise ValueError(f"sliding_layers is {self.sliding_layers}, but there is no sliding_window")
        for name in ("sliding_layers", "recurrent_layers", "hybrid_layers"):
            if (count := getattr(self, name)) > layers:
                raise ValueError(f"{name} is {count}, but num_hidden_layers {layers}")
        if self.sliding_layers + self.recurrent_layers > layers:
            raise ValueError(f"sliding_layers and recurrent_layers together are more than the {layers} layers")
        if self.num_experts_per_tok > self.num_experts > 0:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}, but num_experts {self.num_experts}")
        return self

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def norms_per_layer(self) -> int:
        return 4 if self.model_type in FOUR_NORMS else 2

    @property
    def normalises_queries(self) -> bool:
        """Whether queries and keys go through norms of their own."""
        return self.model_type in NORMALISE_QUERIES

    def linear_layers(self) -> tuple[Linear, ...]:
        """Every linear layer that quantisation packs and LoRA can adapt."""
        if self.linears:
            return self.linears
        h, q, kv, count = self.hidden_size, self.query_width, self.key_value_width, self.num_hidden_layers
        width = self.intermediate_size
        if self.model_type in FUSED:
            sizes = [("qkv_proj", h, q + 2 * kv), ("o_proj", q, h), ("gate_up_proj", h, 2 * width)]
        else:
            sizes = [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
            sizes += [("gate_proj", h, width), ("up_proj", h, width)] if not self.num_experts else []
        sizes += [("down_proj", width, h)] if not self.num_experts else []
        return tuple(Linear(*size, count) for size in sizes)

    def kept_parameters(self) -> int:
        """Weights beside linear layers, embeddings and head, which no quantisation touches."""
        if self.other_parameters is not None:
            return self.other_parameters
        experts = 3 * self.num_experts * self.moe_intermediate_size * self.hidden_size
        router = self.num_experts * self.hidden_size
        return self.num_hidden_layers * (2 * self.hidden_size + experts + router) + self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights; a head that is tied to the embeddings counts once."""
        tables = 1 if self.tie_word_embeddings else 2
        linear = sum(layer.parameters for layer in self.linear_layers())
        return tables * self.vocab_size * self.hidden_size + linear + self.kept_parameters()

    @property
    def needs_flat_rows(self) -> bool:
        """Whether a state runs through the rows, which no mask keeps out of where it does not belong."""
        return bool(self.recurrent_layers or self.hybrid_layers)

    @property
    def caching_layers(self) -> tuple[int, int]:
        """Layers whose cache holds every token, and layers whose cache ends with the window."""
        full = self.num_hidden_layers - self.recurrent_layers - self.sliding_layers
        return full, self.sliding_layers


def figures_of(config: Mapping[str, Any], name: str) -> Architecture:
    """The figures in a `config.json`. UnknownFigures naming what it lacks or what is no decoder's."""
    try:
        return _read(config, name)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"])) or first["msg"].removeprefix("Value error, ")
    except (ArithmeticError, AttributeError, TypeError, ValueError):  # text for a number, a number for a list
        what = "a value of another kind than a decoder's"
    raise UnknownFigures(f"{name}: its config.json has impossible figures ({what}), so its memory cannot be planned")


def _read(config: Mapping[str, Any], name: str) -> Architecture:
    values = dict(config) | dict(config.get("text_config") or {})  # a model that also sees keeps them one level down
    lacking = [key for key in NEEDED if not values.get(key) or not isinstance(values[key], int | str)]
    if lacking:  # a figure a layer is none, either
        what = f"its config.json gives no figure for {', '.join(lacking)}"
        raise UnknownFigures(f"{name}: {what}, so its memory cannot be planned")
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    types = list(values.get("layer_types") or [])
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    windowed = types.count("sliding_attention") if types else values["num_hidden_layers"]
    experts = next((int(values[key]) for key in EXPERT_COUNTS if values.get(key)), 0)
    return Architecture(
        model_type=values["model_type"],
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        vocab_size=values["vocab_size"],
        tie_word_embeddings=bool(values.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        max_position_embeddings=values.get("max_position_embeddings") or 2**31,
        sliding_window=window or None,
        sliding_layers=windowed if window else 0,
        recurrent_layers=sum(types.count(kind) for kind in RECURRENT),
        hybrid_layers=types.count("hybrid"),
        num_experts=experts,
        num_experts_per_tok=values.get("num_experts_per_tok") or 0,
        moe_intermediate_size=values.get("moe_intermediate_size") or (values["intermediate_size"] if experts else 0),
    )
