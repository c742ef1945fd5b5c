"""SFT, sampled pairs, a reward model, DPO and PPO on one base in one process, then one table.

The annotator is simulated: it sees the exact score of two answers and prefers the better one with Bradley-Terry noise.
So every method can be held against the truth, which no real preference data allows.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_align.apps.demo.report import PolicyFigures, Report, print_report, write_report
from rich.console import Console

from lowrank_align.base import Base
from lowrank_align.config import METHODS, PPOSettings, resolve
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import UserError
from lowrank_align.evaluate.policy import Answers, answer, kl_to, pair_accuracy, reward_scores
from lowrank_align.evaluate.win_rate import win_rate
from lowrank_align.memory import peak_bytes, reset_peak
from lowrank_align.out_folders import refuse_protected
from lowrank_align.presets import read_preset
from lowrank_align.progress import Progress
from lowrank_align.rewards import RewardFunction, load_function
from lowrank_align.runs import empty
from lowrank_align.tiny import demonstrations, prompts, simulated_pairs, tiny_path
from lowrank_align.train import train

EXACT = "lowrank_align.tiny:exact_score"
PROMPTS, HELD_OUT, DEMONSTRATIONS = 1200, 200, 600
ANNOTATOR_TEMPERATURE = 0.5
QUICK_SHARE = 10
MARKER = ".demo"


@dataclass
class Demo:
    """What the stages share: the base, the prompts, and the figures so far."""

    base: Base
    out: Path
    score_name: str
    score: RewardFunction
    console: Console
    seed: int
    share: int  # 1, or how many times smaller everything is
    train_prompts: list[str]
    held_out: list[str]
    max_new_tokens: int
    preset: str | None = None  # without one, the embedded base's settings serve every model
    figures: dict[str, PolicyFigures] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def renderer(self) -> Renderer:
        return Renderer(self.base.tokenizer, max_length=self.base.context_tokens)

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return [self.renderer.prompt_ids(parse_row({"prompt": text}, "demo", i)) for i, text in enumerate(texts)]


def run_demo(
    out: str, model: str | None, preset: str | None, score: str | None, quantize: Any, quick: bool, seed: int
) -> int:
    """The command; 0 when done. An older demo in `out` is replaced, anything else there is a UserError."""
    console, began = Console(highlight=False), time.perf_counter()
    settings = read_preset(preset or "tiny")
    model = model or settings.model
    if score is None and model != "tiny":
        raise UserError(
            f"demo: {model} needs --score module:function, the exact score of answers to review prompts; tiny has one"
        )
    function = load_function(score or EXACT)
    folder = Path(out)
    if model == "tiny":
        _build_tiny(console)
    console.rule("one base, loaded once")
    base = Base.load(model, quantize=quantize)
    _clear(folder)
    console.print(f"{model}, {quantize}: {base.frozen_bytes() / 1e6:.2f} MB of frozen weights, {base.layout} rows")
    share = QUICK_SHARE if quick else 1
    demo = Demo(
        base,
        folder,
        score or EXACT,
        function,
        console,
        seed,
        share,
        prompts(PROMPTS // share, seed=seed),
        prompts(HELD_OUT // share, seed=seed + 1_000_003),
        int(settings.knobs("ppo").get("max_new_tokens", PPOSettings.model_fields["max_new_tokens"].default)),
        preset,
    )
    _sft(demo)
    pairs = _label(demo)
    accuracy = _reward(demo, pairs)
    _align(demo, "dpo", "dpo", data=str(pairs), adapter=str(folder / "sft"))
    _align(demo, "ppo", "ppo", reward=str(folder / "reward"))
    _align(demo, "ppo", "ppo_exact", reward=demo.score_name)
    report = _measure(demo, accuracy, time.perf_counter() - began)
    write_report(report, folder)
    print_report(report, folder, console)
    return 0


def _sft(demo: Demo) -> None:
    rows = demonstrations(DEMONSTRATIONS // demo.share, seed=demo.seed)
    _write_rows(demo.out / "demonstrations.jsonl", rows)
    _train(demo, "sft", "sft", data=str(demo.out / "demonstrations.jsonl"))
    demo.base.add_role("sft", start_from=demo.out / "sft", trainable=False)


def _label(demo: Demo) -> Path:
    """Two answers a prompt by the SFT policy, labelled by the simulated annotator."""
    demo.console.rule("pairs: two answers each, a simulated annotator decides")
    ids = demo.prompt_ids(demo.train_prompts)
    a, b = (_answers(demo, "sft", ids, seed=demo.seed + side) for side in (1, 2))
    scores = [demo.score(demo.train_prompts, side.texts) for side in (a, b)]
    rows = simulated_pairs(
        demo.train_prompts, a.texts, b.texts, scores[0], scores[1],
        temperature=ANNOTATOR_TEMPERATURE, seed=demo.seed,
    )  # fmt: skip
    _write_rows(demo.out / "pairs.jsonl", rows)
    chosen, rejected = (
        demo.score([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected")
    )
    right = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(rows)
    demo.console.print(f"{len(rows)} pairs; the annotator prefers the better answer in {right:.0%} of them")
    return demo.out / "pairs.jsonl"


def _reward(demo: Demo, pairs: Path) -> float:
    """Train the reward model; its accuracy against the exact score on pairs of answers to held-out prompts."""
    _train(demo, "reward", "reward", data=str(pairs), adapter=str(demo.out / "sft"))
    demo.base.add_role("judge", start_from=demo.out / "reward", trainable=False)
    ids = demo.prompt_ids(demo.held_out)
    sides = [_answers(demo, "sft", ids, seed=demo.seed + 10 + side) for side in (1, 2)]
    learned = [reward_scores(demo.base, "judge", side.rollouts) for side in sides]
    exact = [demo.score(demo.held_out, side.texts) for side in sides]
    return pair_accuracy(learned[0], learned[1], exact[0], exact[1])


def _align(demo: Demo, method: str, name: str, **knobs: str) -> None:
    if method == "ppo":
        file = demo.out / "prompts.jsonl"
        _write_rows(file, [{"prompt": text} for text in demo.train_prompts])
        knobs |= {"prompts": str(file)}
    _train(demo, method, name, **{"adapter": str(demo.out / "sft")} | knobs)
    demo.base.add_role(name, start_from=demo.out / name, trainable=False)


def _measure(demo: Demo, accuracy: float, seconds: float) -> Report:
    """Every policy on the held-out prompts, against SFT's answers to them."""
    demo.console.rule("every policy on prompts it has not seen")
    ids = demo.prompt_ids(demo.held_out)
    baseline = _answers(demo, "sft", ids, seed=demo.seed + 20)
    baseline_scores = demo.score(demo.held_out, baseline.texts)
    texts: dict[str, list[str]] = {}
    for name in ("sft", "dpo", "ppo", "ppo_exact"):
        answers = _answers(demo, name, ids, seed=demo.seed + 30)
        scores = demo.score(demo.held_out, answers.texts)
        texts[name] = answers.texts
        demo.figures[name] = PolicyFigures(
            score=sum(scores) / len(scores),
            kl=kl_to(demo.base, name, "sft", answers.rollouts) if name != "sft" else 0.0,
            wins=win_rate(scores, baseline_scores),
            tokens_per_second=answers.tokens_per_second,
            peak_memory_bytes=demo.peaks[name],
        )
    samples = [
        {"prompt": prompt, **{name: texts[name][i] for name in texts}} for i, prompt in enumerate(demo.held_out[:3])
    ]
    copies = demo.base.copies_in_memory()
    roles = [role for role in demo.base.roles if role != "base"]
    return Report(demo.base.name, demo.figures, accuracy, demo.peaks["reward"], copies, roles, samples, seconds)


def _train(demo: Demo, method: str, name: str, **knobs: str) -> None:
    demo.console.rule(
        {"ppo": "PPO with the learned reward", "ppo_exact": "PPO with the exact score"}.get(name, name.upper())
    )
    found = read_preset(demo.preset or "tiny")
    preset = {"preset": demo.preset} if demo.preset else dict(found.methods[method])
    if steps := found.knobs(method).get("max_steps"):
        preset["max_steps"] = max(2, steps // demo.share)
    settings = resolve(
        METHODS[method],
        {
            "sample_steps": 0,
            "seed": demo.seed,
            **preset,
            **knobs,
            "model": demo.base.name,
            "quantize": demo.base.quantize,
            "out": str(demo.out / name),
        },
    )
    reset_peak(demo.base.device)
    train(settings, base=demo.base, progress=Progress(demo.console))
    demo.peaks[name] = peak_bytes(demo.base.device)


def _answers(demo: Demo, role: str, ids: list[list[int]], seed: int) -> Answers:
    return answer(demo.base, role, demo.renderer, ids, max_new_tokens=demo.max_new_tokens, seed=seed)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _build_tiny(console: Console) -> None:
    """Pretrain the embedded base where it is not cached yet, with a line now and then."""

    def tell(step: int, steps: int, loss: float) -> None:
        if step == 1 or step % 50 == 0:
            console.print(f"pretraining tiny: step {step}/{steps}, loss {loss:.3f}")

    tiny_path(progress=tell)


def _clear(folder: Path) -> None:
    """Make way for a new demo: an older one goes, anything else stays and is a UserError."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise UserError(f"{folder}: holds files that no demo wrote; choose another --out")
        refuse_protected(folder)
        empty(folder)  # also where it is a link to another disk
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("made by lowrank-align demo; replaced by the next one\n", encoding="utf-8")
