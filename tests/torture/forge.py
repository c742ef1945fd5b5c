"""Runs forked from one process that has imported everything and loaded the tiny base, so that each takes a second.

`Forge` is the tests' side. The other side is this file as a program, `python forge.py MODEL`: it reads a JSON request
a line, forks a child for each run or save, and tells when its step, save or end begins, so that a signal can be
sent at a moment of it. What a child does to its disk can be made to fail, or be the last thing it does: `disk.py`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("sft", "reward", "dpo", "ppo", "grpo")
STEPS = 4
PAIRS = [
    {"prompt": f"{i}. Say: ", "chosen": f"a good word {'and another ' * (i % 3)}", "rejected": f"bad {i}"}
    for i in range(6)
]
KNOBS: dict[str, Any] = {
    "quantize": "none", "rank": 4, "max_steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3,
    "sample_steps": 2, "sample_tokens": 4, "save_steps": 1, "keep_checkpoints": 2, "eval_rows": 2, "eval_steps": 2,
}  # fmt: skip
ONLINE = {"max_new_tokens": 6, "prompts": "rows.jsonl"}
ITS_OWN: dict[str, dict[str, Any]] = {
    "sft": {"data": "rows.jsonl", "lora_dropout": 0.2, "warmup_ratio": 0.4, "early_stopping": 3},
    "reward": {"data": "rows.jsonl", "lora_dropout": 0.2, "gradient_checkpointing": True},
    "dpo": {"data": "rows.jsonl", "lr_schedule": "cosine", "save_steps": 2},
    "ppo": {**ONLINE, "target_kl": 0.01, "kl_horizon": 4, "minibatches": 2, "ppo_epochs": 2, "eval_rows": 0},
    "grpo": {**ONLINE, "group_size": 2, "inner_epochs": 2, "minibatches": 2, "save_steps": 2},
}
REWARD = "def count(prompts, completions):\n    return [sum(c in 'aeiou' for c in text) for text in completions]\n"


class Ended(NamedTuple):
    """How a child ended: its exit code, or minus the signal; when each event was, in seconds since its start."""

    code: int
    seconds: float
    events: list[tuple[str, float]]
    out: str
    err: str

    @property
    def names(self) -> list[str]:
        """The events without their times."""
        return [name for name, _ in self.events]

    def when(self, event: str) -> float:
        """Seconds from the start to the first event of that name."""
        return next(at for name, at in self.events if name == event)


class Forge:
    """The process that forks. One request at a time, from one thread."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model = model
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWRANK_ALIGN_CACHE": str(cache), "COLUMNS": "200"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def close(self) -> None:
        """End it and what it forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def workspace(self, folder: Path, method: str, **knobs: Any) -> Path:
        """Put a method's rows, reward function and configuration into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = PAIRS
        if method == "sft":
            rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
        elif method in ("ppo", "grpo"):
            rows = [{"prompt": pair["prompt"]} for pair in PAIRS]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "vowels.py").write_text(REWARD)
        given = {"model": str(self.model), **KNOBS, **ITS_OWN[method], **knobs}
        (folder / f"{method}.yaml").write_text(json.dumps(given))  # JSON is YAML
        return folder

    def start(self, folder: Path, method: str, out: str, *flags: str, **how: Any) -> int:
        """A run in the folder; its pid. `wait_at`: the event at which it waits for `go`; `disk`: see `disk.Disk`."""
        argv = [method, "--config", f"{method}.yaml", "--out", out, *flags]
        if method in ("ppo", "grpo"):
            argv += ["--reward", "vowels:count"]  # code, which no file may name
        return int(self._ask(do="start", what="run", folder=str(folder), argv=argv, **how)["pid"])

    def start_save(self, folder: Path, step: int, keep: int, **how: Any) -> int:
        """One `checkpoint.save` of `step` into the folder."""
        return int(self._ask(do="start", what="save", folder=str(folder), argv=[step, keep], **how)["pid"])

    def wait_for(self, pid: int, event: str) -> bool:
        """Wait for a child's event; False where it ended without."""
        return bool(self._ask(do="wait_for", pid=pid, event=event)["seen"])

    def go(self, pid: int) -> None:
        """Let a child go on that waits."""
        self._ask(do="go", pid=pid)

    def end(self, pid: int, signal: int = 0, since: str = "start", after: float = 0.0) -> Ended:
        """Wait for a child's end; with `signal`, send it (the event `sent`) so many seconds `after` an event."""
        told = self._ask(do="end", pid=pid, signal=int(signal), since=since, after=after)
        return Ended(told["code"], told["seconds"], [(n, t) for n, t in told["events"]], told["out"], told["err"])

    def run(self, folder: Path, method: str, out: str, *flags: str, **ending: Any) -> Ended:
        """A run to its end, or to the signal that is described by `ending`."""
        how = {name: ending.pop(name) for name in ("disk",) if name in ending}
        return self.end(self.start(folder, method, out, *flags, **how), **ending)

    def outcome(self, run: Path) -> dict[str, Any]:
        """Everything that a run leaves and that must be the same, in bytes where it is no measured time."""
        last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
        names = [
            f"{part}/adapter_{what}" for part in ("adapter", "value") for what in ("model.safetensors", "config.json")
        ]
        names += ["reward.json", "samples.jsonl", f"checkpoints/{last.name}/tensors.safetensors"]
        found: dict[str, Any] = {name: (run / name).read_bytes() for name in names if (run / name).is_file()}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found["steps"] = [line["step"] for line in lines]
        found["metrics"] = [{**line, "seconds": None} for line in lines]
        state = json.loads((run / "run.json").read_text())
        found["state"] = [state["state"], state["steps"], {**state["summary"], "seconds": None}]
        found["plots"] = sorted(path.name for path in (run / "plots").iterdir())
        found["left over"] = sorted(path.name for path in run.rglob("*") if path.name.endswith((".tmp", ".old")))
        found["card"] = (run / "README.md").is_file()
        return found

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        found: dict[str, Any] = json.loads(answer)
        return found


# ---- the program


@dataclass
class Child:
    pid: int
    pipe: int
    gate: int
    log: Path
    began: float
    events: list[tuple[str, float]] = field(default_factory=list)
    rest: str = ""
    ended: bool = False

    def read(self) -> None:
        """More events, or the end, which closes the pipe."""
        chunk = os.read(self.pipe, 65536).decode()
        *lines, self.rest = (self.rest + chunk).split("\n")
        now = time.monotonic() - self.began
        self.events += [(line, now) for line in lines]
        self.ended = not chunk

    def when(self, event: str) -> float | None:
        return next((self.began + at for name, at in self.events if name == event), None)


class Told:
    """In a child: where its events go, the event at which it waits, and for whom."""

    pipe = gate = -1
    wait_at = ""


def tell(event: str) -> None:
    if Told.pipe >= 0:
        os.write(Told.pipe, f"{event}\n".encode())
        if event == Told.wait_at:
            os.read(Told.gate, 1)


def serve(model: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    prepare(model)
    logs = Path(tempfile.mkdtemp(prefix="forge-"))
    children: dict[int, Child] = {}
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("do"):
            case "start":
                child = fork(logs / str(len(children)), **request)
                children[child.pid] = child
                answer: dict[str, Any] = {"pid": child.pid}
            case "wait_for":
                child = children[request["pid"]]
                while child.when(request["event"]) is None and not child.ended:
                    child.read()
                answer = {"seen": child.when(request["event"]) is not None}
            case "go":
                os.write(children[request["pid"]].gate, b"g")
                answer = {}
            case _:
                answer = end(children[request.pop("pid")], **request)
        print(json.dumps(answer), file=answers, flush=True)
    for child in children.values():
        if not child.ended:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def prepare(model: str) -> None:
    """Import everything, load the base, and have the events told. No parallel region and no backward pass before a
    fork: the threads of neither would be there in the child."""
    import gc
    import io

    import torch
    from matplotlib.figure import Figure

    import lowrank_align.plots
    import lowrank_align.train
    from lowrank_align import checkpoint, cli
    from lowrank_align.base import Base
    from lowrank_align.loop import Loop
    from lowrank_align.methods import method_class
    from lowrank_align.stopping import StopSignals

    torch.set_num_threads(1)
    base = Base.load(model, quantize="none", device="cpu")
    Base.of = classmethod(lambda cls, settings: base)  # type: ignore[assignment, method-assign]
    for method in METHODS:
        method_class(method)
    lowrank_align.plots.DPI = 20
    Figure(figsize=(2, 2)).savefig(io.BytesIO(), format="png")  # finds its fonts

    def told(owner: Any, name: str, before: Any, after: Any) -> None:
        inner = getattr(owner, name)

        def outer(*given: Any, **named: Any) -> Any:
            if before:
                tell(before(*given))
            result = inner(*given, **named)
            if after:
                tell(after(*given))
            return result

        setattr(owner, name, outer)

    told(cli, "_run", lambda *_: "command", None)
    told(Loop, "_step", lambda loop, step: f"begin-{step}", lambda loop, step: f"done-{step}")
    told(Loop, "run", lambda loop: "loop", lambda loop: "finish")
    told(checkpoint, "save", lambda *_: "save", lambda *_: "saved")
    told(StopSignals, "_on_signal", lambda *_: "signal", None)
    gc.freeze()


def fork(
    log: Path, *, what: str, folder: str, argv: list[Any], wait_at: str = "", disk: dict[str, Any] | None = None
) -> Child:
    (events, told), (waits, gate) = os.pipe(), os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(told)
        os.close(waits)
        return Child(pid, events, gate, log, began)
    code = 1
    try:
        sys.stdout, sys.stderr = open(f"{log}.out", "w"), open(f"{log}.err", "w")  # noqa: SIM115  until the end
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        Told.pipe, Told.gate, Told.wait_at = told, waits, wait_at
        os.chdir(folder)
        tell("start")
        if disk is not None:
            from disk import Disk

            Disk(tell, **disk).install()
        code = a_run(argv) if what == "run" else a_save(*argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def a_run(argv: list[str]) -> int:
    from lowrank_align.cli import main

    return main(argv)


def a_save(step: int, keep: int) -> int:
    from lowrank_align import checkpoint
    from lowrank_align.errors import UserError

    try:
        checkpoint.save(Path.cwd(), step, state_of(step), keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def state_of(step: int) -> Any:
    """A state whose every part tells its step."""
    import torch

    from lowrank_align.training_state import State

    return State({"weight": torch.full((64, 8), float(step)), "bias": torch.full((3,), step)}, {"step": step})


def end(child: Child, signal: int, since: str, after: float) -> dict[str, Any]:
    while not child.ended:
        due, left = child.when(since), None
        if signal and due is not None:
            left = max(0.0, due + after - time.monotonic())
        if select.select([child.pipe], [], [], left)[0]:
            child.read()
        else:
            child.events.append(("sent", time.monotonic() - child.began))
            os.kill(child.pid, signal)
            signal = 0
    seconds = time.monotonic() - child.began
    code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    os.close(child.pipe)
    os.close(child.gate)
    out, err = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (child.log.with_suffix(".out"), child.log.with_suffix(".err"))
    )
    return {"code": code, "seconds": seconds, "events": child.events, "out": out, "err": err}


if __name__ == "__main__":
    serve(sys.argv[1])
