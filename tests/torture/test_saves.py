"""A checkpoint under attack: its process killed at every call, its bits flipped, its disk full, read-only or broken."""

import hashlib
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_align import checkpoint
from tests.torture.forge import state_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks into /proc")

KILLED = -signal.SIGKILL
FILES = ("tensors.safetensors", "state.json", "manifest.json")
REFUSALS = {"ENOSPC": "No space left on device", "EROFS": "Read-only file system", "EIO": "Input/output error"}
# What a save finds: the steps that are there, the one it writes, how many it keeps.
SITUATIONS = {
    "the first": ((), 1, 2),
    "one goes": ((1, 2), 3, 2),
    "the same step again": ((1, 2), 2, 2),
    "after a kill": ((1, 2), 3, 1),
}
# Calls that change files, as strace names them; each is counted by itself there.
CALLS = ("write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "renameat2", "mkdir", "unlinkat", "unlink",
         "rmdir")  # fmt: skip

REFUSED = "earlier checkpoints as they were, exit code 3, one line"
OLD_STAYS = "exit code 0, the new one is there, a line names what could not be removed"

Times = Callable[[int, int], int]
Tally = Callable[..., None]


def situation(name: str, folder: Path) -> tuple[int, int]:
    """Make the folder as the save will find it; the save's step and keep."""
    there, step, keep = SITUATIONS[name]
    for older in there:
        checkpoint.save(folder, older, state_of(older), keep=9)
    folder.mkdir(exist_ok=True)
    if name == "after a kill":
        shutil.copytree(folder / "step-1", folder / ".tmp-step-7")
        shutil.copytree(folder / "step-2", folder / "step-2.old")
    return step, keep


def step_found(folder: Path) -> int | None:
    """The step of the newest checkpoint that verifies, whose every part must be that step's."""
    found = checkpoint.latest(folder)
    if found is None:
        return None
    path, state = found
    step = state.values["step"]
    assert path.name.removesuffix(".old") == f"step-{step}"
    assert all(tensor.eq(step).all() for tensor in state.tensors.values())
    return int(step)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def calls_of(ended: Any) -> list[str]:
    """The calls that changed files, as `disk.py` counted them, each with its path in the folder."""
    return [name.removeprefix("disk:") for name in ended.names if name.startswith("disk:")]


def removes(call: str) -> bool:
    return call.startswith(("unlink", "rmdir"))


def survived(folder: Path, there: tuple[int, ...], step: int, keep: int) -> bool:
    """Whether an old checkpoint or the new one is found, and the next save leaves nothing but what it should."""
    found = step_found(folder)
    if found not in {max(there, default=None), step}:
        return False
    checkpoint.save(folder, step + 1, state_of(step + 1), keep)
    names = [path.name for path in folder.iterdir()]
    return step_found(folder) == step + 1 and all(re.fullmatch(r"step-\d+", name) for name in names)


@pytest.mark.parametrize("name", SITUATIONS)
def test_killed_after_every_call(name: str, forge: Any, tmp_path: Path, tally: Tally) -> None:
    """And in the middle of each write."""
    step, keep = situation(name, tmp_path / "counted")
    counted = forge.end(forge.start_save(tmp_path / "counted", step, keep, disk={"under": str(tmp_path / "counted")}))
    calls = [call.split(":")[0] for call in calls_of(counted)]
    assert counted.code == 0 and {"open", "write", "fsync", "rename", "mkdir"} <= set(calls), counted
    kills = [(at, then) for at, call in enumerate(calls, 1) for then in ("kill", "half")[: 1 + (call == "write")]]
    held, wrong = 0, []
    for at, then in kills:
        folder = tmp_path / f"{at}-{then}"
        situation(name, folder)
        pid = forge.start_save(folder, step, keep, disk={"under": str(folder), "at": at, "then": then})
        ended = forge.end(pid)
        fine = ended.code == KILLED and survived(folder, SITUATIONS[name][0], step, keep)
        held += fine
        if not fine:
            wrong.append((at, then, calls[at - 1], ended))
    tally("Kill and resume", "SIGKILL in a save, after each call that changes files and within each write",
          "a valid checkpoint is found, the next save is clean", held=held, of=len(kills))  # fmt: skip
    assert not wrong


@pytest.fixture
def traced(forge: Any, tmp_path: Path) -> Callable[..., tuple[Any, list[tuple[str, int]]]]:
    """`traced(folder, step, keep, *options)`: a save under strace; how it ended, and the calls in the folder, each with
    its place among those of its name, by which strace's `when` counts."""

    def trace(folder: Path, step: int, keep: int, *options: str) -> tuple[Any, list[tuple[str, int]]]:
        pid = forge.start_save(folder, step, keep, wait_at="start")
        forge.wait_for(pid, "start")  # else that event's own write is counted now and then
        log, names = tmp_path / "strace.log", ",".join(f"?{call}" for call in CALLS)
        argv = ["strace", "-y", "-o", str(log), "-e", f"trace={names}", *options, "-p", str(pid)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            told = strace.stderr.readline()
            if "attached" not in told:
                forge.end(pid, signal=signal.SIGKILL)
                pytest.skip(f"strace may not attach here: {told.strip()}")
            forge.go(pid)
            ended = forge.end(pid)
        seen, count = [], Counter[str]()
        for line in log.read_text(errors="replace").splitlines():
            if call := re.match(r"(\w+)\(", line):
                count[call[1]] += 1
                seen += [(call[1], count[call[1]])] if f"{folder}" in line else []
        return ended, seen

    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    return trace


@pytest.mark.parametrize("name", SITUATIONS)
def test_killed_at_every_system_call(name: str, traced: Any, tmp_path: Path, times: Times, tally: Tally) -> None:
    """By the kernel's own count, those of safetensors' writer among them: killed on entering each."""
    step, keep = situation(name, tmp_path / "run")
    ended, calls = traced(tmp_path / "run", step, keep)
    assert ended.code == 0 and sum(call == "fsync" for call, _ in calls) >= 6, (ended, calls)
    moments = random.Random(name).sample(calls, times(2, len(calls)))
    held, wrong = 0, []
    for call, at in moments:
        shutil.rmtree(tmp_path / "run")
        situation(name, tmp_path / "run")
        ended, _ = traced(tmp_path / "run", step, keep, "-e", f"inject={call}:signal=KILL:when={at}")
        fine = ended.code == KILLED and survived(tmp_path / "run", SITUATIONS[name][0], step, keep)
        held += fine
        if not fine:
            wrong.append((call, at, ended))
    tally("Kill and resume", "SIGKILL in a save at each system call that changes files (strace)",
          "a valid checkpoint is found, the next save is clean", held=held, of=len(moments))  # fmt: skip
    assert not wrong


def refused(ended: Any, folder: Path, before: dict[str, bytes], step: int, reason: str) -> bool:
    """Exit code 3 and one line with the reason; the earlier ones are byte for byte as they were, or gone only where the
    new one has taken their place."""
    after = content(folder)
    kept = {name for name in before if re.match(r"step-\d+/", name)}
    complete = kept <= after.keys() or step_found(folder) == step or (folder / f"step-{step}.old").is_dir()
    lines = ended.err.splitlines()
    told = ended.code == 3 and len(lines) == 1 and lines[0].startswith("error: ") and reason in lines[0]
    return unchanged(after, before) and complete and told and step_found(folder) in {step, max_step(before)}


def old_stays(ended: Any, folder: Path, before: dict[str, bytes], step: int, reason: str) -> bool:
    """The new one is saved; that an old one could not be removed is one line, and no reason to stop."""
    lines = ended.err.splitlines()
    told = len(lines) == 1 and lines[0].startswith("could not remove old checkpoints") and reason in lines[0]
    return ended.code == 0 and told and unchanged(content(folder), before) and step_found(folder) == step


def unchanged(after: dict[str, bytes], before: dict[str, bytes]) -> bool:
    return all(after.get(name, before[name]) == before[name] for name in before if not name.startswith("."))


def count_refusals(tally: Tally, fault: str, held: Counter[bool], of: Counter[bool]) -> None:
    """Apart: the calls that remove an old checkpoint."""
    for removing, count in of.items():
        what, promise = ("removes an old one", OLD_STAYS) if removing else ("changes files", REFUSED)
        tally("Kill and resume", fault.format(what), promise, held=held[removing], of=count)


def max_step(files: dict[str, bytes]) -> int | None:
    return max((int(found[1]) for name in files if (found := re.match(r"step-(\d+)/", name))), default=None)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", ["one goes", "the same step again"])
def test_the_disk_refuses_every_call(name: str, lasting: bool, forge: Any, tmp_path: Path, tally: Tally) -> None:
    """Full, read-only or broken, at each call in turn; when the disk is well again the next save is clean."""
    step, keep = situation(name, tmp_path / "counted")
    counted = forge.end(forge.start_save(tmp_path / "counted", step, keep, disk={"under": str(tmp_path / "counted")}))
    for code, reason in REFUSALS.items():
        calls = [(at, call) for at, call in enumerate(calls_of(counted), 1) if code != "ENOSPC" or not removes(call)]
        of, held, wrong = Counter[bool](), Counter[bool](), []
        for at, call in calls:
            folder = tmp_path / f"{code}-{at}"
            situation(name, folder)
            before = content(folder)
            disk = {"under": str(folder), "at": at, "then": code, "lasting": lasting}
            ended = forge.end(forge.start_save(folder, step, keep, disk=disk))
            as_promised = old_stays if removes(call) else refused
            fine = as_promised(ended, folder, before, step, reason) and survived(
                folder, SITUATIONS[name][0], step, keep
            )
            of[removes(call)] += 1
            held[removes(call)] += fine
            if not fine:
                wrong.append((code, at, call, ended, sorted(content(folder))))
        count_refusals(tally, f"{reason} ({code}) at each call of a save that {{}}", held, of)
        assert not wrong


@pytest.mark.parametrize("code", REFUSALS)
def test_the_kernel_refuses_every_call(code: str, traced: Any, tmp_path: Path, times: Times, tally: Tally) -> None:
    """The same through strace: safetensors' own writes too."""
    step, keep = situation("one goes", tmp_path / "run")
    _, calls = traced(tmp_path / "run", step, keep)
    calls = [(call, at) for call, at in calls if (call, at) != ("mkdir", 1)]  # of the folder, which is there
    calls = [(call, at) for call, at in calls if code != "ENOSPC" or not removes(call)]
    moments = random.Random(code).sample(calls, times(2, len(calls)))
    of, held, wrong = Counter[bool](), Counter[bool](), []
    for call, at in moments:
        shutil.rmtree(tmp_path / "run")
        situation("one goes", tmp_path / "run")
        before = content(tmp_path / "run")
        ended, _ = traced(tmp_path / "run", step, keep, "-e", f"inject={call}:error={code}:when={at}")
        as_promised = old_stays if removes(call) else refused
        fine = as_promised(ended, tmp_path / "run", before, step, REFUSALS[code])
        fine = fine and survived(tmp_path / "run", SITUATIONS["one goes"][0], step, keep)
        of[removes(call)] += 1
        held[removes(call)] += fine
        if not fine:
            wrong.append((call, at, ended, sorted(content(tmp_path / "run"))))
    count_refusals(tally, f"{code} at each system call of a save that {{}} (strace)", held, of)
    assert not wrong


def test_flipped_and_cut(tmp_path: Path, times: Times, tally: Tally, caplog: pytest.LogCaptureFixture) -> None:
    """A bit flipped or a file cut short, anywhere in the three files of the newest: found, and the one before taken."""
    wanted, draw, detected, fell_back = times(60, 1000), random.Random("flips"), Counter[str](), Counter[str]()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    tried: Counter[str] = Counter()
    for number in range(wanted):
        file = tmp_path / "step-2" / FILES[number % 3]
        good = file.read_bytes()
        how = "a flipped bit" if draw.random() < 0.7 else "a truncation"
        bad = bytearray(good[: draw.randrange(len(good))] if how == "a truncation" else good)
        if how == "a flipped bit":
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        tried[how] += 1
        caplog.clear()
        problem = checkpoint.verify(tmp_path / "step-2", 2)
        # a sum that differs may be the manifest's own fault, and then the file is named whose sum it is
        detected[how] += problem is not None and (file.name in problem or number % 3 == 2)
        fell_back[how] += step_found(tmp_path) == 1 and str(tmp_path / "step-2") in caplog.text
        file.write_bytes(good)
    assert step_found(tmp_path) == 2
    for how in tried:
        fault = f"{how} in a checkpoint's tensors, state or manifest"
        tally("Kill and resume", fault, "found, naming a file", held=detected[how], of=tried[how])
        tally("Kill and resume", fault, "the checkpoint before it is taken, and that is said", held=fell_back[how],
              of=tried[how])  # fmt: skip
    assert detected == fell_back == tried


# ---- the other files of a run


@pytest.fixture(scope="module")
def short_run(forge: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A workspace whose reward runs have three steps; how one ended whose calls were counted, and what it left."""
    place = forge.workspace(tmp_path_factory.mktemp("reward"), "reward", max_steps=3, eval_rows=0)
    ended = forge.run(place, "reward", "whole", disk={"under": str(place / "whole")})
    assert ended.code == 0, ended.err
    return place, ended, forge.outcome(place / "whole")


def test_the_disk_refuses_a_call_of_a_run(forge: Any, short_run: Any, times: Times, tally: Tally) -> None:
    """At each call that changes its folder: configuration, metrics, samples, checkpoints, adapter, plots, card."""
    place, counted, expected = short_run
    calls, draw = calls_of(counted), random.Random("a run's disk")
    moments = sorted(draw.sample(range(1, len(calls) + 1), times(6, len(calls))))
    of, held, resumed, wrong = Counter[tuple[str, bool]](), Counter[tuple[str, bool]](), 0, []
    for number, at in enumerate(moments):
        code, lasting = list(REFUSALS)[number % 3], bool(number // 3 % 2)
        out = f"{code}-{at}"
        ended = forge.run(
            place, "reward", out, disk={"under": str(place / out), "at": at, "then": code, "lasting": lasting}
        )
        last = ended.err.splitlines()[-1:] or [""]
        one_stays = re.match(r"(unlink|rmdir):checkpoints/step-", calls[at - 1]) is not None and not lasting
        if one_stays:
            fine = ended.code == 0 and "could not remove old checkpoints" in ended.err
            fine = fine and forge.outcome(place / out) == expected
        else:
            fine = ended.code in (3, 75) and last[0].startswith("error: ") and REFUSALS[code] in last[0]
        fine = fine and "Traceback" not in ended.err
        newest = checkpoint.latest(place / out / "checkpoints")
        again = forge.run(place, "reward", out, "--resume")
        goes_on = again.code == 0 and forge.outcome(place / out) == expected
        finished = ended.code == 0 or "finished already" in again.out  # when only the last sync was refused
        goes_on = goes_on and (newest is None or finished or f"resumed from {newest[0].name}" in again.out)
        of[code, one_stays] += 1
        held[code, one_stays] += fine
        resumed += goes_on
        if not (fine and goes_on):
            wrong.append((out, lasting, calls[at - 1], ended, again))
    for (code, one_stays), count in of.items():
        what = "removes an old checkpoint" if one_stays else "changes its folder"
        promise = "exit code 0, the end of a run, a line names it" if one_stays else "exit code 3 or 75, one line"
        tally("Kill and resume", f"{REFUSALS[code]} ({code}) at each call of a run that {what}", promise,
              held=held[code, one_stays], of=count)  # fmt: skip
    tally("Kill and resume", "a disk that refused a run and is well again", "--resume ends with the same bytes",
          held=resumed, of=len(moments))  # fmt: skip
    assert not wrong


def checksums(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in content(folder).items()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 96 MB, in memory; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk of its own can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(forge: Any, small_disk: Path, times: Times, tally: Tally) -> None:
    """Something else fills it to the last byte in the middle of the run, and goes away again after it."""
    place = forge.workspace(small_disk, "reward", max_steps=3, eval_rows=0)
    whole = forge.run(place, "reward", "whole")
    assert whole.code == 0, whole.err
    expected, held, wrong = forge.outcome(place / "whole"), 0, []
    moments = ("begin-1", "done-1", "begin-2", "done-2", "begin-3", "done-3", "finish")
    moments = moments[: times(2, len(moments))]
    for event in moments:
        pid = forge.start(place, "reward", event, wait_at=event)
        assert forge.wait_for(pid, event)
        before = checksums(place / event / "checkpoints")
        with open(small_disk / "filler", "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(2**20)):
                    pass
            except OSError as error:
                assert "No space left" in str(error)
        forge.go(pid)
        ended = forge.end(pid)
        after = checksums(place / event / "checkpoints")
        (small_disk / "filler").unlink()
        again = forge.run(place, "reward", event, "--resume")
        fine = ended.code == 3 and ended.err.splitlines()[-1].startswith("error: ") and "Traceback" not in ended.err
        fine = fine and before == after and again.code == 0 and forge.outcome(place / event) == expected
        held += fine
        if not fine:
            wrong.append((event, before, after, ended, again))
    tally("Kill and resume", "a disk that is full in the middle of a run (a mounted one, filled)",
          "earlier checkpoints as they were, exit code 3, one line, resumed to the same bytes", held=held,
          of=len(moments))  # fmt: skip
    assert not wrong
