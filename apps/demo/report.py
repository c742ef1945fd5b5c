"""The demo's figures as a table, `report.json`, `report.md` and `frontier.png`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank_align.evaluate.win_rate import WinRate

NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO, learned", "ppo_exact": "PPO, exact"}


@dataclass(frozen=True)
class PolicyFigures:
    """One policy on the held-out prompts."""

    score: float  # mean exact score
    kl: float  # to the SFT policy, nats an answer
    wins: WinRate  # against the SFT policy's answers
    tokens_per_second: float  # while answering
    peak_memory_bytes: int  # while it was trained


@dataclass(frozen=True)
class Report:
    """Everything that the demo measured."""

    model: str
    methods: dict[str, PolicyFigures]
    reward_accuracy: float
    reward_peak_bytes: int
    base_copies: int
    roles: list[str]
    samples: list[dict[str, str]]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        methods = {
            name: {
                "score": f.score,
                "kl": f.kl,
                "win_rate": f.wins.rate,
                "win_rate_interval": [f.wins.low, f.wins.high],
                "tokens_per_second": f.tokens_per_second,
                "peak_memory_bytes": f.peak_memory_bytes,
            }
            for name, f in self.methods.items()
        }
        return {
            "model": self.model,
            "methods": methods,
            "reward": {"accuracy": self.reward_accuracy, "peak_memory_bytes": self.reward_peak_bytes},
            "base_copies": self.base_copies,
            "roles": self.roles,
            "samples": self.samples,
            "seconds": self.seconds,
        }

    def rows(self) -> list[list[str]]:
        """The table, a row a method, the reward model after SFT."""
        found = []
        for name, f in self.methods.items():
            won = f"{f.wins.rate:.2f} ({f.wins.low:.2f}-{f.wins.high:.2f})"
            figures = [
                f"{f.score:+.2f}",
                f"{f.kl:.1f}",
                won,
                "",
                f"{f.tokens_per_second:.0f}",
                _mb(f.peak_memory_bytes),
            ]
            found.append([NAMES[name], *figures])
        reward = ["reward model", "", "", "", f"{self.reward_accuracy:.2f}", "", _mb(self.reward_peak_bytes)]
        return [found[0], reward, *found[1:]]


COLUMNS = ["", "score", "KL (nats)", "wins (95 %)", "accuracy", "tokens/s", "peak"]

LEGEND = (
    "PPO runs once with the learned reward and once with the exact score. Score: exact, by program. KL: to the SFT "
    "policy, in nats an answer. Wins: share of held-out prompts where the exact score is above that of SFT's own "
    "answer, a tie half, with Wilson's interval; SFT is held against other answers of its own. Accuracy: pairs of "
    "held-out answers that reward model and exact score order alike. Peak: of the process while it trained."
)


def print_report(report: Report, folder: Path, console: Console) -> None:
    """The table and three answers before and after."""
    table = Table(
        *COLUMNS,
        box=None,  # with lines between, 80 columns are too few
        title=f"{escape(report.model)}: {len(report.roles)} adapters on {_copies(report.base_copies)}",
    )
    for place, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if place else "left", True
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    for sample in report.samples:
        console.print(f"[bold]{escape(sample['prompt'])}[/bold]")
        for name in NAMES:
            console.print(f"  {NAMES[name]:<12} {escape(_line(sample[name]))}", soft_wrap=True)
    console.print(
        f"{report.seconds:.0f} s in all. {folder / 'report.md'}, {folder / 'report.json'}, {folder / 'frontier.png'}"
    )


def write_report(report: Report, folder: Path) -> None:
    """`report.json`, `report.md` and `frontier.png` into `folder`."""
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    _draw_frontier(report, folder / "frontier.png")


def _markdown(report: Report) -> str:
    lines = [f"# The demo on {report.model}", "", f"{len(report.roles)} adapters on {_copies(report.base_copies)}: "
             f"{', '.join(report.roles)}. {report.seconds:.0f} seconds in all.", ""]  # fmt: skip
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows()]
    lines += ["", LEGEND, ""]
    lines += ["![score against KL](frontier.png)", ""]
    for sample in report.samples:
        lines += [f"**{sample['prompt']}**", "", *(f"- {NAMES[name]}: {_line(sample[name])}" for name in NAMES), ""]
    return "\n".join(lines)


def _draw_frontier(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, f in report.methods.items():
        axes.plot(f.kl, f.score, "o", markersize=8)
        axes.annotate(NAMES[name], (f.kl, f.score), xytext=(6, -12), textcoords="offset points")
    axes.set(
        xlabel="KL to the SFT policy (nats an answer)",
        ylabel="exact score",
        title="What each method reaches, and how far it goes",
    )
    axes.margins(x=0.3, y=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _copies(count: int) -> str:
    return "one copy of the base" if count == 1 else f"{count} copies of the base"


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _line(text: str) -> str:
    return " ".join(text.split())
