"""Memory that runs out, anywhere in a run, in any wording: the same update in smaller parts, or one line."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lowrank_align import adapters, checkpoint
from lowrank_align.base import Base
from lowrank_align.batch_sizes import BatchSizes
from lowrank_align.errors import EnvironmentProblem, UserError, is_out_of_memory
from lowrank_align.loop import Loop
from lowrank_align.methods import method_class
from lowrank_align.optimizer import allocate_moments
from tests.notes import Notes
from tests.torture.forms import of

SECTION = "Out of memory"
WORDINGS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
    ),
    lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    lambda: RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    lambda: torch.OutOfMemoryError(
        "HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"
    ),
    lambda: torch.OutOfMemoryError(
        "XPU out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"
    ),
    lambda: RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 17.94 GB, max allowed: 18.13 GB)."),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"
    ),
    lambda: RuntimeError("unable to mmap 4096 bytes from file </weights>: Cannot allocate memory (12)"),
    lambda: RuntimeError("std::bad_alloc"),
    lambda: RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),  # bitsandbytes
    lambda: MemoryError(),
    lambda: MemoryError("Unable to allocate 2.00 GiB for an array with shape (268435456,)"),  # NumPy
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    KeyError("out of memory"),
    UserError("out of memory"),
]

PROMPTS = [{"prompt": f"{i}. Say: "} for i in range(8)]
DEMONSTRATIONS = [row | {"completion": f"a word {'or two ' * (i % 3)}"} for i, row in enumerate(PROMPTS)]
PAIRS = [row | {"chosen": DEMONSTRATIONS[i]["completion"], "rejected": f"no {i}"} for i, row in enumerate(PROMPTS)]
SAMPLED = {"reward": "builtins:letters", "max_new_tokens": 5, "rollout_batch_size": 4, "missing_eos_penalty": 0.0}
METHODS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "sft": (DEMONSTRATIONS, {}),
    "dpo": (PAIRS, {}),
    "reward": (PAIRS, {}),
    "ppo": (PROMPTS, SAMPLED | {"minibatches": 1, "ppo_epochs": 2}),
    "grpo": (PROMPTS, SAMPLED | {"group_size": 2, "minibatches": 2, "rollout_batch_size": 8}),
}
KNOBS = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 3, "rank": 2, "learning_rate": 5e-3, "save_steps": 1}
KNOBS |= {"lr_schedule": "constant", "warmup_ratio": 0.0, "keep_checkpoints": 9}

Run = Callable[..., Path]


class Fault:
    """Lets memory run out at the `call`-th (from 0) passing of a point in step `step`, once or from there on.

    It also keeps in how many parts everything was done that can be done in parts, `sizes[step, place]`; `replay`: a
    run without a fault takes its sizes from there.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.error, self.step, self.call, self.lasting = patch, MemoryError, -1, 0, False
        self.now, self.place, self.passed, self.struck = 0, 0, 0, 0
        self.sizes: dict[tuple[int, int], int] = {}
        self.replay: dict[tuple[int, int], int] = {}
        self.updates: list[tuple[int, list[int]]] = []  # the items of every update, and the parts they were done in
        self.loop: Any = None
        self._follow()

    def at(self, error: Callable[[], Exception], step: int, call: int = 0, *, lasting: bool = False) -> None:
        self.error, self.step, self.call, self.lasting = error, step, call, lasting  # type: ignore[assignment]
        self.now = self.passed = self.struck = 0

    def off(self) -> None:
        self.at(MemoryError, -1)

    def due(self) -> bool:
        """Such a point is passed: whether memory runs out at it."""
        if self.now != self.step:
            return False
        self.passed += 1
        here = self.passed - 1 == self.call or (self.lasting and self.passed > self.call)
        self.struck += here
        return here

    def strike(self) -> None:
        if self.due():
            raise self.error()

    def _follow(self) -> None:
        step_, retry_, update_ = Loop._step, BatchSizes.retry, Loop._update

        def step(it: Loop, number: int) -> Any:
            self.loop, self.now, self.place = it, number, 0
            return step_(it, number)

        def retry(it: BatchSizes, function: Any, knob: str) -> Any:
            key = (self.now, self.place)
            self.place += 1
            if self.replay and self.now:
                it.now[knob] = self.replay[key]
            done = retry_(it, function, knob)
            self.sizes[key] = it.now[knob]
            return done

        def update(it: Loop, items: Any, *arguments: Any) -> Any:
            self.updates.append((len(items), []))
            return update_(it, items, *arguments)

        self.patch.setattr(Loop, "_step", step)
        self.patch.setattr(BatchSizes, "retry", retry)
        self.patch.setattr(Loop, "_update", update)

    def parts(self, method: str) -> None:
        """Keeps the parts of every update: those of an attempt that failed are thrown away."""
        kind = method_class(method)
        before = kind.step

        def step(it: Any, items: Any, *arguments: Any) -> Any:
            try:
                done = before(it, items, *arguments)
            except Exception:
                if self.updates:
                    self.updates[-1][1].clear()
                raise
            if self.updates and self.now and torch.is_grad_enabled():
                self.updates[-1][1].append(len(items))
            return done

        self.patch.setattr(kind, "step", step)


def forward(fault: Fault) -> None:
    """When the hidden states are there: gradients are on or off, whoever asked."""
    before = Base.hidden_states

    def hidden_states(self: Base, batch: Any) -> Any:
        found = before(self, batch)
        fault.strike()
        return found

    fault.patch.setattr(Base, "hidden_states", hidden_states)


def backward(fault: Fault) -> None:
    """In the middle: some gradients are there, others not."""
    before = Accelerator.backward

    def hook(_gradient: Any) -> None:
        fault.strike()

    def half(self: Accelerator, loss: Any, **options: Any) -> None:
        hooks = []
        if fault.now:
            roles = [list(fault.loop.base.trainable_parameters(role).values()) for role in fault.loop.method.trained]
            hooks = [weights[len(weights) // 2].register_hook(hook) for weights in roles]
        try:
            before(self, loss, **options)
        finally:
            for one in hooks:
                one.remove()

    fault.patch.setattr(Accelerator, "backward", half)


def generation(fault: Fault) -> None:
    """When the answers are drawn, and with them the generator's numbers."""
    module = sys.modules["lowrank_align.rollout"]
    before = module._generate

    def generate(*arguments: Any) -> Any:
        found = before(*arguments)
        fault.strike()
        return found

    fault.patch.setattr(module, "_generate", generate)


def optimiser(fault: Fault) -> None:
    """When half of the weights have moved; of PPO's two adapters, one."""
    before = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Any = None) -> None:
        if not fault.due():
            before(self, closure)
            return
        weights = [p for group in self.param_groups for p in group["params"]]
        for p in weights[len(weights) // 2 :]:
            p.grad = None
        before(self, closure)
        raise fault.error()

    fault.patch.setattr(torch.optim.AdamW, "step", step)


POINTS = {"forward": forward, "backward": backward, "generation": generation}
CASES = [
    (method, point) for method in METHODS for point in POINTS if point != "generation" or "reward" in METHODS[method][1]
]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    monkeypatch.setattr("builtins.letters", letters, raising=False)
    return Fault(monkeypatch)


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


def go(run: Run, method: str, name: str, **knobs: Any) -> Path:
    rows, own = METHODS[method]
    return run(method, rows, name, **KNOBS | own | knobs)


def everything(folder: Path) -> dict[str, Any]:
    """The bytes of the adapter, of its head or value, of all checkpoints' tensors, and the figures without times."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found | {"figures": [{k: v for k, v in line.items() if k != "seconds"} for line in lines]}


def ladder_line(knob: str, size: int) -> str:
    return f"out of memory: {knob} is now {size}; the same batch again"


def whole_batches(fault: Fault) -> bool:
    """Whether every update saw each of its items once, whatever the parts."""
    return bool(fault.updates) and all(sum(parts) == items for items, parts in fault.updates)


# ---- the same update in smaller parts


def test_wordings(tally: Callable[..., None]) -> None:
    """Each is known for what it is, and nothing else is."""
    known = sum(is_out_of_memory(make()) for make in WORDINGS)
    others = sum(is_out_of_memory(error) for error in OTHERS)
    tally(
        SECTION,
        "a wording of torch, its backends or bitsandbytes",
        "known for what it is",
        held=known,
        of=len(WORDINGS),
    )
    assert (known, others) == (len(WORDINGS), 0)


FEW = [("sft", "backward"), ("dpo", "forward"), ("reward", "backward"), ("ppo", "generation"), ("grpo", "forward")]


@pytest.mark.parametrize(("method", "point"), of(CASES, *FEW))
def test_halved_and_again(method: str, point: str, run: Run, fault: Fault, times: Any, tally: Any) -> None:
    """Once, somewhere in a run of three steps. Another run, without a fault, does every part in the size in which it
    was done then: every byte of adapters, optimisers and figures is the same, and no row is lost or doubled."""
    draw, count, failed = random.Random(f"{method}/{point}"), times(1, len(WORDINGS)), []
    knob = "rollout_batch_size" if point == "generation" else "micro_batch_size"
    size = (KNOBS | METHODS[method][1])[knob]
    POINTS[point](fault)
    fault.parts(method)
    for i in range(count):
        make = WORDINGS[(i + CASES.index((method, point))) % len(WORDINGS)]
        fault.at(make, step=draw.randint(1, 3), call=draw.randint(0, 1))
        fault.replay, fault.sizes, fault.updates = {}, {}, []
        progress = Notes()
        halved = everything(go(run, method, f"halved-{i}", progress=progress))
        seen = fault.struck, progress.ladder, whole_batches(fault)
        fault.off()
        fault.replay = dict(fault.sizes)
        clean = everything(go(run, method, f"clean-{i}"))
        differ = [key for key in clean | halved if clean.get(key) != halved.get(key)]
        if (*seen, differ) != (1, [ladder_line(knob, size // 2)], True, []):
            failed.append((make(), *seen, differ))
    tally(
        SECTION, f"memory runs out in {point}", "the batch again in halves: the same bytes as in a run without it",
        held=count - len(failed), of=count,
    )  # fmt: skip
    assert not failed


LADDERS = [(method, "micro_batch_size") for method in METHODS]
LADDERS += [("ppo", "rollout_batch_size"), ("grpo", "rollout_batch_size")]


@pytest.mark.parametrize(("method", "knob"), of(LADDERS, ("dpo", "micro_batch_size"), ("ppo", "rollout_batch_size")))
def test_down_the_ladder(method: str, knob: str, run: Run, fault: Fault, tally: Any) -> None:
    """From step 2 on nothing fits: 8, 4, 2, 1, one line, code 3, step 1 saved though no checkpoint was due; with memory
    again the run goes on in single rows and ends as one that did so from step 2 on."""
    (generation if knob == "rollout_batch_size" else backward)(fault)
    fault.at(WORDINGS[LADDERS.index((method, knob))], step=2, lasting=True)
    progress, knobs = Notes(), {"save_steps": 50, knob: 8}
    with pytest.raises(EnvironmentProblem) as error:
        go(run, method, "run", progress=progress, **knobs)
    line = str(error.value)
    said = line.startswith(f"out of memory with {knob} 1 (") and "\n" not in line and error.value.exit_code == 3
    said = said and line.endswith("; step 1 of 3 is saved, the same command with --resume goes on")
    fault.off()
    resumed = everything(go(run, method, "run", resume=True, **knobs))
    fault.off()
    fault.replay = dict(fault.sizes)
    clean = everything(go(run, method, "clean", **knobs))
    differ = [key for key in clean if clean[key] != resumed.get(key)]
    ladder = [ladder_line(knob, size) for size in (4, 2, 1)]
    held = said and not differ and progress.ladder == ladder
    tally(SECTION, "not even one row fits", "8, 4, 2, 1, one line, the steps before saved", held=int(held), of=1)
    assert progress.ladder == ladder
    assert said, line
    assert not differ


# ---- the optimiser


@pytest.mark.parametrize("method", of(METHODS, "ppo"))
def test_within_an_update(method: str, run: Run, fault: Fault, times: Any, tally: Any, tmp_path: Path) -> None:
    """Half of the weights have moved: one line, code 3, no file knows of it, the resumed run ends as a clean one."""
    draw, count, held = random.Random(method), times(1, 6), 0
    optimiser(fault)
    clean = everything(go(run, method, "clean"))
    for i in range(count):
        name, step = f"run-{i}", draw.randint(1, 3)
        fault.at(
            WORDINGS[draw.randrange(len(WORDINGS))],
            step=step,
            call=draw.randint(0, 1) if method in ("ppo", "grpo") else 0,
        )
        with pytest.raises(
            EnvironmentProblem, match=f"^out of memory within the update of step {step} [^\n]*--resume"
        ) as error:
            go(run, method, name)
        assert error.value.exit_code == 3
        steps = sorted(checkpoint.sealed_steps(tmp_path / name / "checkpoints"))
        fault.off()
        resumed = everything(go(run, method, name, resume=True))
        held += steps == list(range(1, step)) and resumed == clean
    tally(
        SECTION, "memory runs out within an update", "nothing of it is saved; resumed, the same bytes as without it",
        held=held, of=count,
    )  # fmt: skip
    assert held == count


@pytest.mark.parametrize("method", of(METHODS, "sft"))
def test_moments_are_there_before_the_first_step(
    method: str, run: Run, fault: Fault, tally: Any, tmp_path: Path
) -> None:
    """Where they do not fit, one line before anything has moved; where they do, no step allocates any."""
    create, steps = torch.optim.AdamW._init_group, []

    def counted(self: Any, group: Any, *arguments: Any) -> Any:
        before = len(self.state)
        found = create(self, group, *arguments)
        steps.extend([fault.now] * (len(self.state) > before))
        return found

    fault.patch.setattr(torch.optim.AdamW, "_init_group", counted)
    go(run, method, "run")
    early = bool(steps) and set(steps) == {0}

    def fail(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    fault.patch.setattr(torch.optim.AdamW, "_init_group", fail)
    with pytest.raises(EnvironmentProblem, match="^out of memory for the optimiser's state .*--rank") as error:
        go(run, method, "none")
    held = early and error.value.exit_code == 3 and not (tmp_path / "none" / "checkpoints").exists()
    tally(SECTION, "the optimiser's state does not fit", "said before the first step", held=int(held), of=1)
    assert held


def test_moments_change_nothing() -> None:
    """Zeros, no step counted, weights and rates to the bit as they were (a zero keeps its sign), gradients gone."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(3, 5, generator=generator)),
        torch.nn.Parameter(torch.tensor([0.0, -0.0])),
    ]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW([{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]]}], weight_decay=0.3)
    allocate_moments(optimizer)
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight.detach().view(torch.int32), old.view(torch.int32))
        state = optimizer.state[weight]
        assert not any(value.any() for value in state.values())
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert weight.grad is None
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]


def test_moments_of_bitsandbytes() -> None:
    """Its optimisers allocate one tensor after another within the step; here each is asked for before."""
    from bitsandbytes.optim import AdamW8bit

    states = []
    for early in (True, False):
        weight = torch.nn.Parameter(torch.ones(64, 128))
        optimizer = AdamW8bit([weight])
        if early:
            allocate_moments(optimizer)
        else:
            optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
        states.append(optimizer.state[weight])
    assert states[0].keys() == states[1].keys() >= {"state1", "state2", "absmax1"}
    for name, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name]))


# ---- evaluation, samples, saving


@pytest.mark.parametrize("method", of(METHODS, "dpo"))
def test_in_evaluation(method: str, run: Run, fault: Fault, times: Any, tally: Any) -> None:
    """Once: halved, and the figures are those of halves. Lasting: the step is saved, the resumed run begins there."""
    count, held = times(1, 4), 0
    before, evaluating = Loop._evaluate, []

    def evaluate(self: Loop, step: int) -> Any:
        evaluating.append(step)
        try:
            return before(self, step)
        finally:
            evaluating.clear()

    def strike() -> None:
        if evaluating:
            Fault.strike(fault)

    fault.patch.setattr(Loop, "_evaluate", evaluate)
    fault.patch.setattr(fault, "strike", strike)
    forward(fault)
    held_out = {"eval_rows": 4, "eval_steps": 1, "batch_size": 4, "micro_batch_size": 4}
    for i in range(count):
        make, progress = WORDINGS[(3 * i + 1) % len(WORDINGS)], Notes()
        fault.replay, fault.sizes = {}, {}
        fault.at(make, step=2)
        halved = everything(go(run, method, f"halved-{i}", progress=progress, **held_out))
        fault.off()
        fault.replay = dict(fault.sizes)
        same = everything(go(run, method, f"clean-{i}", **held_out)) == halved and len(progress.ladder) == 1
        fault.replay, fault.sizes = {}, {}
        fault.at(make, step=2, lasting=True)
        with pytest.raises(EnvironmentProblem, match="step 2 of 3 is saved, the same command with --resume goes on$"):
            go(run, method, f"run-{i}", **held_out)
        fault.off()
        resumed = go(run, method, f"run-{i}", resume=True, **held_out)
        lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
        held += (
            same
            and [line["step"] for line in lines] == [1, 2, 3]
            and all("eval_loss" in x or "eval_objective/scores" in x for x in lines)
        )
    tally(
        SECTION,
        "memory runs out in evaluation",
        "halved; or the step saved, and evaluated when resumed",
        held=held,
        of=count,
    )
    assert held == count


def test_in_samples(run: Run, fault: Fault, times: Any, tally: Any) -> None:
    """They are for people to look at: without them the run goes on, and a line says so."""
    held, count, knobs = 0, times(2, len(WORDINGS)), {"sample_steps": 1, "sample_tokens": 4}
    clean = everything(go(run, "sft", "clean", **knobs))
    generation(fault)
    for i, make in enumerate(WORDINGS[:count]):
        fault.at(make, step=2)
        progress = Notes()
        folder = go(run, "sft", f"run-{i}", progress=progress, **knobs)
        steps = {json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()}
        told = [note for note in progress.notes if note.startswith("step 2: out of memory: no samples")]
        held += everything(folder) == clean and steps == {1, 3} and len(told) == 1
    tally(SECTION, "memory runs out while samples are drawn", "the run goes on without them", held=held, of=count)
    assert held == count


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_in_saving(what: str, run: Run, fault: Fault, times: Any, tally: Any, tmp_path: Path) -> None:
    """Copies for the disk take memory too. Code 3, what was saved before is as it was; resumed, the end is the same."""
    clean, held, count = everything(go(run, "reward", "clean")), 0, times(1, len(WORDINGS))
    module, name = (checkpoint, "_for_disk") if what == "checkpoint" else (adapters, "to_safetensors")
    before = getattr(module, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        fault.strike()
        return before(*arguments, **options)

    fault.patch.setattr(module, name, fail)
    for i in range(count):
        step = 3 if what == "adapter" else 1 + (i + 1) % 3
        fault.at(WORDINGS[i], step=step)
        with pytest.raises(EnvironmentProblem) as error:
            go(run, "reward", f"run-{i}")
        assert len(str(error.value).splitlines()) == 1
        assert "--resume" in str(error.value)
        steps = sorted(checkpoint.sealed_steps(tmp_path / f"run-{i}" / "checkpoints"))
        fault.off()
        resumed = everything(go(run, "reward", f"run-{i}", resume=True))
        held += error.value.exit_code == 3 and steps == list(range(1, step + (what == "adapter"))) and resumed == clean
    tally(
        SECTION, f"memory runs out while the {what} is saved", "earlier checkpoints untouched; resumed, the same bytes",
        held=held, of=count,
    )  # fmt: skip
    assert held == count
