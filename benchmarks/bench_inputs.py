"""What `make bench` trains: a random Llama of 13 M parameters, a tokenizer of 8 k pieces, and rows of real text.

    python benchmarks/bench_inputs.py DATA FOLDER

DATA is LLaMA-Factory's `data` folder (or holds its three demo files). FOLDER gets `model/`, the rows as JSON Lines in
plain prompt-and-answer form, `start/` (the adapter that both sides begin with) and `order.json`.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILES = ("wiki_demo.txt", "alpaca_en_demo.json", "dpo_en_demo.json")
VOCABULARY, CONTEXT = 8192, 1024
ROWS = 16  # of each kind
GRPO_PROMPT, PPO_PROMPT = 256, 128  # tokens
RANK = 16


def make_inputs(data: Path, folder: Path) -> None:
    """Writes everything into `folder`; SystemExit with one line where a file is missing."""
    missing = [name for name in FILES if not (data / name).is_file()]
    if missing:
        sys.exit(f"{data}: no {', '.join(missing)}; give LLaMA-Factory's data folder: make bench DATA=/path/to/data")
    pairs = [dict(zip(("prompt", "chosen", "rejected"), as_texts(row), strict=True)) for row in _json(data, FILES[2])]
    told = [
        {"prompt": f"User: {row['instruction']} {row['input']}\nAssistant:\n", "completion": row["output"]}
        for row in _json(data, FILES[1])
    ]
    tokenizer = _model(
        folder / "model", [(data / FILES[0]).read_text(), *(" ".join(r.values()) for r in [*pairs, *told])]
    )

    def tokens(*texts: str) -> int:
        return sum(len(tokenizer(text)["input_ids"]) for text in texts)

    fitting = [row for row in pairs if max(tokens(row["prompt"], row[side]) for side in ("chosen", "rejected")) < 1000]
    pairs = fitting[:ROWS]
    told = [row for row in told if 32 < tokens(*row.values()) < 1000][: 2 * ROWS]
    unpaired = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(pairs, ["chosen", "rejected"] * (ROWS // 2), strict=True)
    ]
    wiki = tokenizer((data / FILES[0]).read_text()[:400_000])["input_ids"]

    def prompts(length: int) -> list[dict[str, str]]:
        return [{"prompt": tokenizer.decode(wiki[i * length : (i + 1) * length])} for i in range(ROWS)]

    kinds = {"pairs": pairs, "demonstrations": told, "unpaired": unpaired,
             "grpo": prompts(GRPO_PROMPT), "ppo": prompts(PPO_PROMPT)}  # fmt: skip
    for name, rows in kinds.items():
        _write(folder / f"{name}.jsonl", rows)
    _start(folder, {name: len(rows) for name, rows in kinds.items()})


def as_texts(row: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a ShareGPT row as plain text."""
    names = {"human": "User", "gpt": "Assistant", "system": "System"}
    turns = [f"{names.get(turn['from'], turn['from'])}: {turn['value']}\n" for turn in row["conversations"]]
    return "".join(turns) + "Assistant:\n", row["chosen"]["value"], row["rejected"]["value"]


def _json(data: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((data / name).read_text())
    return rows


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _model(folder: Path, texts: list[str]) -> Any:
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<pad>", "<bos>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def _start(folder: Path, counts: dict[str, int]) -> None:
    """The adapter and the head that our runs begin with, and the order in which they take the rows, for the peers."""
    from lowrank_align.base import Base
    from lowrank_align.row_order import shuffled

    base = Base.load(str(folder / "model"), quantize="none", device="cpu")
    base.add_role("policy", rank=RANK, head=True, seed=0)
    base.save_role("policy", folder / "start", as_reward=True)
    orders = {name: shuffled(0, 0, count).tolist() for name, count in counts.items()}
    (folder / "order.json").write_text(json.dumps(orders))


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]), Path(sys.argv[2]))
