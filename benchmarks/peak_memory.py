"""Peak memory of PPO, with its four roles, beside that of SFT on the same model, batch and lengths.

    python benchmarks/peak_memory.py

Each runs in a fresh process; the figure is peak RSS minus RSS after imports. The model is a random Llama of 13 M
parameters (width 384, 6 layers, vocabulary 8 k), NF4. The target is PPO at most 1.25 x SFT.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS, PROMPT_TOKENS, COMPLETION_TOKENS, BATCH, STEPS = 32, 128, 128, 8, 2
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=("nf4", "int8", "none"), default="nf4")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], Path(arguments.child[1]), arguments.quantize)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        run(folder, "reward", arguments.quantize)  # the reward run that PPO needs; also prints its own peak
        peaks = {method: run(folder, method, arguments.quantize) for method in ("sft", "ppo")}
    print(f"PPO / SFT: {peaks['ppo'] / peaks['sft']:.2f} (target: at most 1.25)")


def run(folder: str, method: str, quantize: str) -> int:
    """One method in a process of its own; its peak in bytes above the imports."""
    command = [sys.executable, __file__, "--quantize", quantize, "--child", method, folder]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = json.loads(lines[-1])
    peak = found["peak"] - found["imports"]
    print(f"{method:<7} {peak / 1e6:6.1f} MB above the {found['imports'] / 1e6:.0f} MB of imports")
    return int(peak)


def measure(method: str, folder: Path, quantize: str) -> dict[str, int]:
    """Train `method` for a few steps; RSS after imports and at its peak, in bytes."""
    import torch

    from lowrank_align.base import Base  # noqa: F401 - the imports are what is measured first
    from lowrank_align.memory import peak_bytes, reset_peak, resident_bytes
    from lowrank_align.methods import method_class
    from lowrank_align.progress import Progress
    from lowrank_align.train import train

    method_class(method)
    cpu = torch.device("cpu")
    imports = resident_bytes()
    reset_peak(cpu)
    knobs = {
        "sft": {"data": str(folder / "sft.jsonl")},
        "reward": {"data": str(folder / "pairs.jsonl")},
        "dpo": {"data": str(folder / "pairs.jsonl")},
        "ppo": {
            "prompts": str(folder / "sft.jsonl"),
            "reward": str(folder / "reward"),
            "max_new_tokens": COMPLETION_TOKENS,
            "rollout_batch_size": BATCH,
            "minibatches": 1,
            "ppo_epochs": 1,
        },
    }[method]
    train(
        method,
        progress=Progress(quiet=True),
        model=str(folder / "model"),
        quantize=quantize,
        out=str(folder / method),
        max_steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        sample_steps=0,
        **knobs,
    )
    return {"imports": imports, "peak": peak_bytes(cpu)}


def make_inputs(folder: Path) -> None:
    """A random model with a tokenizer of one token a word, and rows of exact lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=VOCABULARY, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choices(words[3:], k=count))

    prompts = [text(PROMPT_TOKENS) + " " for _ in range(ROWS)]
    answers = [(text(COMPLETION_TOKENS - 1), text(COMPLETION_TOKENS - 1)) for _ in range(ROWS)]
    demonstrations = [{"prompt": p, "completion": a} for p, (a, _) in zip(prompts, answers, strict=True)]
    pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, answers, strict=True)]
    for name, rows in (("sft", demonstrations), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
