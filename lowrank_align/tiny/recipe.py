"""What `tiny` is made of, and the name under which one making of it is cached."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedule of one pretraining run. The widths are multiples of 64, NF4's block."""

    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 2  # two learn more in a minute than three or four
    heads: int = 4
    context_tokens: int = 256
    initializer_range: float = 0.08  # about 1 / sqrt(hidden_size); at Llama's 0.02 a model this narrow wakes up late
    steps: int = 700
    batch_size: int = 24
    warmup_steps: int = 50
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    chat_share: float = 0.25
    threads: int = 1  # part of the recipe, as it decides the bytes; two on busy cores take several times as long

    @property
    def name(self) -> str:
        """The cache folder's name: the seed, and a hash of everything else that decides the bytes."""
        parts = [json.dumps(asdict(self), sort_keys=True)]
        parts += [(files("lowrank_align.tiny") / source).read_text("utf-8") for source in ("grammar.py", "pretrain.py")]
        parts += [f"{library} {_minor_version(library)}" for library in ("torch", "transformers")]
        return f"tiny-seed{self.seed}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _minor_version(library: str) -> str:
    """From the installed metadata: finding a cached model must not import torch."""
    return ".".join(version(library).split(".")[:2])
