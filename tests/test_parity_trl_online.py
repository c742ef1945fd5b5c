"""TRL 1.16 as the oracle of GRPO and RLOO: on the same answers the same advantages, loss, figures and gradients.

TRL generates nothing: it is given the answers that our policy drew, and goes its own way from there (texts to the
reward function, scores to advantages, old and reference log-probs, loss), on its own copy of the model with our LoRA
weights. Its weighting of GRPO's KL by the ratio (a default since 1.16) is turned off: the paper's loss has none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.methods.metrics import Metrics
from lowrank_align.rollout import Rollout

trl = pytest.importorskip("trl")
TOLERANCE = 1e-4
GROUP = 3
PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea, please: ", "b ", "And then? ")]
KNOBS = {"max_new_tokens": 8, "batch_size": 4, "group_size": GROUP, "missing_eos_penalty": 0.0, "temperature": 0.8}


def letters(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """The reward of both sides; to the prompt `b ` every answer is worth the same."""
    return [3.0 if p == "b " else len(c) + 0.5 * c.count("e") for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> str:
    import builtins

    monkeypatch.setattr(builtins, "parity_letters", letters, raising=False)
    return "builtins:parity_letters"


def drawn(method: Any, prompts: list[Any]) -> tuple[list[Rollout], list[Any]]:
    """The rollouts of a step, of several lengths and some ended, and the items of its first update."""
    seen: list[list[Rollout]] = []
    roll_out, end = method.roll_out, method.renderer.end_ids[0]

    def shortened(*arguments: Any) -> list[list[Rollout]]:
        for i, (first, second, *others) in enumerate(roll_out(*arguments)):
            cut = Rollout(second.prompt_ids, second.ids[: i + 2], False)
            seen.append([Rollout(first.prompt_ids, [*first.ids[:3], end], True), cut, *others])
        return seen

    method.roll_out = shortened
    with torch.no_grad():
        items = list(next(iter(method.round(prompts, 1, lambda function, knob: function(4)))))
    return [rollout for group in seen for rollout in group], items


class Theirs:
    """A trainer of TRL's with our weights, which takes the answers as they are given."""

    def __init__(self, trainer: Any, method: Any) -> None:
        self.trainer, self.method = trainer, method
        trainer.current_gradient_accumulation_steps = 1
        mine = method.base.trainable_parameters("policy")
        names = {name: f"base_model.model.{name.removesuffix('.weight')}.default.weight" for name in mine}
        self.parameters = {name: trainer.model.get_parameter(theirs) for name, theirs in names.items()}
        self.copy()
        trainer.model.train()

    def copy(self) -> None:
        for name, parameter in self.method.base.trainable_parameters("policy").items():
            self.parameters[name].data.copy_(parameter.data)

    def judged(self, rollouts: list[Rollout]) -> dict[str, Any]:
        """What its own path makes of the answers before the loss."""
        prompts, answers = [r.prompt_ids for r in rollouts], [r.ids for r in rollouts]
        texts = [self.method.renderer.decode(ids) for ids in answers]
        found = (prompts, answers, None, texts, None, {}, None, None)
        if isinstance(self.trainer, trl.RLOOTrainer):
            found = (prompts, answers, texts)
        self.trainer._generate = lambda prompts: found
        inputs = [row for row in PROMPTS for _ in range(GROUP)]
        return self.trainer._generate_and_score_completions(inputs)

    def step(self, inputs: dict[str, Any]) -> tuple[float, dict[str, float]]:
        loss = self.trainer._compute_loss(self.trainer.model, inputs)
        loss.backward()
        return loss.item(), {name: values[-1] for name, values in self.trainer._metrics["train"].items()}


def theirs(kind: str, folder: Path, out: Path, method: Any, **options: Any) -> Theirs:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}[kind](
        output_dir=str(out), report_to="none", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        disable_tqdm=True, per_device_train_batch_size=len(PROMPTS) * GROUP, num_generations=GROUP, num_iterations=2,
        max_completion_length=8, temperature=KNOBS["temperature"], **options,
    )  # fmt: skip
    trainer = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer}[kind](
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=letters,
        args=config,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=method.base.linear_names, task_type="CAUSAL_LM"),
    )
    return Theirs(trainer, method)


def assert_the_same_step(method: Any, items: list[Any], other: Theirs, inputs: dict[str, Any]) -> dict[str, float]:
    """With both policies moved alike: loss, clip fractions, entropy and gradients; returns our figures."""
    generator = torch.Generator().manual_seed(3)
    for parameter in method.base.trainable_parameters("policy").values():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        parameter.grad = None
    other.copy()
    their_loss, their_figures = other.step(inputs)
    seen = Metrics()
    loss = method.step(items, method.weight(items), seen).item()
    figures = seen.results()
    assert loss == pytest.approx(their_loss, abs=TOLERANCE)
    names = ["entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    names += ["kl"] if "kl" in figures else []
    assert {n: figures[n] for n in names} == pytest.approx({n: their_figures[n] for n in names}, abs=TOLERANCE)
    assert method.round_metrics()["frac_reward_zero_std"] == 0.25
    if isinstance(other.trainer, trl.GRPOTrainer):  # RLOO's is of scores less the KL, which hardly ever agree
        assert their_figures["frac_reward_zero_std"] == 0.25
    gradients = {name: p.grad for name, p in method.base.trainable_parameters("policy").items()}
    assert max(p.grad.abs().max().item() for p in other.parameters.values()) > 100 * TOLERANCE
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, other.parameters[name].grad, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: n + m
        )
    return figures


def in_order(items: list[Any], rollouts: list[Rollout]) -> torch.Tensor:
    """Our advantages in the order of the rollouts; the minibatch has its own."""
    of_prompt = {tuple(item.row.prompt_ids): item.advantages for item in items}
    return torch.cat([of_prompt[tuple(rollout.prompt_ids)] for rollout in rollouts[::GROUP]])


@pytest.mark.parametrize(
    ("loss_type", "ratio", "beta", "high", "scale"),
    [
        ("grpo", "token", 0.2, None, "std"),
        ("grpo", "sequence", 0.2, None, "std"),
        ("dapo", "token", 0.2, 0.05, "std"),
        ("dapo", "token", 0.0, 0.05, "none"),
    ],
)
def test_grpo(
    loss_type: str,
    ratio: str,
    beta: float,
    high: float | None,
    scale: str,
    make_method: Callable[..., Any],
    reward: str,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    reduction = {"grpo": "sequence_mean", "dapo": "token_mean"}[loss_type]
    knobs = {"beta": beta, "ratio": ratio, "clip_range": 0.02, "clip_range_high": high, "scale": scale}
    method, prompts = make_method("grpo", PROMPTS, reward=reward, reduction=reduction, inner_epochs=2, **KNOBS, **knobs)
    rollouts, items = drawn(method, prompts)
    other = theirs(
        "grpo", tiny_llama, tmp_path, method, loss_type=loss_type, importance_sampling_level=ratio, beta=beta,
        epsilon=0.02, epsilon_high=high, scale_rewards={"std": "group", "none": "none"}[scale],
        use_bias_correction_kl=False,
    )  # fmt: skip
    inputs = other.judged(rollouts)
    torch.testing.assert_close(in_order(items, rollouts), inputs["advantages"], rtol=0, atol=1e-5)
    figures = assert_the_same_step(method, items, other, inputs)
    assert figures["clip_ratio/low_mean"] > 0 and figures["clip_ratio/high_mean"] > 0, "nothing is clipped"
    assert ("kl" in figures) == (beta > 0)


def test_rloo(make_method: Callable[..., Any], reward: str, tiny_llama: Path, tmp_path: Path) -> None:
    method, prompts = make_method("rloo", PROMPTS, reward=reward, inner_epochs=2, beta=0.3, clip_range=0.05, **KNOBS)
    rollouts, items = drawn(method, prompts)
    other = theirs("rloo", tiny_llama, tmp_path, method, beta=0.3, epsilon=0.05)
    inputs = other.judged(rollouts)
    torch.testing.assert_close(in_order(items, rollouts), inputs["advantages"], rtol=0, atol=TOLERANCE)
    assert measured_kl(method) > 0.1, "policy and reference agree: the KL in the reward is not compared"
    figures = assert_the_same_step(method, items, other, inputs)
    assert figures["clip_ratio/low_mean"] > 0 and figures["clip_ratio/high_mean"] > 0, "nothing is clipped"


def measured_kl(method: Any) -> float:
    return abs(method.round_metrics()["objective/kl"])
