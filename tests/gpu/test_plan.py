"""The plan against `torch.cuda.max_memory_allocated`, in a process for each method. Skipped without a CUDA GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]

# The shapes of models that people train, random weights in bf16, quantised on the card: nothing is downloaded.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
sys.path.insert(0, "benchmarks")
from memory_inputs import make_inputs
from plan_measured import measure_apart
from lowrank_align.presets import read_preset

folder = Path(sys.argv[1])
make_inputs(folder)  # its rows and tokenizer; the model is another
a = read_preset(sys.argv[2]).architecture
config = AutoConfig.for_model(a.model_type, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
    num_hidden_layers=a.num_hidden_layers, num_attention_heads=a.num_attention_heads,
    num_key_value_heads=a.num_key_value_heads, head_dim=a.head_dim, vocab_size=a.vocab_size,
    tie_word_embeddings=a.tie_word_embeddings, max_position_embeddings=a.max_position_embeddings,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
found = []
for method in ("reward", "sft", "dpo", "ppo"):
    case = {"name": method, "method": method, "quantize": "nf4", "rows": 2, "ck": True}
    found.append(measure_apart(case, folder))
print(json.dumps(found))
"""


@pytest.mark.parametrize("preset", ["smollm2-135m", "llama-3.2-1b"])
def test_within_a_tenth_of_what_is_allocated(preset: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), preset]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    for row in json.loads(child.stdout.splitlines()[-1]):
        assert row["device"].startswith("cuda")
        assert row["planned"] == pytest.approx(row["measured"], rel=0.10), row
