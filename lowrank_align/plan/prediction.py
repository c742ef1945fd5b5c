"""How much memory a workload needs at its peak, part by part. Plain arithmetic, no torch.

Each term is what one place of the code allocates, counted from the tensors that autograd keeps (docs/log.md has the
measurements). A run has phases that are not in memory at once: a training pass (forward, scoring, backward) and, where
answers are sampled, the rollouts. The plan is the larger one.
"""

from dataclasses import asdict, dataclass, replace
from math import ceil

from lowrank_align.architecture import Architecture, Linear
from lowrank_align.plan.workload import Workload, rolls_out, speaks, trains

GIB = 2**30
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # an 8-bit scale per 64 weights, an fp32 one per 256 scales
QUANTISED_BYTES = {"nf4": NF4_BYTES, "int8": 1.0}
LORA_BYTES = 4  # adapters are fp32 whatever the base computes in
ADAMW_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 0.0}  # paged ones go to the host
CHUNK_BYTES = 64 * 2**20  # scoring.CHUNK_BYTES, which a test compares with this
CHUNK_COPIES = 3  # logits, their softmax (which becomes the gradient), the entropy's product
LOGITS_COPIES = 5  # a decoding step's logits: the model's, fp32, tempered, noise, noisy
GPU_CONTEXT_BYTES = int(0.5 * GIB)  # CUDA's own: context, kernels, workspaces of the matrix libraries
GPU_SLACK = 0.05  # of what comes and goes: the allocator's rounding and gaps
WORKSPACE_BYTES = 32 * 2**20  # cuBLAS's, which torch counts as allocated
CPU_OVERHEAD_BYTES = 62 * 10**6  # beside a process's tensors: code paged in, the matrix library's buffers
DENSE_COPIES_BYTES = 2**30  # lora.DENSE_COPIES_BYTES: up to here NF4 weights lie unpacked beside rollouts on a CPU
OWN_PAGES_FROM_BYTES = 2**22  # on a CPU, tensors of this size have pages of their own (memory.steady_heap)
HEAP_GAPS, HEAP_GAPS_RECOMPUTED = 0.45, 2.1  # smaller ones lie in the C heap: its gaps, of what comes and goes


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

    @property
    def passing(self) -> int:
        """What comes and goes with a step."""
        return self.activations + self.scoring_chunk + self.kv_cache


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


def predict(architecture: Architecture, work: Workload) -> Prediction:
    """Peak memory of `work` on a model with these figures."""
    resident = _resident(architecture, work)
    phases = {}
    if trains(work.method):
        phases["training"] = replace(resident, **_training(architecture, work))
    if rolls_out(work.method) and not work.samples_elsewhere:
        phases["rollouts" if trains(work.method) else "answering"] = replace(resident, **_rollouts(architecture, work))
    allocated = max(parts.total for parts in phases.values()) + WORKSPACE_BYTES
    for name, parts in phases.items():
        if work.device == "gpu":
            overhead = GPU_CONTEXT_BYTES + WORKSPACE_BYTES + int(GPU_SLACK * parts.passing)
        else:
            overhead = CPU_OVERHEAD_BYTES + int(_heap_gaps(architecture, work) * parts.passing)
        phases[name] = replace(parts, overhead=overhead)
    if work.device == "cpu":
        allocated = max(parts.total for parts in phases.values())
    return Prediction(phases, allocated)


def _heap_gaps(architecture: Architecture, work: Workload) -> float:
    """None where a micro-batch's hidden states, and with them all that matters, have pages of their own."""
    if work.tokens * architecture.hidden_size * DTYPE_BYTES[work.dtype] >= OWN_PAGES_FROM_BYTES:
        return 0.0
    return HEAP_GAPS_RECOMPUTED if work.gradient_checkpointing else HEAP_GAPS


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
        gradients=trained * LORA_BYTES if trains(w.method) else 0,
        optimizer=int(trained * ADAMW_BYTES[w.optimizer]) if trains(w.method) else 0,
    )


def adapter_parameters(a: Architecture, w: Workload) -> int:
    """Weights of one adapter: A and B of every adapted layer."""
    return sum(w.rank * (layer.inputs + layer.outputs) * layer.layers for layer in _adapted(a, w))


def _adapted(a: Architecture, w: Workload) -> list[Linear]:
    share = _trained_layers(a, w) / a.num_hidden_layers
    found = [layer for layer in a.linear_layers() if not w.target_modules or layer.name in w.target_modules]
    return [layer._replace(layers=ceil(layer.layers * share)) for layer in found]


def _trained_layers(a: Architecture, w: Workload) -> int:
    """The layers that have adapters, all at the top; autograd keeps nothing of those below."""
    return min(w.lora_layers or a.num_hidden_layers, a.num_hidden_layers)


# ---- a training pass


def _training(a: Architecture, w: Workload) -> dict[str, int]:
    size, tokens, h = DTYPE_BYTES[w.dtype], w.tokens, a.hidden_size
    mask = 0 if w.layout == "flat" else tokens * w.row_tokens * (size + 1)
    kept_per_token, trained = _kept_per_token(a, w), _trained_layers(a, w)
    if w.gradient_checkpointing:
        kept = trained * h * size * tokens
        layer = (kept_per_token // trained + _layer_transient(a, size, recomputed=True)) * tokens
    else:
        kept = kept_per_token * tokens
        layer = _layer_transient(a, size, recomputed=False) * tokens
    kept += tokens * h * size * (trained < a.num_hidden_layers)  # what the layers below have made of the batch
    # The backward pass begins with the head and the last norm, and frees what they kept before it comes to the layers.
    ends = tokens * h * (4 + size) + w.scored_tokens * h * (4 + size)
    chunk = _chunk_bytes(a, w) * CHUNK_COPIES if speaks(w.method) else 0
    layer += _unpacked_bytes(a, w)
    working, scoring = (layer, 0) if layer >= ends + chunk else (ends, chunk)
    return {"activations": kept + mask + working, "scoring_chunk": scoring}


def _kept_per_token(a: Architecture, w: Workload) -> int:
    """Bytes that autograd keeps of every token, of all layers."""
    size, h, q, kv = DTYPE_BYTES[w.dtype], a.hidden_size, a.query_width, a.key_value_width
    count = _trained_layers(a, w)
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
    return rank + sum(shared.values()) * size - a.query_width * _trained_layers(a, w) * size * _adapts_output(adapted)


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
    """The larger of the prefill, when all prompts go through a layer, and the last step, when the cache is full.

    The cache has room for the answers from the beginning (`cache.RoomyLayer`).
    """
    size, batch = DTYPE_BYTES[w.dtype], w.rollout_batch_size
    prompts = ceil(batch / w.group_size)
    per_token = 16 * (_mlp_width(a) + a.hidden_size) if size == 4 else int(8.5 * _mlp_width(a) + 13 * a.hidden_size)
    weights = sum(layer.parameters for layer in a.linear_layers()) * size
    unpacked = trains(w.method) and w.device == "cpu" and w.quantize == "nf4" and weights <= DENSE_COPIES_BYTES
    copies = weights if unpacked else 0
    prefill = prompts * w.prompt_tokens * per_token + _unpacked_bytes(a, w)
    logits = batch * a.vocab_size * 4 * LOGITS_COPIES
    growing = cache_bytes(a, 1, w.prompt_tokens + w.max_new_tokens, size) * batch // max(1, a.num_hidden_layers)
    first = cache_bytes(a, prompts, w.prompt_tokens + w.max_new_tokens, size), prefill
    last = cache_bytes(a, batch, w.prompt_tokens + w.max_new_tokens, size), logits + growing + _unpacked_bytes(a, w)
    cache, working = max(first, last, key=sum)
    return {"kv_cache": cache, "activations": working + copies}


def cache_bytes(a: Architecture, batch: int, tokens: int, size: int) -> int:
    """Keys and values of `batch` sequences; layers with a window hold no more than that."""
    full, windowed = a.caching_layers
    held = full * tokens + windowed * min(tokens, a.sliding_window or tokens)
    return batch * held * 2 * a.key_value_width * size
