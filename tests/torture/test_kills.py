"""SIGKILL at any moment of a run, again and again: resumed, it ends with the bytes of one that went through.

The oracle is the same run without a kill. Moments are drawn by a generator with a fixed seed, over the time that the
whole run took: at any moment of it, inside a save, or while a run that is trained is finished (adapter, plots, card).
"""

import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.torture.forge import METHODS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks into /proc")

# Of the one that stops early, held-out rows get worse with step 4 of 8.
RUNS: dict[str, dict[str, Any]] = {method: {} for method in METHODS} | {
    "sft, stopped early": {"max_steps": 8, "eval_steps": 1, "early_stopping": 1, "learning_rate": 0.1}
}
MOMENTS = ("while it is finished", "at a random moment", "while it saves", "at a random moment")
PROMISE = "resumed, the run ends with the same adapter, head and optimiser bytes, each step logged once"


def moment_of(kind: str, whole: Any, draw: random.Random) -> dict[str, Any]:
    """When to kill: so many seconds after an event."""
    if kind == "while it saves":
        return {"since": "save", "after": draw.uniform(0, whole.when("saved") - whole.when("save"))}
    if kind == "while it is finished":
        return {"since": "finish", "after": draw.uniform(0, whole.seconds - whole.when("finish"))}
    return {"since": "start", "after": draw.uniform(0, whole.seconds)}


def hit(names: list[str]) -> str:
    """What the process was doing when it died, whatever it had been meant to."""
    if "finish" in names:
        return "while it is finished"
    return "while it saves" if names.count("save") > names.count("saved") else "at a random moment"


@pytest.mark.parametrize("name", RUNS)
def test_killed_again_and_again(
    name: str, forge: Any, tmp_path: Path, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    method = name.partition(",")[0]
    place, draw = forge.workspace(tmp_path, method, **RUNS[name]), random.Random(f"kills of {name}")
    wanted = times(2, 40)
    whole = forge.run(place, method, "whole")
    assert whole.code == 0, whole.err
    expected = forge.outcome(tmp_path / "whole")
    assert expected["steps"] == [1, 2, 3, 4] and ("stopped early at step 4" in whole.out) == (name not in METHODS)
    kills: Counter[str] = Counter()
    held: Counter[str] = Counter()
    wrong = []
    for number in range(4 * wanted):  # a run that ends before its kill counts for nothing
        left = wanted - kills.total()
        if left == 0:
            break
        out, landed = f"run-{number}", []
        for _ in range(min(left, draw.randint(1, 4))):
            kind = MOMENTS[(kills.total() + len(landed)) % len(MOMENTS)]
            ended = forge.run(
                place, method, out, "--resume", signal=signal.SIGKILL, **moment_of(kind, whole, draw)
            )  # fmt: skip
            if ended.code != -signal.SIGKILL:
                break
            landed.append(hit(ended.names))
        if ended.code == -signal.SIGKILL:
            ended = forge.run(place, method, out, "--resume")
        same = ended.code == 0 and forge.outcome(tmp_path / out) == expected
        kills.update(landed)
        held.update(landed if same else [])
        if not same:
            wrong.append((out, landed, ended.code, ended.out, ended.err))
    for kind in sorted(kills):
        of_them = "sft, reward, dpo, ppo or grpo" if name in METHODS else "sft that stops early"
        fault = f"SIGKILL to a run of {of_them}, {kind}"
        tally("Kill and resume", fault, PROMISE, held=held[kind], of=kills[kind])
    assert not wrong
    assert kills.total() == wanted
