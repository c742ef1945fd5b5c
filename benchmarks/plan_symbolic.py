"""The plan of full-size models against a training pass on tensors that have shapes but no memory.

    python benchmarks/plan_symbolic.py                    # a few models, about a minute each
    python benchmarks/plan_symbolic.py qwen3-8b --rows 1 --prompt 512 --completion 256

torch's fake tensors let our own code run on an 8B model on any machine; every tensor that it would allocate is counted
while it lives. NF4 layers are stood in for by packed weights of the same size that unpack for each product, forward and
backward, as bitsandbytes does. What a GPU's kernels allocate inside themselves is not seen.
"""

import argparse
import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging

import lowrank_align.base as base_module
from lowrank_align.architecture import FUSED, Architecture
from lowrank_align.base import Base
from lowrank_align.loading import Loaded
from lowrank_align.plan import GIB, NF4_BYTES, Workload, predict
from lowrank_align.plan.prediction import WORKSPACE_BYTES
from lowrank_align.presets import read_preset
from lowrank_align.scoring import LogitsHead
from lowrank_align.trees import Completion, TreeRow

CASES = [  # preset, rows, prompt, completion, completions, recomputation
    ("qwen3-8b", 1, 512, 256, 1, True),
    ("qwen3-8b", 2, 512, 256, 1, True),
    ("llama-3.1-8b", 1, 512, 256, 1, False),
    ("llama-3.2-3b", 2, 512, 512, 2, True),
    ("gemma-3-4b", 2, 512, 256, 1, True),
    ("smollm2-135m", 2, 512, 256, 1, False),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--completions", type=int, default=1)
    parser.add_argument("--no-checkpointing", action="store_true")
    a = parser.parse_args()
    one = (a.preset, a.rows, a.prompt, a.completion, a.completions, not a.no_checkpointing)
    transformers_logging.set_verbosity_error()
    for case in [one] if a.preset else CASES:
        counted, planned = compare(*case)
        name, rows, prompt, completion, completions, checkpointing = case
        print(
            f"{name:<14} {rows} x ({prompt} + {completions} x {completion}){' checkpointed' * checkpointing:<14} "
            f"counted {counted / GIB:6.2f} GiB  planned {planned / GIB:6.2f} GiB  ratio {planned / counted:.3f}",
            flush=True,
        )


def compare(
    name: str, rows: int, prompt: int, completion: int, completions: int, checkpointing: bool
) -> tuple[int, int]:
    """Peak bytes of SFT's second step, counted and planned."""
    architecture = read_preset(name).architecture
    assert architecture is not None
    _let_fakes_pass()
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = Base(Loaded(_packed(architecture), _NoTokenizer(), name, Path("."), "", torch.bfloat16))
        base.add_role("policy", rank=16)
        base.enable_checkpointing(checkpointing)
        gc.collect()
        alive = Alive(base.model)
        row = TreeRow([5] * prompt, [Completion([5] * completion, [True] * completion) for _ in range(completions)])
        optimizer = torch.optim.AdamW(base.trainable_parameters("policy").values())
        with alive:
            for _ in range(2):  # the second pass has gradients and optimiser states beside it, as accumulation has
                batch = base.collate([row] * rows)
                with base.role("policy"):
                    (-base.token_scores(batch).logps.sum()).backward()
                if not optimizer.state:
                    optimizer.step()
    work = Workload(
        "sft", micro_batch_size=rows, prompt_tokens=prompt, completion_tokens=completion, completions=completions,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return alive.most, predict(architecture, work).allocated_bytes - WORKSPACE_BYTES


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, a model's among them, now and at most."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
        self.known = dict.fromkeys(storages, 0)
        self.now = self.most = sum(storages.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known[key] = tensor.untyped_storage().nbytes()
                self.now += self.known[key]
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


class _Unpack(torch.autograd.Function):
    """A product with a packed weight, which is unpacked for it and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return nn.functional.linear(inputs, torch.empty(shape, dtype=inputs.dtype, device=inputs.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight = torch.empty(ctx.shape, dtype=gradients[0].dtype, device=gradients[0].device)
        return gradients[0] @ weight, None, None


class _Packed(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = inputs, outputs, None
        content = torch.empty(int(inputs * outputs * NF4_BYTES), dtype=torch.uint8)
        self.weight = nn.Parameter(content, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _Unpack.apply(inputs.to(torch.bfloat16), self.weight, shape)  # type: ignore[no-any-return]


class _NoTokenizer:
    pad_token_id = 0


def _packed(architecture: Architecture) -> Any:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    figures = {name: getattr(architecture, name) for name in names} | architecture.config
    if architecture.model_type not in FUSED:
        figures["head_dim"] = architecture.head_dim
    config = AutoConfig.for_model(architecture.model_type, **figures)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, _Packed(child.in_features, child.out_features))
    return model.requires_grad_(False).eval()


def _let_fakes_pass() -> None:
    """What looks into a tensor cannot be done without its numbers: the probes at load, and moving to a device."""
    base_module.choose_layout = lambda base: "tree"  # type: ignore[assignment]
    base_module.choose_logits = lambda base: LogitsHead(base.model)  # type: ignore[assignment]
    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda self, *a, **k: None
    nn.Module.to = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
    Tensor.nonzero = lambda self, **k: torch.arange(self.numel())[:, None]  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main()
