"""SIGINT and SIGTERM at random moments, and two runs that want one folder."""

import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.torture.forge import METHODS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks into /proc")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST = 4  # steps of a run

Times = Callable[[int, int], int]
Tally = Callable[..., None]


@pytest.fixture(scope="module")
def wholes(forge: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Any]]:
    """`wholes(method)`: its workspace, how an uninterrupted run there ended, and what it left."""
    made: dict[str, tuple[Path, Any, Any]] = {}

    def whole(method: str) -> tuple[Path, Any, Any]:
        if method not in made:
            place = forge.workspace(tmp_path_factory.mktemp(method), method)
            ended = forge.run(place, method, "whole")
            assert ended.code == 0, ended.err
            made[method] = place, ended, forge.outcome(place / "whole")
        return made[method]

    return whole


def boundaries(names: list[str]) -> set[str]:
    """The steps after which a run may be saved that noticed a signal: the one it was in; between two, either."""
    before = [name for name in names[: names.index("signal")] if name.startswith(("begin-", "done-"))]
    what, _, step = (before[-1] if before else "done-0").partition("-")
    return {step} if what == "begin" else {step, str(int(step) + 1)} - {"0"}


def test_stopped_at_the_next_step_boundary(wholes: Any, forge: Any, times: Times, tally: Tally) -> None:
    """Drawn from before the first step, where the longest rows are tried, to the last step; what comes in the last one
    ends as if nothing had been asked."""
    wanted, draw, stopped, held, late, wrong = times(4, 50), random.Random("stops"), 0, 0, [], []
    for number in range(4 * wanted):
        if stopped == wanted:
            break
        method, asked = METHODS[number % len(METHODS)], SIGNALS[number // 2 % 2]
        place, whole, expected = wholes(method)
        out, length = f"run-{number}", whole.when(f"begin-{LAST}") - whole.when("loop")
        ended = forge.run(place, method, out, signal=asked, since="loop", after=draw.uniform(0, length))
        if "signal" not in ended.names or f"begin-{LAST}" in ended.names:
            late.append((method, ended.code, forge.outcome(place / out) == expected))
            continue
        stopped += 1
        newest = max((place / out / "checkpoints").iterdir(), key=lambda path: int(path.name[5:])).name[5:]
        told = re.search(
            rf"{out}: stopped at step (\d+) of {LAST} and saved; the same command with --resume", ended.err
        )
        saved = ended.code == 75 and newest in boundaries(ended.names) and bool(told) and told[1] == newest
        again = forge.run(place, method, out, "--resume")
        same = again.code == 0 and forge.outcome(place / out) == expected
        held += saved and same
        if not (saved and same):
            wrong.append((method, asked.name, ended, newest, again.err))
    fault = "SIGINT or SIGTERM at a random moment of training"
    tally("Kill and resume", fault, "saved at the next step boundary, exit code 75, resumed to the same bytes",
          held=held, of=stopped)  # fmt: skip
    assert not wrong
    assert stopped == wanted
    assert all(code == 0 and same for _, code, same in late), late


def test_stopped_before_the_first_step(wholes: Any, forge: Any, times: Times, tally: Tally) -> None:
    """While rows are read and roles are put on the base there is nothing to save: one line, and --resume begins."""
    wanted, draw, tried, held, wrong = times(2, 20), random.Random("early stops"), 0, 0, []
    for number in range(4 * wanted):
        if tried == wanted:
            break
        method, asked = METHODS[number // 2 % len(METHODS)], SIGNALS[number % 2]
        place, whole, expected = wholes(method)
        out, after = f"early-{number}", draw.uniform(0, whole.when("loop") - whole.when("command"))
        ended = forge.run(place, method, out, signal=asked, since="command", after=after)
        if "sent" not in ended.names or "loop" in ended.names[: ended.names.index("sent")]:
            continue  # a run that was faster than the whole one
        tried += 1
        told = ended.err.strip().splitlines()[-1:] if ended.code == 75 else []
        again = forge.run(place, method, out, "--resume")
        fine = bool(told) and "--resume goes on" in told[0] and "Traceback" not in ended.err
        fine = fine and again.code == 0 and forge.outcome(place / out) == expected
        held += fine
        if not fine:
            wrong.append((method, asked.name, after, ended, again.err))
    tally("Kill and resume", "SIGINT or SIGTERM before training has begun", "exit code 75, one line, nothing lost",
          held=held, of=tried)  # fmt: skip
    assert not wrong
    assert tried == wanted


def test_stopped_while_it_is_finished(wholes: Any, forge: Any, times: Times, tally: Tally) -> None:
    """A signal that comes when all is trained: the run is finished, or resumed to its end; never half of it."""
    wanted, draw, held, wrong = times(2, 20), random.Random("late stops"), 0, []
    for number in range(wanted):
        method, asked = METHODS[number // 2 % len(METHODS)], SIGNALS[number % 2]
        place, whole, expected = wholes(method)
        out, after = f"late-{number}", draw.uniform(0, whole.seconds - whole.when("finish"))
        ended = forge.run(place, method, out, signal=asked, since="finish", after=after)
        again = forge.run(place, method, out, "--resume")
        fine = ended.code in (0, 75) and "Traceback" not in ended.err and again.code == 0
        fine = fine and forge.outcome(place / out) == expected
        held += fine
        if not fine:
            wrong.append((method, asked.name, after, ended, again.err))
    fault = "SIGINT or SIGTERM while a run is finished"
    tally("Kill and resume", fault, "exit code 0 or 75, the same bytes at the end",
          held=held, of=wanted)  # fmt: skip
    assert not wrong


def test_a_second_run_in_the_folder_is_refused(wholes: Any, forge: Any, times: Times, tally: Tally) -> None:
    """While the first is in its second step; the first then goes on to its end, or is killed."""
    place, _, expected = wholes("sft")
    wanted, named, went_on, freed, wrong = times(2, 20), 0, 0, 0, []
    for number in range(wanted):
        out, flag = f"shared-{number}", ("--resume", "--overwrite", "")[number % 3]
        first = forge.start(place, "sft", out, wait_at="begin-2")
        assert forge.wait_for(first, "begin-2")
        second = forge.run(place, "sft", out, *filter(None, [flag]))
        message = rf"error: {out}: in use by another process \(pid {first}, started 20\S+\); wait for it or stop it\n"
        refused = second.code == 2 and bool(re.fullmatch(message, second.err))
        named += refused
        if number % 2:
            ended = forge.end(first, signal=signal.SIGKILL)
            third = forge.run(place, "sft", out, "--resume")
            fine = ended.code == -9 and third.code == 0 and forge.outcome(place / out) == expected
            freed += fine
        else:
            forge.go(first)
            ended = third = forge.end(first)
            fine = ended.code == 0 and forge.outcome(place / out) == expected
            went_on += fine
        if not (refused and fine):
            wrong.append((number, flag, second, ended, third.err))
    fault = "a second run in the folder of one that works"
    tally("Kill and resume", fault, "refused, naming pid and start of the first", held=named, of=wanted)
    tally("Kill and resume", fault, "the first goes on to the same bytes", held=went_on, of=wanted - wanted // 2)
    tally("Kill and resume", "SIGKILL to a run that has a folder", "the next one has it at once, and ends the same",
          held=freed, of=wanted // 2)  # fmt: skip
    assert not wrong


def test_two_runs_begin_at_once(wholes: Any, forge: Any, times: Times, tally: Tally) -> None:
    """Both let go at the same moment, in a folder that is not there: one gets it, the other is told who."""
    place, _, expected = wholes("sft")
    wanted, held, wrong = times(2, 20), 0, []
    for number in range(wanted):
        out = f"race-{number}"
        both = [forge.start(place, "sft", out, wait_at="start") for _ in range(2)]
        for pid in both:
            forge.go(pid)
        ended = {pid: forge.end(pid) for pid in both}
        winners = [pid for pid in both if ended[pid].code == 0]
        losers = [ended[pid] for pid in both if ended[pid].code == 2]
        fine = len(winners) == len(losers) == 1 and forge.outcome(place / out) == expected
        fine = fine and re.match(rf"error: {out}: (in use by another process \(|exists and is not)", losers[0].err)
        held += bool(fine)
        if not fine:
            wrong.append((number, ended))
    tally("Kill and resume", "two runs that begin in one folder at once", "one ends the same, one is refused",
          held=held, of=wanted)  # fmt: skip
    assert not wrong
