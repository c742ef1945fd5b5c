"""How much memory a run needs at its peak, part by part, and which settings would fit. Plain arithmetic, no torch.

Each term is what one place of the code allocates, counted from the tensors that autograd keeps (docs/log.md has the
measurements). A run has phases that are not in memory at once: a training pass (forward, scoring, backward) and, where
answers are sampled, the rollouts. The plan is the larger one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any, Literal

from lowrank_align.architecture import Architecture, Linear
from lowrank_align.config import TrainSettings
from lowrank_align.errors import UserError, nearest

GIB = 2**30
UNITS = {"gib": 2**30, "gb": 10**9, "g": 2**30, "mib": 2**20, "mb": 10**6, "m": 2**20, "b": 1}
CARDS_GIB = (6, 8, 12, 16, 24, 48)  # what gaming and workstation cards have

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # an 8-bit scale per 64 weights, an fp32 one per 256 scales
QUANTISED_BYTES = {"nf4": NF4_BYTES, "int8": 1.0}
LORA_BYTES = 4  # adapters are fp32 whatever the base computes in
ADAMW_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0 + 8 / 256,
    "paged_adamw_8bit": 0.0,
}  # paged ones go to the host
CHUNK_BYTES = 64 * 2**20  # scoring.CHUNK_BYTES, which a test compares with this
CHUNK_COPIES = 5  # logits, their softmax, the entropy's product and the two gradients, at the backward's peak
LOGITS_COPIES = 5  # a decoding step's logits: the model's, fp32, tempered, noise, noisy
GPU_CONTEXT_BYTES = int(0.5 * GIB)  # CUDA's own: context, kernels, workspaces of the matrix libraries
GPU_SLACK = 0.05  # of what comes and goes: the allocator's rounding and gaps
WORKSPACE_BYTES = 32 * 2**20  # cuBLAS's, which torch counts as allocated
CPU_OVERHEAD_BYTES = 62 * 10**6  # beside a process's tensors: code paged in, the matrix library's buffers
OWN_PAGES_FROM_BYTES = 2**20  # memory.OWN_PAGES_FROM_BYTES; smaller tensors lie in the C library's heap,
HEAP_GAPS = 1.0  # whose gaps take as much again as the tensors

TRAINING = ("sft", "reward", "dpo", "ppo", "grpo")
ROLLING = ("ppo", "grpo", "chat")  # these sample answers
SCORING = ("sft", "dpo", "ppo", "grpo")  # these put completion tokens through the head
SHORTEST_TOKENS = 128  # the planner suggests no shorter length


@dataclass(frozen=True)
class Workload:
    """What is to be run, as far as memory is concerned."""

    method: str
    quantize: str = "nf4"
    dtype: str = "bf16"
    device: Literal["gpu", "cpu"] = "gpu"
    rank: int = 16
    target_modules: tuple[str, ...] = ()  # by name; none: every linear layer
    micro_batch_size: int = 2
    prompt_tokens: int = 512  # of the longest row
    completion_tokens: int = 512  # of each of its completions
    completions: int = 1  # a row's: 1 a demonstration or rollout, 2 a pair
    max_new_tokens: int = 0
    rollout_batch_size: int = 1
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    adapters: int = 1  # all that lie in memory, frozen ones too
    trained_adapters: int = 1
    layout: Literal["tree", "flat"] = "tree"

    @property
    def max_length(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        if self.layout == "flat":
            return self.micro_batch_size * self.completions * self.max_length
        return self.micro_batch_size * (self.prompt_tokens + self.completions * self.completion_tokens)

    @property
    def row_tokens(self) -> int:
        """The length of one row of the batch, whose square the attention mask has."""
        return self.tokens // (self.micro_batch_size * (self.completions if self.layout == "flat" else 1))

    @property
    def scored_tokens(self) -> int:
        return self.micro_batch_size * self.completions * self.completion_tokens


@dataclass(frozen=True)
class Parts:
    """Bytes of one phase, by what they hold."""

    weights: int
    """Linear layers, packed where they are quantised, and what quantisation leaves alone: norms, experts."""
    embeddings_and_head: int
    adapters: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """What the backward pass needs of the forward pass, and the layer that is being worked on."""
    scoring_chunk: int = 0
    kv_cache: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Prediction:
    """Peak memory of a workload, phase by phase."""

    phases: dict[str, Parts]
    allocated_bytes: int
    """Without what a GPU's driver and allocator take: `torch.cuda.max_memory_allocated`. On CPUs the same as total."""

    @property
    def peak(self) -> str:
        """The name of the phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def total_bytes(self) -> int:
        return self.phases[self.peak].total


@dataclass(frozen=True)
class Plan:
    """Whether a workload fits into a budget, and the nearest one that does."""

    asked: Workload
    prediction: Prediction
    budget_bytes: int
    chosen: Workload | None  # the same where it fits, None where nothing does
    chosen_prediction: Prediction | None
    changes: dict[str, Any] = field(default_factory=dict)  # settings in which chosen differs, by their names
    least_bytes: int = 0  # the peak of the smallest workload that was tried

    @property
    def fits(self) -> bool:
        return self.prediction.total_bytes <= self.budget_bytes


def predict(architecture: Architecture, work: Workload) -> Prediction:
    """Peak memory of `work` on a model with these figures."""
    resident = _resident(architecture, work)
    phases = {}
    if work.method in TRAINING:
        phases["training"] = replace(resident, **_training(architecture, work))
    if work.method in ROLLING:
        phases["rollouts" if work.method in TRAINING else "answering"] = replace(
            resident, **_rollouts(architecture, work)
        )
    allocated = max(parts.total for parts in phases.values()) + WORKSPACE_BYTES
    for name, parts in phases.items():
        passing = parts.activations + parts.scoring_chunk + parts.kv_cache
        if work.device == "gpu":
            overhead = GPU_CONTEXT_BYTES + WORKSPACE_BYTES + int(GPU_SLACK * passing)
        else:
            small = work.tokens * architecture.hidden_size * DTYPE_BYTES[work.dtype] < OWN_PAGES_FROM_BYTES
            overhead = CPU_OVERHEAD_BYTES + int(HEAP_GAPS * passing if small else 0)
        phases[name] = replace(parts, overhead=overhead)
    if work.device == "cpu":
        allocated = max(parts.total for parts in phases.values())
    return Prediction(phases, allocated)


def fit(architecture: Architecture, work: Workload, budget_bytes: int) -> Plan:
    """The workload as asked where it fits, else the nearest that does: first what costs least in speed, length last."""
    prediction = predict(architecture, work)
    least = prediction.total_bytes
    for candidate in _nearest_first(work):
        found = predict(architecture, candidate)
        least = min(least, found.total_bytes)
        if found.total_bytes <= budget_bytes:
            return Plan(work, prediction, budget_bytes, candidate, found, _changes(work, candidate), least)
    return Plan(work, prediction, budget_bytes, None, None, {}, least)


def cards(architecture: Architecture, work: Workload) -> dict[int, Plan]:
    """The plan for every usual size of card, by its GiB."""
    return {gib: fit(architecture, work, gib * GIB) for gib in CARDS_GIB}


# ---- what stays


def _resident(a: Architecture, w: Workload) -> Parts:
    size = DTYPE_BYTES[w.dtype]
    linear = sum(layer.parameters for layer in a.linear_layers())
    per_weight = QUANTISED_BYTES.get(w.quantize, size)
    tables = 1 if a.tie_word_embeddings else 2
    adapter = adapter_parameters(a, w)
    trained = adapter * w.trained_adapters
    return Parts(
        weights=int(linear * per_weight) + a.kept_parameters() * size,
        embeddings_and_head=tables * a.vocab_size * a.hidden_size * size,
        adapters=adapter * w.adapters * LORA_BYTES,
        gradients=trained * LORA_BYTES if w.method in TRAINING else 0,
        optimizer=int(trained * ADAMW_BYTES[w.optimizer]) if w.method in TRAINING else 0,
    )


def adapter_parameters(a: Architecture, w: Workload) -> int:
    """Weights of one adapter: A and B of every adapted layer."""
    return sum(w.rank * (layer.inputs + layer.outputs) * layer.layers for layer in _adapted(a, w))


def _adapted(a: Architecture, w: Workload) -> list[Linear]:
    return [layer for layer in a.linear_layers() if not w.target_modules or layer.name in w.target_modules]


# ---- a training pass


def _training(a: Architecture, w: Workload) -> dict[str, int]:
    size, tokens, h = DTYPE_BYTES[w.dtype], w.tokens, a.hidden_size
    mask = 0 if w.layout == "flat" else tokens * w.row_tokens * (size + 1)
    kept_per_token = _kept_per_token(a, w)
    if w.gradient_checkpointing:
        kept = a.num_hidden_layers * h * size * tokens
        layer = (kept_per_token // a.num_hidden_layers + _layer_transient(a, size, recomputed=True)) * tokens
    else:
        kept = kept_per_token * tokens
        layer = _layer_transient(a, size, recomputed=False) * tokens
    ends = tokens * h * (4 + size) + w.scored_tokens * h * (4 + size)  # the last norm, and the states that are scored
    chunk = _chunk_bytes(a, w) * CHUNK_COPIES if w.method in SCORING else 0
    unpacked = _unpacked_bytes(a, w)
    # The head's backward comes first, then that of the layers: they are not in memory together.
    working, scoring = (layer + unpacked, 0) if layer + unpacked >= chunk else (0, chunk)
    return {"activations": kept + mask + ends + working, "scoring_chunk": scoring}


def _kept_per_token(a: Architecture, w: Workload) -> int:
    """Bytes that autograd keeps of every token, of all layers."""
    size, h, q, kv = DTYPE_BYTES[w.dtype], a.hidden_size, a.query_width, a.key_value_width
    count = a.num_hidden_layers
    norms = 4 * (a.norms_per_layer * h + (q + kv if a.normalises_queries else 0))  # in fp32, whatever the precision
    attention = 4 * q * size + 4 * a.num_attention_heads  # query, key and value for every head, output; the log-sums
    width = _mlp_width(a)
    return count * (norms + attention + 3 * width * size) + _lora_inputs(a, w)


def _lora_inputs(a: Architecture, w: Workload) -> int:
    """What the gradients of A and B need: the inputs of every adapted layer. A frozen layer keeps nothing.

    In 16 bits each adapter casts its input for itself; in fp32 layers that read the same tensor share it, and the
    attention's output and the last layer's input are there already or only once.
    """
    size = DTYPE_BYTES[w.dtype]
    adapted = _adapted(a, w)
    rank = sum(w.rank * layer.layers for layer in adapted) * size
    if size == 2:
        return rank + sum(layer.inputs * layer.layers for layer in adapted) * size
    shared: dict[tuple[str, int], int] = {}
    for layer in adapted:
        shared[(_reads(layer.name), layer.inputs)] = layer.inputs * layer.layers
    return rank + sum(shared.values()) * size - a.query_width * a.num_hidden_layers * size * _adapts_output(adapted)


def _reads(name: str) -> str:
    """Which tensor a layer reads: layers with the same answer share it."""
    groups = {"attention": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "mlp": ("gate_proj", "up_proj", "gate_up_proj")}
    return next((group for group, names in groups.items() if name in names), name)


def _adapts_output(adapted: list[Linear]) -> bool:
    return any(layer.name == "o_proj" for layer in adapted)


def _layer_transient(a: Architecture, size: int, *, recomputed: bool) -> int:
    """Bytes a token that the layer being worked on needs beside what is kept: gradients, casts, products."""
    h, width = a.hidden_size, _mlp_width(a)
    if recomputed:
        return int(10.5 * width) if size == 4 else 8 * width + 10 * h
    return max(8 * width + 4 * h, 24 * h) if size == 4 else max(6 * width + 10 * h, 22 * h)


def _mlp_width(a: Architecture) -> int:
    """The width that a token passes through: a dense MLP's, or that of its experts together."""
    return a.num_experts_per_tok * a.moe_intermediate_size if a.num_experts else a.intermediate_size


def _unpacked_bytes(a: Architecture, w: Workload) -> int:
    """The largest linear layer as a matrix product takes it, while its product is computed."""
    if w.quantize == "none":
        return 0
    return max(layer.inputs * layer.outputs for layer in a.linear_layers()) * DTYPE_BYTES[w.dtype]


def _chunk_bytes(a: Architecture, w: Workload) -> int:
    """One chunk's fp32 logits (`scoring.token_scores`)."""
    rows = max(1, CHUNK_BYTES // (4 * a.vocab_size))
    return min(rows, w.scored_tokens) * 4 * a.vocab_size


# ---- rollouts


def _rollouts(a: Architecture, w: Workload) -> dict[str, int]:
    """The larger of the prefill, when all prompts go through a layer, and the last step, when the cache is full."""
    size, batch = DTYPE_BYTES[w.dtype], w.rollout_batch_size
    prompts = ceil(batch / w.completions) if w.method == "grpo" else batch
    per_token = 16 * (_mlp_width(a) + a.hidden_size) if size == 4 else int(8.5 * _mlp_width(a) + 13 * a.hidden_size)
    prefill = prompts * w.prompt_tokens * per_token + _unpacked_bytes(a, w)
    logits = batch * a.vocab_size * 4 * LOGITS_COPIES
    growing = cache_bytes(a, 1, w.prompt_tokens + w.max_new_tokens, size) * batch // max(1, a.num_hidden_layers)
    first = cache_bytes(a, prompts, w.prompt_tokens, size), prefill
    last = cache_bytes(a, batch, w.prompt_tokens + w.max_new_tokens, size), logits + growing + _unpacked_bytes(a, w)
    cache, working = max(first, last, key=sum)
    return {"kv_cache": cache, "activations": working}


def cache_bytes(a: Architecture, batch: int, tokens: int, size: int) -> int:
    """Keys and values of `batch` sequences; layers with a window hold no more than that."""
    full, windowed = a.caching_layers
    held = full * tokens + windowed * min(tokens, a.sliding_window or tokens)
    return batch * held * 2 * a.key_value_width * size


# ---- fitting


def _nearest_first(work: Workload) -> Iterator[Workload]:
    """Ever smaller workloads: rollouts at once, rows at once, recomputation, 8-bit states, and shorter rows at last."""
    yield work
    training = work.method in TRAINING
    lengths = [work.max_length]
    while lengths[-1] // 2 >= SHORTEST_TOKENS:
        lengths.append(lengths[-1] // 2)
    steps = [(work.gradient_checkpointing, work.optimizer)]
    steps += [(True, work.optimizer)] if training and not work.gradient_checkpointing else []
    if training and work.device == "gpu" and work.optimizer == "adamw":
        steps += [(True, "adamw_8bit")]
    for length in lengths:
        for checkpointing, optimizer in steps:
            for rows in _halved(work.micro_batch_size):
                for rollouts in _halved(work.rollout_batch_size) if work.method in ROLLING else [1]:
                    yield replace(
                        shortened(work, length), micro_batch_size=rows, gradient_checkpointing=checkpointing,
                        optimizer=optimizer, rollout_batch_size=rollouts,
                    )  # fmt: skip


def shortened(work: Workload, max_length: int) -> Workload:
    """The same with rows of at most `max_length` tokens, prompt and completion cut alike."""
    share = max_length / work.max_length
    if share >= 1:
        return work
    completion = max(1, int(work.completion_tokens * share))
    return replace(
        work,
        completion_tokens=completion,
        prompt_tokens=max(1, max_length - completion),
        max_new_tokens=min(work.max_new_tokens, completion) if work.max_new_tokens else 0,
    )


def _halved(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _changes(asked: Workload, chosen: Workload) -> dict[str, Any]:
    names = ("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "optimizer", "max_length")
    found = {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(asked, name)}
    if asked.max_new_tokens != chosen.max_new_tokens:
        found["max_new_tokens"] = chosen.max_new_tokens
    return found


# ---- from settings, and into words


def workload(
    settings: TrainSettings,
    *,
    device: Literal["gpu", "cpu"],
    dtype: str,
    prompt_tokens: int,
    completion_tokens: int,
    completions: int = 1,
    layout: Literal["tree", "flat"] = "tree",
) -> Workload:
    """What a run with these settings has in memory, the longest row having so many tokens."""
    reward = getattr(settings, "reward", None)
    is_ppo, judged = settings.method == "ppo", reward is not None and ":" not in reward
    has_reference = settings.method in ("dpo", "ppo", "grpo") and settings.adapter is not None
    trained = 2 if is_ppo else 1
    return Workload(
        method=settings.method,
        quantize=settings.quantize,
        dtype=dtype,
        device=device,
        rank=settings.rank,
        target_modules=tuple(settings.target_modules or ()),
        micro_batch_size=settings.micro_batch_size,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        completions=completions,
        max_new_tokens=getattr(settings, "max_new_tokens", 0),
        rollout_batch_size=min(getattr(settings, "rollout_batch_size", 1), settings.batch_size),
        gradient_checkpointing=settings.gradient_checkpointing,
        optimizer=settings.optimizer,
        adapters=trained + has_reference + judged,
        trained_adapters=trained,
        layout=layout,
    )


def size_bytes(text: str) -> int:
    """The bytes in a text like 12GiB, 12GB, 12 or 900MiB (a plain number is GiB)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2] if match else "").lower() or "gib"
    if match is None or unit not in UNITS or float(match[1]) == 0:
        raise UserError(f"gpu: {text!r} is no size of memory{nearest(unit, UNITS)}; give it as 12GiB")
    return int(float(match[1]) * UNITS[unit])


def gib(size: int) -> str:
    """Bytes as `11.2 GiB`; small ones with the digits that matter."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / GIB:.2f} GiB"


def parameters_in_words(count: int) -> str:
    """A number of parameters as people say it: 8.2 B, 134 M."""
    return (
        f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.2f} M"
    )


def in_one_line(plan: Plan) -> str:
    """`plan: 9.1 GiB of 11.5 GiB (weights 5.6, ...)`, the largest parts first."""
    parts = asdict(plan.prediction.phases[plan.prediction.peak])
    largest = sorted(parts, key=lambda name: -parts[name])[:4]
    shown = ", ".join(f"{name.replace('_', ' ')} {parts[name] / GIB:.2f}" for name in largest if parts[name])
    total, budget = gib(plan.prediction.total_bytes), gib(plan.budget_bytes)
    return f"plan: {total} of {budget} at the peak ({plan.prediction.peak}: {shown})"


def as_flags(changes: Mapping[str, Any]) -> str:
    """Settings as the command line has them."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)
