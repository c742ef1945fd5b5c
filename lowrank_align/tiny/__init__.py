"""The embedded base `tiny`: a small Llama that the project pretrains itself, and the world it writes about.

`grammar` writes short reviews and scores them exactly; `annotator` turns scores into noisy preferences; `pretrain`
makes the model and its tokenizer; `cache` keeps the result. Importing this package does not import torch.
"""

from lowrank_align.tiny.annotator import annotate, simulated_pairs
from lowrank_align.tiny.cache import tiny_path
from lowrank_align.tiny.grammar import demonstrations, exact_score, prompts

__all__ = ["annotate", "demonstrations", "exact_score", "prompts", "simulated_pairs", "tiny_path"]
