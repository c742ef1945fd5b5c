"""The herd, a program for test_processes.py: it has imported everything, and forks the processes of each run.

The imports take most of the time of a short run, and are paid for once. A job is a line of JSON, and so is the answer:
each process's exit code, -N where signal N ended it, or "hangs".
"""

import json
import os
import signal
import socket
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

HANGS_AFTER_SECONDS = 120


def herd() -> None:
    """Forks the processes of every job that comes in, waits for their ends, and says what they were."""
    import lowrank_align.cli
    import lowrank_align.train  # noqa: F401
    from lowrank_align.config import METHODS
    from lowrank_align.methods import method_class

    for method in METHODS:
        method_class(method)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        job["port"] = free_port()
        running = {}
        for rank in range(job["processes"]):
            pid = os.fork()
            if not pid:
                sys.exit(process(job, rank))
            running[pid] = rank
        print(json.dumps(ends_of(running)), flush=True)


def ends_of(running: dict[int, int]) -> list[Any]:
    """Each process's exit code, -N for signal N, or "hangs"."""
    ends: dict[int, Any] = dict.fromkeys(running.values(), "hangs")
    deadline = time.monotonic() + HANGS_AFTER_SECONDS
    while running and time.monotonic() < deadline:
        for pid, rank in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[rank] = os.waitstatus_to_exitcode(status)
                del running[pid]
        time.sleep(0.005)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [ends[rank] for rank in sorted(ends)]


def process(job: dict[str, Any], rank: int) -> int:
    """One process of a job: the command line, watched, with the faults that the job has for it."""
    import torch
    from safetensors.numpy import save_file

    from lowrank_align.cli import main

    os.chdir(job["elsewhere"] if rank else job["folder"])
    path = Path(job["folder"]) / job["name"]
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{path}-{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if job["processes"] > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"]}
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        os.environ |= {name: str(value) for name, value in {**here, **there}.items()}
    torch.set_num_threads(1)
    if job["argv"][0] == "shard":
        return shard(job)
    import_module("lowrank_align.plots").PLOTS = {}
    gradients, writes = watch(job)
    for fault in job["faults"]:
        if fault["rank"] == rank:
            install(fault, job["argv"][0])
    code = main(job["argv"])
    save_file(gradients, f"{path}-{rank}.safetensors")
    seen = {"writes": writes, "group": torch.distributed.is_initialized()}
    Path(f"{path}-{rank}.json").write_text(json.dumps(seen))
    return code


def watch(job: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The gradients of every update as it is made, and everything that is opened to be written in the run's folder."""
    import torch

    from lowrank_align.workers import Workers

    gradients: dict[str, Any] = {}
    writes: list[str] = []
    out = str(Path(job["folder"]) / job["name"])
    sum_gradients = Workers.sum_gradients

    def watched(self: Any, parameters: Any) -> None:
        sum_gradients(self, parameters)
        flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in parameters]
        gradients[f"update-{len(gradients)}"] = torch.cat(flat).numpy()

    def listen(event: str, arguments: Any) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, changes = (arguments[0] if arguments else ""), event in ("os.mkdir", "os.rename", "os.remove")
        if changes and isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(out + "/"):
            writes.append(os.path.relpath(path, out))

    Workers.sum_gradients = watched  # type: ignore[method-assign]
    sys.addaudithook(listen)
    return gradients, writes


def install(fault: dict[str, Any], method: str) -> None:
    """Let this process's first micro-batch of one step go wrong."""
    import torch

    from lowrank_align.loop import Loop
    from lowrank_align.methods import method_class

    kind, at = method_class(method), {"step": 0}
    begin, step = Loop._step, kind.step

    def beginning(self: Any, number: int) -> Any:
        at["step"] = number
        return begin(self, number)

    def faulty(self: Any, items: Any, weight: float, metrics: Any) -> Any:
        if at["step"] != fault["step"] or (fault["kind"] == "memory" and len(items) == 1):
            return step(self, items, weight, metrics)
        if fault["kind"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        at["step"] = 0
        if fault["kind"] == "bug":
            raise KeyError("a bug")
        if fault["kind"] in ("SIGTERM", "SIGINT", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, fault["kind"]))
        loss = step(self, items, weight, metrics)
        if fault["kind"] == "nan":
            for parameter in self.base.trainable_parameters(self.trained[0]).values():
                parameter.grad.fill_(torch.nan)
            return loss * torch.nan
        return loss

    Loop._step, kind.step = beginning, faulty  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def shard(job: dict[str, Any]) -> int:
    """What a base in 4 bits says and how its adapter's gradient is, whole and with its layers cut up by FSDP2."""
    import torch
    from safetensors.numpy import save_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lowrank_align.base import Base
    from lowrank_align.trees import Completion, TreeRow
    from lowrank_align.workers import Workers

    workers = Workers.join(torch.device("cpu"))
    rows = [TreeRow([1, 5, 9, 7], [Completion([8, 6, 4], [True] * 3), Completion([20, 30], [True] * 2)])]
    found = {}
    for name, float_storage in (("bytes", False), ("floats", True), ("sharded", True)):
        base = Base.load(job["argv"][2], quantize="nf4", device="cpu", float_storage=float_storage)
        layers = base.model.get_decoder().layers
        base.add_role("policy", rank=4)
        generator = torch.Generator().manual_seed(1)
        parameters = base.trainable_parameters("policy")
        for parameter in parameters.values():
            parameter.data.normal_(0, 0.1, generator=generator)
        for layer in layers if name == "sharded" else ():
            mesh = init_device_mesh("cpu", (workers.count,))
            fully_shard(layer, mesh=mesh, ignored_params=set(parameters.values()))
        with base.role("policy"):
            logps = base.token_scores(base.collate(rows)).per_token_logps
            logps.sum().backward()
        packed = [p.to_local() if hasattr(p, "to_local") else p for p in layers.parameters() if not p.requires_grad]
        found[f"{name}/bytes"] = torch.tensor(sum(p.numel() * p.element_size() for p in packed)).numpy()
        found[f"{name}/logps"] = logps.detach().numpy()
        found |= {f"{name}/gradient/{key}": p.grad.numpy() for key, p in parameters.items()}
    save_file(found, f"{job['folder']}/{job['name']}-{workers.rank}.safetensors")
    return 0


if __name__ == "__main__":
    herd()
