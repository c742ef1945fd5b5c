"""The memory planner: what a run needs at its peak, whether it fits, and which settings would. No torch here.

work = Workload(method="ppo", max_new_tokens=128, rollout_batch_size=8, adapters=4, trained_adapters=2)
fit(read_preset("qwen3-8b").architecture, work, size_bytes("12GiB")).fits
"""

from lowrank_align.plan.fitting import Plan, cards, fit
from lowrank_align.plan.prediction import (
    GIB,
    GPU_CONTEXT_BYTES,
    NF4_BYTES,
    Parts,
    Prediction,
    adapter_parameters,
    cache_bytes,
    predict,
)
from lowrank_align.plan.words import as_flags, gib, in_one_line, parameters_in_words, size_bytes
from lowrank_align.plan.workload import Workload, rolls_out, work_of

__all__ = [
    "GIB",
    "GPU_CONTEXT_BYTES",
    "NF4_BYTES",
    "Parts",
    "Plan",
    "Prediction",
    "Workload",
    "adapter_parameters",
    "as_flags",
    "cache_bytes",
    "cards",
    "fit",
    "gib",
    "in_one_line",
    "parameters_in_words",
    "predict",
    "rolls_out",
    "size_bytes",
    "work_of",
]
