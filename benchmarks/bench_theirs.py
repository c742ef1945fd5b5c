"""One measurement of TRL, in a process of its own: bench_theirs.py CASE FOLDER [MICRO_BATCH]; JSON on stdout.

TRL 1.16, or for PPO 1.12, whichever Python finds. The same rows in the same order, the same LoRA weights at the start,
fp32 compute and fp32 adapters, no gradient checkpointing, no evaluation, nothing saved or reported. TRL turns the
adapters of a quantised base to bf16, which a CPU without bf16 arithmetic computes ten times slower: `begin_as_ours`
turns them back, in the peer's favour.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_cases import BETA, GROUP, GRPO_BETA, LEARNING_RATE, NEW_TOKENS, PACKS, PPO_EPOCHS, Case, result
from bench_reward import letters
from datasets import Dataset
from peft import LoraConfig, TaskType, inject_adapter_in_model
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Marks(TrainerCallback):
    """The moments at which steps ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())


def measure(case: Case, folder: Path, micro_batch: int) -> dict[str, Any]:
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    marks = Marks()
    trainer = (ppo if case.method == "ppo" else by_trainer)(case, folder, micro_batch, marks)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    tokens = 0
    if case.method == "sft_packed":
        packs = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        tokens = sum(packs[PACKS : PACKS * case.steps])
    return result(case, marks.at, losses, int(peak.split()[1]) * 1024 - before, tokens)


def common(case: Case, micro_batch: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": True, "bf16": False, "fp16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "per_device_train_batch_size": micro_batch, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, "seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip


def rows_of(case: Case, folder: Path) -> list[dict[str, Any]]:
    """In the order in which our own loop takes them."""
    rows = [json.loads(line) for line in (folder / f"{case.rows}.jsonl").read_text().splitlines()]
    return [rows[i] for i in json.loads((folder / "order.json").read_text())[case.rows]]


def load(kind: Any, case: Case, folder: Path, **options: Any) -> Any:
    if case.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    return kind.from_pretrained(str(folder / "model"), dtype=torch.float32, **options)


def lora(task: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LINEARS, task_type=task)


def begin_as_ours(model: Any, folder: Path) -> None:
    """Our start's LoRA weights and head, by name; adapters in fp32."""
    start = load_file(folder / "start" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        key = name.replace(".default", "").replace(".modules_to_save", "")
        key = key if key.startswith("base_model.model.") else f"base_model.model.{key}"
        if key in start and ".lora_" in key or key.endswith("score.weight"):
            with torch.no_grad():
                parameter.copy_(start[key])


def by_trainer(case: Case, folder: Path, micro_batch: int, marks: Marks) -> Any:
    import trl

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    scores = case.method == "reward"
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = load(kind, case, folder, **({"num_labels": 1} if scores else {}))
    if scores:
        model.config.pad_token_id = tokenizer.pad_token_id
    options = common(case, micro_batch) | {"max_steps": case.steps}
    options["gradient_accumulation_steps"] = case.batch // micro_batch
    extra: dict[str, Any] = {}
    if case.method in ("sft", "sft_packed"):
        config, trainer = trl.SFTConfig, trl.SFTTrainer
        packing = case.method == "sft_packed"
        options |= {"max_length": 1024, "completion_only_loss": True, "packing": packing, "packing_strategy": "bfd"}
        if packing:
            options["gradient_accumulation_steps"] = PACKS // micro_batch
    elif case.method == "reward":
        config, trainer = trl.RewardConfig, trl.RewardTrainer
        options |= {"max_length": 1024}
    elif case.method == "grpo":
        config, trainer = trl.GRPOConfig, trl.GRPOTrainer
        extra = {"reward_funcs": letters}
        options |= {"num_generations": GROUP, "max_completion_length": NEW_TOKENS, "beta": GRPO_BETA,
                    "gradient_accumulation_steps": GROUP // micro_batch, "shuffle_dataset": False,
                    "mask_truncated_completions": False, "use_bias_correction_kl": False}  # fmt: skip
    else:
        config, trainer = (trl.KTOConfig, trl.KTOTrainer) if case.method == "kto" else (trl.DPOConfig, trl.DPOTrainer)
        options |= {"max_length": 1024, "beta": BETA}
    made = trainer(
        model=model, args=config(**options), train_dataset=Dataset.from_list(rows_of(case, folder)),
        processing_class=tokenizer, peft_config=lora(TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM),
        callbacks=[marks], **extra,
    )  # fmt: skip
    begin_as_ours(made.model, folder)
    if case.method != "grpo":
        made._get_train_sampler = lambda *_: SequentialSampler(made.train_dataset)
    return made


def ppo(case: Case, folder: Path, micro_batch: int, marks: Marks) -> Any:
    """Policy and value are adapters on a base of their own each, the reward model a third."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    policy = load(AutoModelForCausalLM, case, folder)
    value, reward = (load(AutoModelForSequenceClassification, case, folder, num_labels=1) for _ in range(2))
    inject_adapter_in_model(lora(TaskType.SEQ_CLS), value)
    value.score.requires_grad_(True)
    for scorer in (value, reward):
        begin_as_ours(scorer, folder)
    config = PPOConfig(
        **common(case, micro_batch), gradient_accumulation_steps=case.batch // micro_batch, num_mini_batches=1,
        total_episodes=case.batch * case.steps, response_length=NEW_TOKENS, num_ppo_epochs=PPO_EPOCHS,
        local_rollout_forward_batch_size=case.batch, num_sample_generations=0, stop_token="eos", kl_coef=0.05,
        missing_eos_penalty=None,
    )  # fmt: skip
    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows_of(case, folder)]
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:1]),
        peft_config=lora(TaskType.CAUSAL_LM), callbacks=[marks],
    )  # fmt: skip
    begin_as_ours(trainer.policy_model, folder)
    return trainer


if __name__ == "__main__":
    wanted = Case.named(sys.argv[1])
    size = int(sys.argv[3]) if len(sys.argv) > 3 else wanted.micro_batch["theirs"]
    torch.set_num_threads(wanted.threads)
    print(json.dumps(measure(wanted, Path(sys.argv[2]), size)))
