"""How a run goes, in words, from the figures that it has logged: what is good, what is not, and what to do.

Pure functions of metric series under TRL's names. A change counts only where it stands out of the noise between steps.
Thresholds follow axolotl's training monitors where they have one: DPO accuracy from .5 to .7, chosen log-probs not
falling while the margin grows, groups without variance under .8, KL a token under .5 (over 2 is bad).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lowrank_align.studio.series import SETTLED_STEPS, Figures, Series

Level = Literal["good", "watch", "bad"]

FEW_STEPS = 5  # fewer say nothing
FALL_OF_MARGIN = (0.25, 1.0)  # the chosen answers' fall as a part of the margin: to watch, and bad
FALL_OF_LOGPS = (0.1, 0.3)  # of their log-probs, alike: a little is lost in every good run
LEAST_MARGIN = 0.05  # below it, a share of the margin is noise
STUCK_ACCURACY, LEARNT_ACCURACY = 0.55, 0.7
KL_A_TOKEN = (0.5, 2.0)  # nats
COLLAPSED_NATS, COLLAPSED_SHARE = 0.05, 0.2  # of entropy: nats a token, and what is left of the beginning's
MEMORISED_LOSS, MEMORISED_ACCURACY = 0.02, 0.99
OFF_CENTRE = 5.0
CLIPPED, SAME_SCORES, ENDLESS, LONGER = 0.3, 0.8, 0.5, 1.3

ACCURACIES = ("rewards/accuracies", "accuracy")
MARGINS = ("rewards/margins", "margin")
ENTROPIES = ("policy/entropy_avg", "entropy")
LOSS_IS_TELLING = ("sft", "reward")  # elsewhere the loss says little, or what the margins say better


@dataclass(frozen=True)
class Remark:
    """One thing about a run: `what` it is, and what to `do` about it, each a sentence."""

    level: Level
    what: str
    do: str = ""


def health(method: str, figures: Figures) -> list[Remark]:
    """Remarks on a run of `method`, the gravest first; exactly one where there is nothing to mind."""
    run = Series(method, figures)
    found = [remark for rule in RULES if (remark := rule(run)) is not None]
    found.sort(key=lambda remark: ("bad", "watch").index(remark.level))
    if run.steps < FEW_STEPS:
        return found or [Remark("watch", "Too few steps to say how it goes.", f"Wait for {FEW_STEPS} steps.")]
    return found or [Remark("good", _all_is_well(run))]


# ---- numbers


def _not_finite(run: Series) -> Remark | None:
    skipped = int(max(run.values("skipped"), default=0))
    if not run.last_is_finite("loss"):
        return Remark("bad", "The last step had no finite loss.", "Stop, lower the learning rate, and start again.")
    if not skipped:
        return None
    level: Level = "bad" if skipped > 0.05 * run.steps else "watch"
    what = f"{skipped} step{'s' * (skipped > 1)} had no finite numbers and {'were' if skipped > 1 else 'was'} left out."
    return Remark(level, what, "Lower the learning rate if it goes on.")


def _loss_not_falling(run: Series) -> Remark | None:
    change = run.change("loss")
    if change is None or run.method not in LOSS_IS_TELLING or change.falls:
        return None
    moved = f"{change.before:.3g} to {change.after:.3g}"
    if change.rises:
        return Remark("bad", f"The loss rises ({moved}).", "Lower the learning rate.")
    do = "Raise the learning rate or the rounds, unless the model knew these rows before."
    return Remark("watch", f"The loss does not fall ({moved}).", do)


def _held_out_rises(run: Series) -> Remark | None:
    values = run.values("eval_loss")
    if len(values) < 3 or not (values[-1] > values[-2] > min(values)):
        return None
    what = (
        f"The loss on held-out rows rises again ({min(values):.3g} to {values[-1]:.3g}): it learns the rows by heart."
    )
    return Remark("watch", what, "Stop here, train for fewer rounds, or set early_stopping.")


# ---- comparisons (reward models, DPO and relatives)


def _stuck(run: Series) -> Remark | None:
    name = run.first_of(ACCURACIES)
    accuracy = run.last(name) if name else None
    change = run.change(name)
    if accuracy is None or change is None or change.rises or accuracy > STUCK_ACCURACY:
        return None
    what = f"Accuracy stays near 0.5 (now {accuracy:.2f}): the choices are not learned."
    return Remark(
        "watch", what, "Raise the learning rate or the rounds; if that changes nothing, look for contradictions."
    )


def _margin_not_positive(run: Series) -> Remark | None:
    name = run.first_of(MARGINS)
    margin = run.last(name) if name else None
    if name is None or margin is None or len(run.values(name)) < SETTLED_STEPS or margin > 0:
        return None
    return Remark("bad", f"The margin is not above 0 ({margin:.3g}): it learns nothing, or the opposite.",
                  "Look at a few pairs: is the better answer the chosen one?")  # fmt: skip


def _chosen_fall(run: Series) -> Remark | None:
    """The chosen answers become less likely, and the margin grows only because the rejected ones fall faster."""
    margin, chosen = run.last("rewards/margins"), run.last("rewards/chosen")
    if margin is None or margin <= 0 or run.steps < FEW_STEPS:
        return None
    do = "Lower the learning rate, raise beta, or add an NLL term on the chosen answers where the loss has one."
    share = -chosen / margin if chosen is not None and margin >= LEAST_MARGIN else 0.0
    if share >= FALL_OF_MARGIN[1]:
        what = f"Chosen log-probs fall by more than the margin grows (reward {chosen:.2f}, margin {margin:.2f})."
        return Remark("bad", what, do)
    logps = run.change("logps/chosen")
    if logps is None or not logps.falls or logps.before - logps.after < FALL_OF_LOGPS[0] * abs(logps.before):
        return None
    if chosen is not None and share < FALL_OF_MARGIN[0]:
        return None
    moved = f"{logps.before:.1f} to {logps.after:.1f} nats"
    lost = logps.before - logps.after >= FALL_OF_LOGPS[1] * abs(logps.before)
    what = f"Chosen log-probs fall ({moved}) while the margin grows ({margin:.2f})."
    return Remark("bad" if lost else "watch", what, do)


def _memorised(run: Series) -> Remark | None:
    name = run.first_of(ACCURACIES)
    change, accuracy = run.change("loss"), run.last(name) if name else None
    if change is None or accuracy is None or accuracy < MEMORISED_ACCURACY or change.after > MEMORISED_LOSS:
        return None
    return Remark("watch", f"Every choice is fitted (loss {change.after:.2g}): more rounds learn them by heart.",
                  "Stop here, or train for fewer rounds.")  # fmt: skip


def _scores_run_off(run: Series) -> Remark | None:
    mean = run.last("mean_reward")
    if mean is None or abs(mean) < OFF_CENTRE:
        return None
    return Remark("watch", f"The scores drift away from 0 (mean {mean:.1f}).", "Raise centering_coefficient.")


# ---- rollouts (PPO and relatives)


def _kl_high(run: Series) -> Remark | None:
    kl, length = run.last("objective/kl"), run.last("completions/mean_length")
    if kl is None:
        return None
    a_token = kl / max(1.0, length or 1.0) if length is not None else kl
    if a_token < KL_A_TOKEN[0]:
        return None
    shown = f"{kl:.1f} nats an answer, {a_token:.2f} a token" if length is not None else f"{kl:.1f} nats"
    do = "Raise the KL coefficient, set target_kl, or lower the learning rate."
    if a_token < KL_A_TOKEN[1]:
        return Remark("watch", f"The policy is far from its reference (KL {shown}).", do)
    return Remark("bad", f"The policy has left its reference (KL {shown}).", do)


def _hacking(run: Series) -> Remark | None:
    score, kl = run.change("objective/scores"), run.change("objective/kl")
    length = run.change("completions/mean_length")
    if not (score and kl and length and score.rises and kl.rises and length.rises):
        return None
    if length.after < LONGER * length.before:
        return None
    what = (
        f"Score, KL and length all climb ({length.before:.0f} to {length.after:.0f} tokens): does it only write more?."
    )
    return Remark("watch", what, "Read the samples; if they only got longer, raise the KL coefficient.")


def _score_flat(run: Series) -> Remark | None:
    change = run.change("objective/scores", 2 * SETTLED_STEPS)
    if change is None or change.rises:
        return None
    moved = f"{change.before:.2f} to {change.after:.2f}"
    if change.falls:
        return Remark("bad", f"The score falls ({moved}).", "Lower the learning rate, or check the reward model.")
    return Remark("watch", f"The score does not climb ({moved}).", "Raise the learning rate or the batch size.")


def _endless(run: Series) -> Remark | None:
    finished = run.last("completions/finished")
    if finished is None or run.steps < FEW_STEPS or finished > ENDLESS:
        return None
    what = f"Only {100 * finished:.0f} % of the answers end by themselves."
    return Remark("watch", what, "Raise max_new_tokens, or missing_eos_penalty; or start from an SFT run.")


def _clipped(run: Series) -> Remark | None:
    share = run.last("policy/clipfrac_avg")
    if share is None or share < CLIPPED:
        return None
    return Remark("watch", f"{100 * share:.0f} % of the tokens are clipped: the steps are too large.",
                  "Lower the learning rate or ppo_epochs.")  # fmt: skip


def _no_variance(run: Series) -> Remark | None:
    share = run.last("frac_reward_zero_std")
    if share is None or share < SAME_SCORES:
        return None
    return Remark("watch", f"In {100 * share:.0f} % of the groups all answers score the same: nothing to learn from.",
                  "Raise the temperature, or take prompts that are neither too easy nor too hard.")  # fmt: skip


def _collapse(run: Series) -> Remark | None:
    """For demonstrations a low entropy is the aim; of a policy that is asked for its own answers it is the end."""
    name = run.first_of(ENTROPIES)
    entropy = run.last(name) if name else None
    if name is None or entropy is None or run.method in LOSS_IS_TELLING:
        return None
    change = run.change(name)
    do = "Lower the learning rate, or raise beta or the KL coefficient."
    if entropy < COLLAPSED_NATS and change is not None and change.falls:
        return Remark("bad", f"The entropy has collapsed ({entropy:.2g} nats a token): every answer is the same.", do)
    if change is not None and change.falls and change.after < COLLAPSED_SHARE * change.before:
        what = f"The entropy falls fast ({change.before:.2g} to {change.after:.2g} nats a token)."
        return Remark("watch", what, do)
    return None


RULES: tuple[Callable[[Series], Remark | None], ...] = (
    _not_finite, _margin_not_positive, _chosen_fall, _stuck, _kl_high, _hacking, _collapse, _score_flat,
    _loss_not_falling, _held_out_rises, _memorised, _scores_run_off, _endless, _clipped, _no_variance,
)  # fmt: skip


# ---- nothing to mind


def _all_is_well(run: Series) -> str:
    said = list(_good_signs(run))
    return f"{_sentence(said)}: healthy." if said else "Nothing unusual so far."


def _good_signs(run: Series) -> Iterator[str]:
    name = run.first_of(MARGINS)
    margins, accuracy = run.change(name, FEW_STEPS), run.last(run.first_of(ACCURACIES) or "")
    if margins is not None and margins.rises:
        yield f"margins grow ({margins.before:.2f} to {margins.after:.2f})"
    if margins is not None and run.values("rewards/chosen"):
        yield "chosen log-probs steady"
    if accuracy is not None and accuracy >= LEARNT_ACCURACY:
        yield f"accuracy {accuracy:.2f}"
    score, kl = run.change("objective/scores", FEW_STEPS), run.last("objective/kl")
    if score is not None and score.rises:
        yield f"the score climbs ({score.before:.2f} to {score.after:.2f})"
    if kl is not None:
        yield f"KL low ({kl:.1f} nats)"
    loss = run.change("loss", FEW_STEPS)
    if loss is not None and loss.falls and run.method in LOSS_IS_TELLING:
        yield f"the loss falls ({loss.before:.3g} to {loss.after:.3g})"


def _sentence(parts: Sequence[str]) -> str:
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]
