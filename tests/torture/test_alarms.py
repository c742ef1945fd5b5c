"""The three alarms on made-up series of many shapes, and on real runs that go wrong or well."""

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.alarms import WINDOW, Alarm, HackingWatch, KLWatch, LikelihoodWatch
from lowrank_align.errors import Stopped
from lowrank_align.stopping import StopSignals
from tests.notes import Notes

SECTION = "Numbers"
BAD, HEALTHY = "of made-up runs that go wrong", "of made-up healthy runs"
Figures = Iterator[tuple[float, ...]]
Shape = Callable[[random.Random], Figures]


# ---- made-up curves: figures of each step, with the noise of a batch


def noisy(draw: random.Random, value: float, share: float) -> float:
    return value * (1 + draw.gauss(0, share))


def saturating(t: float, pace: float) -> float:
    return 1 - math.exp(-t / pace)


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, t))))


def hacking(kind: int) -> Shape:
    """Score, KL and length climb: along a line, ever faster, levelling off, after a while, or in two goes."""

    def series(draw: random.Random) -> Figures:
        length, steps, begin = draw.uniform(20, 200), 60, draw.randrange(0, 20)
        growth, noise = draw.uniform(1.0, 3.0), draw.uniform(0.005, 0.02)
        for t in range(steps):
            late = max(0, t - begin)
            by = (
                late / 40,
                (1.05**late - 1) / 6,
                saturating(late, 12),
                sigmoid((t - 30) / 4),
                sigmoid((t - 15) / 3) / 2 + sigmoid((t - 45) / 3) / 2,
            )[kind]
            yield (
                draw.gauss(0, 0.05) + 3 * by,
                noisy(draw, 0.05 + 8 * by, 0.05),
                noisy(draw, length * (1 + growth * by), noise),
            )

    return series


def honest(kind: int) -> Shape:
    """The score climbs with KL: along a line, levelling off, in an S; lengths wander, shrink, or the score stands."""

    def series(draw: random.Random) -> Figures:
        length, pace, top = draw.uniform(20, 300), draw.uniform(15, 60), draw.uniform(1, 20)
        wander, noise = 0.0, draw.uniform(0.02, 0.06)
        for t in range(120):
            by = (t / 120, saturating(t, pace), sigmoid((t - 50) / 10), saturating(t, pace), 0.0)[kind]
            wander = 0.9 * wander + draw.gauss(0, 0.01)
            shrinks = 0.7 + 0.3 * math.exp(-t / 40) if kind == 3 else 1.0
            spike = 3.0 if draw.random() < 0.02 else 1.0
            yield (
                draw.gauss(0, 0.1) + 2 * by,
                noisy(draw, 0.02 + top * by, 0.15) * spike,
                noisy(draw, length * shrinks * (1 + wander), noise),
            )

    return series


def blow_up(kind: int) -> Shape:
    """KL in nats an answer, and tokens: it doubles and doubles, jumps, runs along a line, begins too high, swings."""

    def series(draw: random.Random) -> Figures:
        length, level, begin = draw.uniform(8, 300), draw.uniform(0.02, 0.2), draw.randrange(15, 60)
        for t in range(100):
            late = max(0, t - begin)
            usual = level * saturating(t, 15)
            token = (
                usual + 0.005 * (2 ** min(12.0, late / 5) - 1),
                usual if t < begin else draw.uniform(2, 4),
                0.02 * t if t < begin else 0.02 * begin + 0.06 * late,
                3 * saturating(t + 1, 4),
                usual + (0 if t < begin else (1.5 + math.sin(t / 3)) * 2),
            )[kind]
            yield noisy(draw, token * length, 0.2), noisy(draw, length, 0.05)

    return series


def steady(kind: int) -> Shape:
    """KL levels off, climbs slowly, in an S, has spikes of one step, or is so small that its estimate is below 0."""

    def series(draw: random.Random) -> Figures:
        length, level, pace = draw.uniform(8, 400), draw.uniform(0.02, 0.35), draw.uniform(10, 50)
        swing = draw.uniform(0, 0.3)
        for t in range(200):
            by = (saturating(t, pace), t / 200, sigmoid((t - 60) / draw.uniform(5, 8)), saturating(t, pace), 0.02)[kind]
            spike = draw.uniform(3, 10) if kind == 3 and draw.random() < 0.04 else 1.0
            token = level * by * (1 + swing * math.sin(t / 12))
            yield noisy(draw, token * length, 0.25) * spike + draw.gauss(0, 0.05), noisy(draw, length, 0.05)

    return series


def displaced(kind: int, known: bool) -> Shape:
    """The chosen lose log-probability, the rejected more: along a line, ever faster, after a rise, in a fall, in leaps.

    Nats an answer beside the start's of the same answers, or, where nobody knows it, nats a token.
    """

    def series(draw: random.Random) -> Figures:
        start, depth = draw.uniform(20, 300) if known else draw.uniform(0.8, 3), draw.uniform(0.6, 3)
        for t in range(80):
            fall = (
                depth
                * (
                    t / 60,
                    (1.06**t - 1) / 40,
                    t / 50 - 0.3 * sigmoid((20 - t) / 4),
                    saturating(t, 20),
                    0.2 * (t // 15),
                )[kind]
            )
            batch = noisy(draw, start, 0.2 if known else 0.08)
            chosen = -batch * (1 + fall)
            margin = noisy(draw, 0.1 * abs(fall) * start + 0.02 * t, 0.2)
            yield (chosen, margin, -batch) if known else (chosen, margin)

    return series


def kept(kind: int, known: bool) -> Shape:
    """The chosen gain, stay, lose a little, lose a little and gain it back, or fall with their margins."""

    def series(draw: random.Random) -> Figures:
        start, noise = draw.uniform(20, 300) if known else draw.uniform(0.8, 3), draw.uniform(0.03, 0.1)
        for t in range(150):
            fall = (
                -0.4 * saturating(t, 40),
                0.0,
                0.08 * saturating(t, 30),
                0.15 * math.sin(t / 48),
                0.4 * saturating(t, 40),
            )[kind]
            batch = noisy(draw, start, 0.25 if known else noise)
            spike = 1.5 if draw.random() < 0.02 else 1.0
            chosen = -batch * (1 + draw.gauss(fall, 0.02)) * spike
            margin = draw.gauss(-0.2, 0.02) if kind == 4 else noisy(draw, 2 * saturating(t, 40), 0.3)
            yield (chosen, margin, -batch) if known else (chosen, margin)

    return series


CASES: dict[str, tuple[Callable[[], Alarm], list[Shape], list[Shape]]] = {
    "an exploited reward": (HackingWatch, [hacking(k) for k in range(5)], [honest(k) for k in range(5)]),
    "KL that blows up": (lambda: KLWatch("--beta"), [blow_up(k) for k in range(5)], [steady(k) for k in range(5)]),
    "chosen answers that become unlikely": (
        LikelihoodWatch, [displaced(k, True) for k in range(5)], [kept(k, True) for k in range(5)],
    ),
    "the same without a reference": (
        LikelihoodWatch, [displaced(k, False) for k in range(5)], [kept(k, False) for k in range(5)],
    ),
}  # fmt: skip
# Why a healthy one is flagged now and then.
CHANCES = {
    "an exploited reward": "answers wandered longer for a window, while score and KL climbed honestly",
    "KL that blows up": "three steps of five were spikes",
    "the same without a reference": "answers of the first steps, which stand for the start, were likelier than most",
}


def told(alarm: Any, figures: Figures) -> list[int]:
    """The steps at which a line is told."""
    return [step for step, seen in enumerate(figures) if alarm.add(*seen)]


def runs(shapes: list[Shape], count: int, name: str) -> Iterator[Figures]:
    for i in range(count):
        yield shapes[i % len(shapes)](random.Random(f"{name} {i}"))


@pytest.mark.parametrize("name", CASES)
def test_made_up_runs(name: str, times: Any, tally: Any) -> None:
    """All of the bad ones are flagged, and at most one of fifty healthy ones."""
    make, bad, healthy = CASES[name]
    many, more = times(10, 200), times(50, 1000)
    found = [bool(told(make(), figures)) for figures in runs(bad, many, "bad")]
    wrong = [i for i, figures in enumerate(runs(healthy, more, "healthy")) if told(make(), figures)]
    tally(SECTION, f"{name}: {BAD}", "flagged", held=sum(found), of=many)
    tally(
        SECTION, f"{name}: {HEALTHY}", "at most one of fifty flagged", held=more - len(wrong), of=more,
        note=f"by chance {CHANCES[name]}; {more // 50} may be" if wrong else "",
    )  # fmt: skip
    assert all(found), [i % len(bad) for i, one in enumerate(found) if not one]
    assert len(wrong) <= more // 50, [i % len(healthy) for i in wrong]


def test_a_target_that_is_missed() -> None:
    """30 nats an answer of 100 tokens are no blow-up; with a target of 6 they are, with one of 20 not."""
    steady = [(30.0, 100.0)] * 20
    assert told(KLWatch("--beta"), iter(steady)) == []
    assert told(KLWatch("--kl-coefficient", 6.0), iter(steady)) == [4]
    assert told(KLWatch("--kl-coefficient", 20.0), iter(steady)) == []


@pytest.mark.parametrize("name", CASES)
def test_told_once_and_again_after_a_quiet_window(name: str) -> None:
    """While it lasts, one line; after a healthy window and a relapse, a second."""
    make, _, _ = CASES[name]
    wild, calm = {
        "an exploited reward": ([(t, t, 10 + t) for t in range(30)], [(30.0, 30.0, 40.0)] * 40),
        "KL that blows up": ([(200.0, 100.0)] * 30, [(5.0, 100.0)] * 40),
        "chosen answers that become unlikely": ([(-90.0, 3.0, -60.0)] * 30, [(-60.0, 3.0, -60.0)] * 40),
        "the same without a reference": ([(-1.0, 0.0)] * WINDOW + [(-2.0, 3.0)] * 30, [(-1.0, 3.0)] * 40),
    }[name]
    again = wild[WINDOW:] if "without" in name else wild
    later = [(t + 30, t + 30, t + 40) for t in range(30)] if "exploited" in name else again
    assert len(told(make(), iter([*wild, *calm]))) == 1
    assert len(told(make(), iter([*wild, *calm, *later]))) == 2


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_alarm_goes_on(name: str) -> None:
    """Cut anywhere, its state through JSON: it says what it would have said; steps without numbers say nothing."""
    make, bad, _ = CASES[name]
    for cut in range(0, 60, 7):
        series = list(bad[cut % len(bad)](random.Random(cut)))
        series[20:20] = [(math.nan,) * len(series[0]), (math.inf,) * len(series[0])]
        whole, first, second = make(), make(), make()
        said, before = told(whole, iter(series)), told(first, iter(series[:cut]))
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert before + [cut + step for step in told(second, iter(series[cut:]))] == said
        assert second.state_dict() == whole.state_dict()


# ---- real runs

PAIRS = [{"prompt": f"{i}. Say: ", "chosen": f"a good word {i}", "rejected": f"a bad word {i}"} for i in range(8)]
SHORT = [
    {"prompt": f"{i}. Say: ", "completion": word} for i, word in enumerate(("ba", "cab", "da", "bad", "ad", "fab"))
]
PROMPTS = [{"prompt": row["prompt"]} for row in SHORT]
STEADY = {"lr_schedule": "constant", "warmup_ratio": 0.0, "rank": 4}
SAMPLED = {"reward": "builtins:letters", "max_new_tokens": 20, "missing_eos_penalty": 0.0}

Run = Callable[..., Path]


def figure(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def short(run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy that has learned answers of two or three letters; `builtins:letters` counts the `a` in them."""
    monkeypatch.setattr("builtins.letters", lambda prompts, texts: [float(t.count("a")) for t in texts], raising=False)
    monkeypatch.setattr("builtins.briefly", lambda prompts, texts: [float("b" in t[:3]) for t in texts], raising=False)
    return run("sft", SHORT, "short", max_steps=60, batch_size=6, micro_batch_size=6, learning_rate=1e-2, **STEADY)


@pytest.fixture
def learned(run: Run) -> Path:
    """A policy that knows both answers of each pair, so that there is something to lose."""
    rows = [{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS for side in ("chosen", "rejected")]
    return run("sft", rows, "learned", max_steps=40, batch_size=8, micro_batch_size=8, learning_rate=1e-2, **STEADY)


REAL = "real runs, of each kind one that goes wrong and one that goes well"


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_dpo_at_a_rate_far_too_high(loss: str, run: Run, learned: Path, tally: Any) -> None:
    """With a reference and without: one line, and the figure is 1 from there on; at a fair rate, nothing."""
    progress, quiet = Notes(), Notes()
    knobs = {**STEADY, "loss": loss, "adapter": str(learned), "max_steps": 32, "batch_size": 8, "micro_batch_size": 8}
    knobs |= {"beta": 2.0} if loss == "simpo" else {}
    bad = figure(run("dpo", PAIRS, "bad", learning_rate=0.03, progress=progress, **knobs), "likelihood_displacement")
    good = figure(run("dpo", PAIRS, "good", learning_rate=1e-4, progress=quiet, **knobs), "likelihood_displacement")
    lines = [note for note in progress.notes if "likelihood displacement" in note]
    held = (max(bad) == 1 and len(lines) == 1) + (max(good) == 0 and not any("displacement" in n for n in quiet.notes))
    tally(SECTION, REAL, "the wrong one told, once", held=held, of=2)
    assert len(lines) == 1 and bad.count(1.0) > 1, bad
    assert "--learning-rate" in lines[0] and "--beta" in lines[0]
    assert max(good) == 0, quiet.notes


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_paid_by_the_letter(method: str, run: Run, short: Path, tally: Any) -> None:
    """A reward that counts a letter, with KL for nothing: answers fill with it, and both alarms say so, once each."""
    knobs = {**SAMPLED, **STEADY, "adapter": str(short), "max_steps": 20, "micro_batch_size": 24}
    own: dict[str, Any] = {"batch_size": 24, "minibatches": 1, "ppo_epochs": 1, "kl_coefficient": 0.0}
    knobs |= own if method == "ppo" else {"batch_size": 6, "group_size": 6, "beta": 1e-9}
    progress, quiet = Notes(), Notes()
    folder = run(method, PROMPTS, "bad", learning_rate=3e-3, progress=progress, **knobs)
    hacked, blown = (figure(folder, name) for name in ("reward_hacking", "kl_blow_up"))
    lines = [[n for n in progress.notes if words in n] for words in ("exploiting the reward", "KL has blown up")]
    knobs |= {"kl_coefficient": 0.2} if method == "ppo" else {"beta": 0.2}
    fair = run(method, PROMPTS, "good", learning_rate=3e-4, progress=quiet, **knobs | {"reward": "builtins:briefly"})
    alarms = figure(fair, "reward_hacking") + figure(fair, "kl_blow_up")
    held = max(hacked) == 1 and max(blown) == 1 and [len(found) for found in lines] == [1, 1]
    tally(SECTION, REAL, "the wrong one told, once", held=held + (max(alarms) == 0), of=2)
    assert max(hacked) == max(blown) == 1, (hacked, blown)
    assert [len(found) for found in lines] == [1, 1], progress.notes
    assert ("--kl-coefficient" if method == "ppo" else "--beta") in lines[1][0]
    assert max(alarms) == 0, quiet.notes


def test_alarms_over_a_resume(run: Run, learned: Path) -> None:
    """Stopped in the middle of what begins to be alarming: the figures and the one line are those of a whole run."""
    knobs = {
        **STEADY,
        "max_steps": 20,
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 0.03,
        "adapter": str(learned),
    }
    whole, before, after = Notes(), Notes(), Notes()
    expected = figure(run("dpo", PAIRS, "whole", progress=whole, **knobs), "likelihood_displacement")
    begins = expected.index(1.0)
    stop = StopSignals()
    before.stop, before.at = stop, begins - 1
    with pytest.raises(Stopped):
        run("dpo", PAIRS, "run", progress=before, stop=stop, **knobs)
    assert figure(run("dpo", PAIRS, "run", progress=after, resume=True, **knobs), "likelihood_displacement") == expected
    lines = [[n for n in notes.notes if "displacement" in n] for notes in (whole, before, after)]
    assert lines[0] == lines[1] + lines[2] and len(lines[0]) == 1
