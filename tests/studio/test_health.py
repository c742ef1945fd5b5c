"""What is said of hand-made curves: the faults that people meet, and good runs of which nothing bad may be said."""

from collections.abc import Callable

import pytest

from lowrank_align.studio.health import Remark, health
from lowrank_align.studio.series import Series

STEPS = 40


def made(steps: int = STEPS, **curves: Callable[[float], float]) -> list[dict[str, float | None]]:
    """One entry a step; each curve is a function of how far the run is, from 0 to 1. `__` stands for a slash."""
    return [
        {"step": i + 1, **{name.replace("__", "/"): curve(i / (steps - 1)) for name, curve in curves.items()}}
        for i in range(steps)
    ]


def wobbling(start: float, end: float, width: float) -> Callable[[float], float]:
    """A line with steps that fall to alternate sides of it: `width` apart."""
    seen = [0]

    def curve(at: float) -> float:
        seen[0] += 1
        return start + (end - start) * at + (width / 2 if seen[0] % 2 else -width / 2)

    return curve


GOOD_DPO = {
    "loss": lambda t: 0.69 - 0.2 * t,
    "rewards__margins": lambda t: 0.8 * t,
    "rewards__chosen": lambda t: -0.1 * t,
    "rewards__accuracies": lambda t: 0.5 + 0.25 * t,
    "logps__chosen": lambda t: -50 - 1 * t,
    "entropy": lambda t: 1.1 - 0.1 * t,
    "skipped": lambda t: 0.0,
}
GOOD_PPO = {
    "objective__scores": lambda t: 0.1 + 1.5 * t,
    "objective__kl": lambda t: 6.0 * t,
    "completions__mean_length": lambda t: 20 + t,
    "completions__finished": lambda t: 0.95,
    "policy__clipfrac_avg": lambda t: 0.05,
    "policy__entropy_avg": lambda t: 1.1 - 0.5 * t,
    "skipped": lambda t: 0.0,
}
GOOD_REWARD = {
    "loss": lambda t: 0.7 - 0.2 * t,
    "accuracy": lambda t: 0.5 + 0.25 * t,
    "margin": lambda t: 0.7 * t,
    "mean_reward": lambda t: 0.3,
}
GOOD_SFT = {"loss": lambda t: 2.0 - t, "entropy": lambda t: 1.5 - t, "mean_token_accuracy": lambda t: 0.4 + 0.2 * t}
GOOD = [("dpo", GOOD_DPO), ("ppo", GOOD_PPO), ("reward", GOOD_REWARD), ("sft", GOOD_SFT)]


@pytest.mark.parametrize(("method", "curves"), GOOD)
def test_a_good_run_is_called_so_at_every_length(method: str, curves: dict[str, Callable[[float], float]]) -> None:
    whole = made(**curves)
    for steps in range(5, STEPS + 1):
        found = health(method, whole[:steps])
        assert [remark.level for remark in found] == ["good"], (steps, found)
    assert health(method, whole)[0].what.endswith("healthy.")


@pytest.mark.parametrize(("method", "curves"), GOOD)
def test_a_few_steps_say_nothing(method: str, curves: dict[str, Callable[[float], float]]) -> None:
    few = [Remark("watch", "Too few steps to say how it goes.", "Wait for 5 steps.")]
    assert health(method, made(**curves)[:4]) == few
    assert health(method, []) == few


def test_the_words_for_a_good_dpo_run() -> None:
    """A fifth of 40 steps is 8: margins over t = i/39 begin at a mean of 0.8 x 3.5/39 = 0.07 and end at 0.73."""
    (remark,) = health("dpo", made(**GOOD_DPO))
    assert remark.what == "Margins grow (0.07 to 0.73), chosen log-probs steady, accuracy 0.73: healthy."


def worst(method: str, curves: dict[str, Callable[[float], float]], **changed: Callable[[float], float]) -> Remark:
    return health(method, made(**(curves | changed)))[0]


def test_chosen_answers_that_become_less_likely() -> None:
    """50 -> 60 nats is more than a tenth; the fall is 0.5 of the margin at first, and 1.5 of it in the other run."""
    falling = worst("dpo", GOOD_DPO, logps__chosen=lambda t: -50 - 10 * t, rewards__chosen=lambda t: -0.4 * t)
    assert falling.level == "watch" and "Chosen log-probs fall" in falling.what and "learning rate" in falling.do
    assert "NLL" in falling.do
    far = worst("dpo", GOOD_DPO, logps__chosen=lambda t: -50 - 30 * t, rewards__chosen=lambda t: -0.4 * t)
    assert far.level == "bad" and "Chosen log-probs fall" in far.what  # 50 -> 80 is more than three tenths
    lost = worst("dpo", GOOD_DPO, logps__chosen=lambda t: -50 - 10 * t, rewards__chosen=lambda t: -1.2 * t)
    assert lost.level == "bad" and "more than the margin" in lost.what


def test_chosen_answers_that_fall_within_the_noise_are_not_flagged() -> None:
    """-50 -> -56 is more than a tenth, but neighbouring batches are 60 nats apart."""
    curves = GOOD_DPO | {"logps__chosen": wobbling(-50, -56, 60), "rewards__chosen": lambda t: -0.4 * t}
    assert [remark.level for remark in health("dpo", made(**curves))] == ["good"]


def test_an_accuracy_that_stays_at_a_coin_flip() -> None:
    stuck = worst("dpo", GOOD_DPO, rewards__accuracies=lambda t: 0.5, rewards__margins=lambda t: 0.01)
    assert stuck.level == "watch" and "0.5" in stuck.what and "contradictions" in stuck.do
    assert "Accuracy" in worst("reward", GOOD_REWARD, accuracy=lambda t: 0.52).what


def test_a_margin_below_0() -> None:
    turned = worst("dpo", GOOD_DPO, rewards__margins=lambda t: -0.2 * t)
    assert turned.level == "bad" and "margin" in turned.what


def test_kl_is_judged_by_the_token() -> None:
    """30 nats over 20 tokens are 1.5 a token, 60 are 3; over 200 tokens both are few."""
    near = {"completions__mean_length": lambda t: 20.0}
    assert worst("ppo", GOOD_PPO, objective__kl=lambda t: 30.0, **near).level == "watch"
    assert worst("ppo", GOOD_PPO, objective__kl=lambda t: 60.0, **near).level == "bad"
    long = {"completions__mean_length": lambda t: 200.0}
    assert worst("ppo", GOOD_PPO, objective__kl=lambda t: 60.0, **long).level == "good"


def test_score_kl_and_length_that_all_climb() -> None:
    hacking = worst("ppo", GOOD_PPO, completions__mean_length=lambda t: 20 + 30 * t)
    assert hacking.level == "watch" and "length" in hacking.what and "samples" in hacking.do


def test_an_entropy_that_collapses() -> None:
    assert worst("ppo", GOOD_PPO, policy__entropy_avg=lambda t: 1.1 - 1.09 * min(1.0, 1.5 * t)).level == "bad"
    falling = worst("dpo", GOOD_DPO, entropy=lambda t: 2.0 - 1.9 * min(1.0, 1.5 * t))
    assert falling.level == "watch" and "entropy" in falling.what


def test_a_score_that_does_not_climb() -> None:
    assert worst("ppo", GOOD_PPO, objective__scores=lambda t: 0.5).level == "watch"
    assert worst("ppo", GOOD_PPO, objective__scores=lambda t: 0.5 - t).level == "bad"


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_a_loss_that_does_not_fall(method: str) -> None:
    curves = dict(GOOD)[method]
    flat, rising = worst(method, curves, loss=lambda t: 2.0), worst(method, curves, loss=lambda t: 2.0 + t)
    assert (flat.level, rising.level) == ("watch", "bad")
    assert rising.do == "Lower the learning rate."


def test_steps_without_finite_numbers() -> None:
    """One of 40 steps is under a twentieth, 5 are over it; the newest step alone may be null in the file."""
    assert worst("sft", GOOD_SFT, skipped=lambda t: float(t > 0.5)).level == "watch"
    several = worst("sft", GOOD_SFT, skipped=lambda t: round(5 * t))
    assert several.level == "bad" and several.what.startswith("5 steps had no finite numbers and were left out")
    figures = made(**GOOD_SFT)
    figures[-1]["loss"] = None
    assert health("sft", figures)[0].what == "The last step had no finite loss."


def test_held_out_rows_that_get_worse() -> None:
    figures = made(**GOOD_SFT)
    for place, loss in ((10, 1.5), (20, 1.4), (30, 1.5), (39, 1.6)):
        figures[place]["eval_loss"] = loss
    assert "held-out" in health("sft", figures)[0].what


def test_choices_that_are_learned_by_heart() -> None:
    heart = worst("reward", GOOD_REWARD, loss=lambda t: 0.7 * (1 - t) ** 4, accuracy=lambda t: min(1.0, 0.5 + t))
    assert heart.level == "watch" and "by heart" in heart.what


def test_rollouts() -> None:
    assert "end by themselves" in worst("ppo", GOOD_PPO, completions__finished=lambda t: 0.2).what
    assert "clipped" in worst("ppo", GOOD_PPO, policy__clipfrac_avg=lambda t: 0.4).what
    assert "same" in worst("grpo", GOOD_PPO, frac_reward_zero_std=lambda t: 0.9).what
    assert "drift" in worst("reward", GOOD_REWARD, mean_reward=lambda t: 9 * t).what


def test_the_gravest_comes_first() -> None:
    found = health("ppo", made(**(GOOD_PPO | {"objective__kl": lambda t: 90.0, "policy__clipfrac_avg": lambda t: 0.4})))
    assert [remark.level for remark in found] == ["bad", "watch"]


def test_a_method_that_nobody_knew_is_judged_by_its_figures() -> None:
    assert health("kto", made(objective__kl=lambda t: 3.0))[0].level == "bad"
    assert health("kto", made(other=lambda t: 1.0)) == [Remark("good", "Nothing unusual so far.")]


def test_a_change_and_its_error() -> None:
    """Values 0, 1, 0, 1, ...: neighbours differ by 1, so the noise's variance is 1/2; over thirds of 3 values each the
    difference has the error sqrt(1/2) sqrt(2/3) = sqrt(1/3). First mean (0+1+0)/3, last (1+0+1)/3."""
    change = Series("sft", [{"x": i % 2} for i in range(12)]).change("x")
    assert change is not None
    assert change.error == pytest.approx(3**-0.5)
    assert (change.before, change.after) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert not change.rises and not change.falls
