"""The installed TRL as the oracle: on the same rows and weights the same token ids, losses, metrics and gradients.

Both sides run the whole path from rows of text. The LoRA weights are ours, with a B that is not 0, copied into TRL's
model by name; nothing of TRL's goes into ours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.methods.metrics import Metrics
from lowrank_align.trees import TreeRow

trl = pytest.importorskip("trl")
TOLERANCE = 1e-4

TEXTS = {
    "text": ["Write of the sea: ", "ab", "What did the other rather gather in winter? "],
    "chat": [
        [{"role": "user", "content": "Write of the sea"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}],
        [
            {"role": "user", "content": "Hello there"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "What did the other gather?"},
        ],
    ],
}
# Rows of very different lengths; in "merged" the prompt's last letters become one token with the completion's first.
CHOSEN = ["a thin blue line.", "c", "Other leather, then another; the rest was thrown into the inner river."]
REJECTED = ["no", "def ghi jkl mno pqr", "There."]
MERGED = {"prompt": "Complete: I saw t", "completion": "he other", "chosen": "he other", "rejected": "hen none"}


def rows_of(form: str, *fields: str) -> list[dict[str, Any]]:
    texts = {"completion": CHOSEN, "chosen": CHOSEN, "rejected": REJECTED}
    wrapped = {
        name: values if form != "chat" else [[{"role": "assistant", "content": value}] for value in values]
        for name, values in texts.items()
    }
    prompts = TEXTS["chat" if form == "chat" else "text"]
    rows = [{"prompt": prompt, **{field: wrapped[field][i] for field in fields}} for i, prompt in enumerate(prompts)]
    return [*rows, {name: MERGED[name] for name in ("prompt", *fields)}] if form == "merged" else rows


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """What any TRL trainer needs to stay on this machine's CPU in fp32 and to write nothing elsewhere."""
    return {
        "output_dir": str(tmp_path / "trl"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
    }


class Oracle:
    """A TRL trainer on its own copy of the model, with our adapter's weights."""

    def __init__(self, trainer: Any, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.trainer, self.model = trainer, trainer.model
        self.parameters = {name: self.model.get_parameter(_peft_name(name)) for name in parameters}
        for name, parameter in parameters.items():
            self.parameters[name].data.copy_(parameter.data)
        self.model.train()

    def loss_and_metrics(self) -> tuple[float, dict[str, float]]:
        """One `compute_loss` and its backward on all rows as one batch."""
        self.batch = self.trainer.data_collator(list(self.trainer.train_dataset))
        loss = self.trainer.compute_loss(self.model, dict(self.batch))
        loss.backward()
        return loss.item(), {name: values[-1] for name, values in self.trainer._metrics["train"].items()}

    def sequences(self) -> list[list[int]]:
        """The token ids of the batch without their padding."""
        lengths = self.batch["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(self.batch["input_ids"].tolist(), lengths, strict=True)]


def ours(method: Any, rows: list[TreeRow]) -> tuple[float, dict[str, float], dict[str, torch.nn.Parameter]]:
    """Loss, metrics, and the trained role's parameters with their gradients."""
    method.base.model.train()
    seen = Metrics()
    loss = method.step(rows, method.weight(rows), seen).item()
    method.base.model.eval()
    return loss, seen.results(), method.base.trainable_parameters(method.trained[0])


def assert_same_gradients(mine: dict[str, torch.nn.Parameter], theirs: dict[str, torch.nn.Parameter]) -> None:
    largest = max(p.grad.abs().max().item() for p in theirs.values())
    assert largest > 100 * TOLERANCE, "gradients too small to compare"
    for name, parameter in mine.items():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: n + m
        )


def assert_same_metrics(mine: dict[str, float], theirs: dict[str, float], names: list[str]) -> None:
    assert {name: mine[name] for name in names} == pytest.approx({n: theirs[n] for n in names}, abs=TOLERANCE)


def sequences(rows: list[TreeRow], completion: int) -> list[list[int]]:
    return [row.prompt_ids + row.completions[completion].ids for row in rows]


def trained_ids(rows: list[TreeRow], completion: int) -> list[list[int]]:
    """Every trained token where it stands in prompt + completion, -100 elsewhere."""
    found = []
    for row in rows:
        answer = row.completions[completion]
        labels = [i if counts else -100 for i, counts in zip(answer.ids, answer.mask, strict=True)]
        found.append([-100] * len(row.prompt_ids) + labels)
    return found


def causal(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def lora(base: Any, task: str, **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=base.linear_names, task_type=task, **options)


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _peft_name(name: str) -> str:
    if name == "score.weight":
        return "base_model.model.score.modules_to_save.default.weight"
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


@pytest.mark.parametrize(
    ("form", "max_length"), [("text", 256), ("chat", 256), ("merged", 256), ("text", 24), ("chat", 50)]
)
def test_sft(
    form: str, max_length: int, tiny_llama: Path, make_method: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    """Ids, labels, the mean over all trained tokens, accuracy, entropy, gradients; also where max_length cuts."""
    rows = rows_of(form, "completion")
    method, items = make_method("sft", rows, max_length=max_length)
    trainer = trl.SFTTrainer(
        causal(tiny_llama),
        args=trl.SFTConfig(max_length=max_length, **arguments),
        train_dataset=as_dataset(rows),
        processing_class=tokenizer(tiny_llama),
        peft_config=lora(method.base, "CAUSAL_LM"),
    )
    oracle = Oracle(trainer, method.base.trainable_parameters("policy"))
    their_loss, their_metrics = oracle.loss_and_metrics()
    loss, metrics, parameters = ours(method, items)

    assert len(items) == len(trainer.train_dataset) > 1
    assert sequences(items, 0) == oracle.sequences()
    padded = [
        labels[: len(ids)] for labels, ids in zip(oracle.batch["labels"].tolist(), oracle.sequences(), strict=True)
    ]
    assert trained_ids(items, 0) == padded
    assert loss == pytest.approx(their_loss, abs=TOLERANCE)
    assert_same_metrics(metrics, their_metrics, ["mean_token_accuracy", "entropy"])
    assert_same_gradients(parameters, oracle.parameters)


@pytest.mark.parametrize(
    ("form", "loss_type", "start"),
    [
        ("text", "sigmoid", "bare"),
        ("text", "ipo", "bare"),
        ("text", "hinge", "bare"),
        ("chat", "sigmoid", "bare"),
        ("chat", "ipo", "adapter"),
        ("merged", "sigmoid", "bare"),
        ("text", "sigmoid", "adapter"),
        ("text", "robust", "bare"),
        ("one", "nll", "bare"),
        ("one", "sigmoid nll", "bare"),
    ],
)
def test_dpo(
    form: str,
    loss_type: str,
    start: str,
    tiny_llama: Path,
    make_method: Callable[..., Any],
    arguments: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Ids, loss, rewards, logps and gradients, with the bare base and with a start adapter as the reference.

    TRL's `sft` is our `nll` where there is one row: it averages over the tokens of all rows, we over each row's.
    """
    from peft import PeftModel

    rows = rows_of("text", "chosen", "rejected")[:1] if form == "one" else rows_of(form, "chosen", "rejected")
    losses = loss_type.split()
    knobs: dict[str, Any] = {"loss": losses, "beta": 0.3} if losses != ["nll"] else {"loss": losses}
    weights = [1.0, 0.7][: len(losses)]
    smoothing = {"label_smoothing": 0.2} if losses == ["robust"] else {}
    knobs |= {"loss_weights": weights, **smoothing}
    model: Any = causal(tiny_llama)
    peft: dict[str, Any] = {}
    if start == "adapter":
        sft, _ = make_method("sft", rows_of("text", "completion"))
        sft.base.save_role("policy", tmp_path / "sft")
        knobs["adapter"] = str(tmp_path / "sft")
        model = PeftModel.from_pretrained(model, tmp_path / "sft", is_trainable=True)
    method, items = make_method("dpo", rows, **knobs)
    if start == "bare":
        peft = {"peft_config": lora(method.base, "CAUSAL_LM")}
    else:  # one step from the reference, which is the adapter that both sides loaded
        for parameter in method.base.trainable_parameters("policy").values():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            beta=0.3,
            loss_type=["sft" if name == "nll" else name for name in losses],
            loss_weights=weights,
            max_length=256,
            **smoothing,
            **arguments,
        ),
        train_dataset=as_dataset(rows),
        processing_class=tokenizer(tiny_llama),
        **peft,
    )
    oracle = Oracle(trainer, method.base.trainable_parameters("policy"))
    their_loss, their_metrics = oracle.loss_and_metrics()
    loss, metrics, parameters = ours(method, items)

    assert sequences(items, 0) + sequences(items, 1) == oracle.sequences()
    masks = [m[: len(i)] for m, i in zip(oracle.batch["completion_mask"].tolist(), oracle.sequences(), strict=True)]
    mine = trained_ids(items, 0) + trained_ids(items, 1)
    assert [[int(i != -100) for i in labels] for labels in mine] == masks
    assert abs(metrics["rewards/margins"]) > 0.01, "policy and reference agree: nothing is compared"
    assert loss == pytest.approx(their_loss, abs=TOLERANCE)
    # without a reference our rewards are of the log-probabilities
    names = [f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies") if losses != ["nll"]]
    assert_same_metrics(
        metrics, their_metrics, [*names, "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"]
    )
    assert_same_gradients(parameters, oracle.parameters)


@pytest.mark.parametrize("centring", [0.0, 0.5])
@pytest.mark.parametrize("form", ["text", "chat", "margin"])
def test_reward(
    form: str,
    centring: float,
    tiny_base: Any,
    tiny_llama: Path,
    make_method: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    """Ids, loss (also centred, also with margins), extremes, accuracy and gradients, the head's included."""
    from transformers import AutoModelForSequenceClassification

    rows = rows_of("text" if form == "margin" else form, "chosen", "rejected")
    if form == "margin":
        rows = [{**row, "margin": margin} for row, margin in zip(rows, (0.5, 0.0, 2.0), strict=True)]
    method, items = make_method("reward", rows, centering_coefficient=centring)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1, dtype=torch.float32)
    trainer = trl.RewardTrainer(
        model,
        args=trl.RewardConfig(max_length=256, center_rewards_coefficient=centring or None, **arguments),
        train_dataset=as_dataset(rows),
        processing_class=tokenizer(tiny_llama),
        peft_config=lora(tiny_base, "SEQ_CLS", modules_to_save=["score"]),
    )
    oracle = Oracle(trainer, method.base.trainable_parameters("reward"))
    their_loss, their_metrics = oracle.loss_and_metrics()
    loss, metrics, parameters = ours(method, items)

    assert sequences(items, 0) + sequences(items, 1) == oracle.sequences()
    assert loss == pytest.approx(their_loss, abs=TOLERANCE)
    assert_same_metrics(metrics, their_metrics, ["min_reward", "mean_reward", "max_reward", "accuracy", "margin"])
    assert "score.weight" in parameters
    assert_same_gradients(parameters, oracle.parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["text", "chat"])
def test_kto(form: str, tiny_llama: Path, make_method: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Ids, z0 from answers under the prompts of others, loss with unequal weights, rewards, logps and gradients."""
    labels = [True, False, True]
    rows = [{**row, "label": label} for row, label in zip(rows_of(form, "completion"), labels, strict=True)]
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    method, items = make_method("kto", rows, beta=0.3, **weights)
    trainer = trl.KTOTrainer(
        causal(tiny_llama),
        args=trl.KTOConfig(beta=0.3, max_length=256, train_sampling_strategy="sequential", **weights, **arguments),
        train_dataset=as_dataset(rows),
        processing_class=tokenizer(tiny_llama),
        peft_config=lora(method.base, "CAUSAL_LM"),
    )
    oracle = Oracle(trainer, method.base.trainable_parameters("policy"))
    their_loss, their_metrics = oracle.loss_and_metrics()
    (batch,) = list(method.round(items, 1, lambda function, knob: function(2)))
    loss, metrics, parameters = ours(method, batch)

    assert sequences(items, 0) == oracle.sequences()
    assert loss == pytest.approx(their_loss, abs=TOLERANCE)
    sides = [f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")]
    assert_same_metrics(metrics, their_metrics, [*sides, "rewards/margins", "kl", "entropy"])
    assert metrics["kl"] > 0.01, "z0 is 0: that answers are turned round is not seen"
    assert_same_gradients(parameters, oracle.parameters)
