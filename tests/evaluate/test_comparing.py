"""Two voices before judges, without a model: what of the same answers is never won or lost."""

from typing import Any

import pytest

from lowrank_align.data.formats import parse_row
from lowrank_align.evaluate.answers import Asked, Side
from lowrank_align.evaluate.comparing import ask_judges, report_comparison
from lowrank_align.evaluate.report import Report
from lowrank_align.trees import Completion, TreeRow

END = 9
ASKED = [Asked(parse_row({"prompt": f"{i}?"}, "f:1", i), [1], f"{i}?") for i in range(3)]


def side(name: str, texts: list[str], ids: list[list[int]]) -> Side:
    return Side(name, texts, [TreeRow([1], [Completion(one, [True] * len(one))]) for one in ids])


OURS = side("ours", ["same", "cut", "x"], [[2, END], [3], [4]])
THEIRS = side("theirs", ["same", "cut", "y"], [[2, END], [3, END], [5]])


def test_rounding_decides_nothing_between_the_same_tokens() -> None:
    """Scores 1 and 1 + 1e-7 of the same tokens: a tie, difference 0. The second answer says the same but ended on
    their side alone, which a reward run may well see: 0 against 1 is lost. The third is won by 2. (0 - 1 + 2) / 3."""
    report = Report()
    found = report_comparison(
        report, ASKED, OURS, THEIRS, {"run": [1.0, 0.0, 2.0]}, {"run": [1.0 + 1e-7, 1.0, 0.0]}, {}, 0
    )
    rate = found["run"].win_rate
    assert (rate.wins, rate.ties, rate.losses) == (1, 1, 1)
    figures = report.figures["comparison"]
    assert figures["score_differences"]["run"].value == pytest.approx(1 / 3, abs=1e-9)
    assert figures["identical_answers"] == 2


def test_a_judge_is_not_asked_about_the_same_text() -> None:
    """Of three questions one is left; the judge prefers ours."""

    class Judge:
        model, address = "toy", "http://x"
        asked: list[Any] = []

        def compare(self, questions: Any, criterion: str, tell: Any) -> list[float]:
            self.asked.append([question.ours for question in questions])
            return [1.0] * len(questions)

    found = ask_judges([Judge()], [], ASKED, OURS, THEIRS)  # type: ignore[list-item]
    assert found == {"toy at http://x": [0.5, 0.5, 1.0]}
    assert Judge.asked == [["x"]]
