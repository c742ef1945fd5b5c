"""What the memory benchmarks run on: a random Llama of 13 M parameters, and rows of exact lengths.

Width 384, 6 layers, vocabulary 8 k, one token a word; prompts and completions of 128 tokens each.
"""

import json
import random
from pathlib import Path
from typing import Any

ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 32, 128, 128
VOCABULARY = 8192


def make_inputs(folder: Path) -> None:
    """`model/`, `demonstrations.jsonl` and `pairs.jsonl` in `folder`."""
    words = make_model(folder / "model")
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    prompts = [text(PROMPT_TOKENS) + " " for _ in range(ROWS)]
    answers = [(text(COMPLETION_TOKENS - 1), text(COMPLETION_TOKENS - 1)) for _ in range(ROWS)]
    demonstrations = [{"prompt": p, "completion": a} for p, (a, _) in zip(prompts, answers, strict=True)]
    pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, answers, strict=True)]
    for name, rows in (("demonstrations", demonstrations), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path, vocabulary: int = VOCABULARY, context: int = 1024) -> list[str]:
    """A random model and a tokenizer of one token a word; those words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = write_tokenizer(folder, vocabulary)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=vocabulary, max_position_embeddings=context, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return words


def write_tokenizer(folder: Path, vocabulary: int) -> list[str]:
    """One token a word; those words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(vocabulary - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return words[3:]


def write_words(path: Path, *, rows: int, prompt: int, answers: int, answer: int) -> None:
    """Rows of random words and exactly so many tokens (the end token counts in): SFT's, pairs or rankings."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(2000)]

    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    with path.open("w") as file:
        for _ in range(rows):
            row: dict[str, Any] = {"prompt": text(prompt) + " "}
            said = [text(answer - 1) for _ in range(answers)]
            if answers == 1:
                row["completion"] = said[0]
            elif answers == 2:
                row |= {"chosen": said[0], "rejected": said[1]}
            else:
                row |= {"completions": said, "ranks": list(range(1, answers + 1))}
            file.write(json.dumps(row) + "\n")


def knobs(method: str, folder: Path, batch: int) -> dict[str, Any]:
    """The settings of a method on these files; PPO needs the reward run `folder / "reward"`."""
    if method == "ppo":
        return {
            "prompts": str(folder / "demonstrations.jsonl"),
            "reward": str(folder / "reward"),
            "max_new_tokens": COMPLETION_TOKENS,
            "rollout_batch_size": batch,
            "minibatches": 1,
            "ppo_epochs": 1,
        }
    return {"data": str(folder / ("demonstrations.jsonl" if method == "sft" else "pairs.jsonl"))}
