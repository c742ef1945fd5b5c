"""What the doctor says of machines that are not here: every branch with a faked environment, and once the real one."""

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from huggingface_hub import constants

from lowrank_align import doctor
from lowrank_align.doctor import Finding, can_train, gpu, quantisation, software, surroundings
from lowrank_align.doctor.gpu import gpus, kernels_for, training_device
from lowrank_align.errors import EXIT_DONE, EXIT_ENVIRONMENT

TOKEN = "hf_" + "Tt0" * 12
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(capability=(8, 9), ...)`: a torch that sees such a GPU, or none; and what nvidia-smi would print."""

    def fake(
        *,
        capability: tuple[int, int] | None = None,
        architectures: list[str] | None = None,
        name: str = "NVIDIA GeForce",
        cuda: str | None = "13.0",
        hip: str | None = None,
        gfx: str = "gfx1100:sramecc-",
        free: float = 11.0,
        bf16: bool = True,
        count: int = 1,
        smi: list[str] | None = None,
        mps: bool = False,
        xpu: bool = False,
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        for target, value in {
            "cuda.is_available": capability is not None,
            "cuda.device_count": count,
            "cuda.get_device_capability": capability,
            "cuda.get_device_name": name,
            "cuda.mem_get_info": (int(free * 2**30), 12 * 2**30),
            "cuda.get_arch_list": CU130 if architectures is None else architectures,
            "cuda.get_device_properties": SimpleNamespace(gcnArchName=gfx),
            "backends.mps.is_available": mps,
            "xpu.is_available": xpu,
            "xpu.device_count": 1,
            "xpu.get_device_name": "Intel Arc B580",
        }.items():
            monkeypatch.setattr(f"torch.{target}", lambda *args, value=value: value)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: bf16)
        lines = smi or []
        monkeypatch.setattr(
            gpu, "_nvidia_smi", lambda fields="name": ["580.65"] * bool(lines) if "name" not in fields else lines
        )

    fake()
    return fake


def only_gpu() -> Finding:
    """The one GPU finding, behind the one about torch."""
    build, found = gpus()
    assert (build.topic, build.level, found.topic) == ("torch", "ok", "GPU")
    return found


# ---- which GPUs torch has code for


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), CU130, "built"),
        ((8, 9), CU130, "built"),  # sm_86's code runs on 8.9
        ((8, 7), ["sm_89"], "none"),  # but not the other way round
        ((6, 1), CU130, "none"),
        ((6, 1), CU126, "built"),  # sm_60's
        ((12, 0), CU130, "built"),
        ((12, 1), CU130, "built"),
        ((12, 0), CU126, "none"),
        ((12, 0), [*CU126, "compute_90"], "compiled at start"),
        ((9, 0), ["sm_90a"], "built"),
        ((9, 1), ["sm_90a"], "none"),  # code with a letter is for one
        ((10, 3), ["sm_100"], "built"),
        ((8, 0), [], "none"),
    ],
)
def test_which_capabilities_have_kernels(capability: tuple[int, int], architectures: list[str], expected: str) -> None:
    """CUDA's rules: machine code runs on the same major version from its minor one on; PTX on everything later."""
    assert kernels_for(capability, architectures) == expected


def test_a_good_gpu(machine: Callable[..., None]) -> None:
    machine(capability=(8, 9), name="NVIDIA GeForce RTX 4070", smi=["there"])
    assert only_gpu() == Finding(
        "GPU", "ok", "NVIDIA GeForce RTX 4070, capability 8.9, driver 580.65, 11.0 of 12.0 GiB free, bf16"
    )
    assert training_device(gpus()) == "cuda"


def test_several_gpus(machine: Callable[..., None]) -> None:
    machine(capability=(8, 9), count=2)
    assert [finding.topic for finding in gpus()] == ["torch", "GPU", "GPU"]


def test_a_gtx_1060_with_a_new_torch(machine: Callable[..., None]) -> None:
    """Capability 6.1: the code for CUDA 13 begins at 7.5."""
    machine(capability=(6, 1), name="NVIDIA GeForce GTX 1060", bf16=False)
    found = only_gpu()
    assert found.level == "problem"
    assert found.found == (
        "NVIDIA GeForce GTX 1060, capability 6.1, 11.0 of 12.0 GiB free, fp16 (no bf16); this torch has no code for it "
        "(only sm_75, sm_80, sm_86, sm_90, sm_100, sm_120)"
    )
    assert found.advice == (
        "install another torch build, one for an older CUDA (PyTorch's install selector names the build), "
        "or --device cpu"
    )
    assert training_device(gpus()) == "cpu"
    assert not can_train([found])


def test_a_gtx_1060_with_an_older_torch(machine: Callable[..., None]) -> None:
    machine(capability=(6, 1), architectures=CU126, bf16=False)
    found = only_gpu()
    assert found.level == "warning"
    assert "bitsandbytes recommends 7.5" in found.advice
    assert can_train([found])


def test_a_gpu_that_bitsandbytes_has_left_behind(machine: Callable[..., None]) -> None:
    machine(capability=(5, 2), architectures=CU126, bf16=False)
    found = only_gpu()
    assert (found.level, found.advice) == ("problem", "--device cpu")
    assert found.found.endswith("; too old for bitsandbytes (6.0 and up)")


def test_an_rtx_5090_with_an_older_torch(machine: Callable[..., None]) -> None:
    """Capability 12.0: newer than what the build knows; with PTX inside, the driver can still compile it."""
    machine(capability=(12, 0), architectures=CU126)
    found = only_gpu()
    assert found.level == "problem"
    assert found.advice.startswith("install another torch build, a newer one (")
    machine(capability=(12, 0), architectures=[*CU126, "compute_90"])
    found = only_gpu()
    assert found.level == "warning"
    assert found.found.endswith("; newer than this torch")


def test_little_free_memory(machine: Callable[..., None]) -> None:
    machine(capability=(8, 9), free=3.9)
    assert only_gpu().level == "warning"
    machine(capability=(8, 9), free=4.0)
    assert only_gpu().level == "ok"


def test_a_gpu_in_trouble(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(capability=(8, 9))

    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("torch.cuda.mem_get_info", fail)
    found = only_gpu()
    assert (found.level, found.found) == ("problem", "GPU 0 cannot be asked: CUDA error: unknown error")


def test_amd(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(capability=(11, 0), cuda=None, hip="7.0", name="AMD Radeon RX 7900", architectures=["gfx90a", "gfx1100"])
    build, found = gpus()
    assert build.found.endswith(", ROCm 7.0")
    assert found == Finding("GPU", "ok", "AMD Radeon RX 7900, gfx1100, 11.0 of 12.0 GiB free, bf16")
    machine(capability=(10, 1), cuda=None, hip="7.0", gfx="gfx1010", architectures=["gfx90a", "gfx1100"])
    found = only_gpu()
    assert found.level == "problem"
    assert found.found.endswith("; this torch has no code for it (gfx90a, gfx1100)")
    machine(cuda=None)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/kfd")
    found = only_gpu()
    assert (found.level, found.found) == ("warning", "an AMD GPU: not used, this torch is not built for ROCm")


def test_intel(machine: Callable[..., None]) -> None:
    machine(cuda=None, xpu=True)
    assert only_gpu() == Finding("GPU", "ok", "Intel Arc B580 (XPU)")
    assert training_device(gpus()) == "xpu"


def test_apple(machine: Callable[..., None]) -> None:
    machine(cuda=None, mps=True)
    found = only_gpu()
    assert found.level == "warning"
    assert "--device mps --quantize none" in found.advice
    assert training_device(gpus()) == "cpu"


def test_no_gpu_at_all(machine: Callable[..., None]) -> None:
    found = only_gpu()
    assert (found.level, found.found) == ("warning", "none")
    assert found.advice.startswith("training runs on the CPU")
    assert training_device(gpus()) == "cpu"
    assert training_device([]) is None


def test_an_nvidia_gpu_that_torch_does_not_see(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Either torch is the CPU's, or the driver is too old for its CUDA; torch warns why."""
    line = "NVIDIA GeForce RTX 3060, 470.1, 8.6"
    machine(cuda=None, smi=[line])
    found = only_gpu()
    assert (found.level, found.found) == ("warning", f"{line}: not used, this torch is not built for CUDA")
    assert found.advice.startswith("install torch for CUDA (")
    machine(smi=[line])

    def unavailable() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old (found version 11040).\nMore.", stacklevel=1)
        return False

    monkeypatch.setattr("torch.cuda.is_available", unavailable)
    found = only_gpu()
    assert found.level == "warning"
    assert found.found == (
        f"{line}: not used, CUDA does not start: The NVIDIA driver on your system is too old (found version 11040)."
    )
    assert found.advice.startswith("update its driver to one for CUDA 13.0;")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")
def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu._nvidia_smi() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@"\necho " A, 1.2, 8.6"\n')
    tool.chmod(0o755)
    assert gpu._nvidia_smi("name") == ["--query-gpu=name --format=csv,noheader", "A, 1.2, 8.6"]
    tool.write_text("#!/bin/sh\necho broken\nexit 9\n")
    assert gpu._nvidia_smi() == []


# ---- bitsandbytes


def test_the_self_test_on_this_machine() -> None:
    """NF4 moves random normal weights by 9 to 10 % (of their root mean square): its known error; int8 by under 2 %."""
    nf4, int8 = doctor.self_test("cpu")
    assert (nf4.level, int8.level) == ("ok", "ok")
    assert nf4.found.startswith("on cpu: as in fp32 to 9.")
    assert 0.08 < quantisation._try_nf4("cpu") < 0.11
    assert 0 < quantisation._try_int8("cpu") < 0.02


def test_the_self_test_notices_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes in the wrong order; a backward that forgets a factor; NaN; a kernel that is not there."""
    from bitsandbytes import functional, nn

    restore = functional.dequantize_4bit
    with monkeypatch.context() as patch:
        patch.setattr(functional, "dequantize_4bit", lambda *args: restore(*args).flip(0))
        with pytest.raises(AssertionError, match="quantised weights are off by"):
            quantisation._try_nf4("cpu")
    forward = nn.Linear4bit.forward
    for wrong, reason in {
        "double": "forward is off by 100%",
        "detached": "backward is off by",
        "nan": "forward is off by nan%",
    }.items():

        def broken(self: Any, x: Any, wrong: str = wrong) -> Any:
            right = forward(self, x)
            return {"double": 2 * right, "detached": right.detach() + x[:, :64] * 0, "nan": right * torch.nan}[wrong]

        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear4bit, "forward", broken)
            nf4, int8 = doctor.self_test("cpu")
        assert (nf4.level, int8.level) == ("problem", "ok")
        assert nf4.found.startswith(f"on cpu: {reason}")

    def missing(self: Any, x: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available\nSome more.")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear8bitLt, "forward", missing)
        nf4, int8 = doctor.self_test("cpu")
    assert (nf4.level, int8.level) == ("ok", "warning")  # nobody needs int8
    assert int8.found == "on cpu: CUDA error: no kernel image is available"


# ---- Python and packages


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.system()[0] == Finding("Python", "ok", platform.python_version())
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert doctor.system()[0].level == "problem"


@pytest.mark.parametrize(
    ("release", "level", "words"),
    [
        ("6.8.0-45-generic", "ok", ""),
        ("5.15.153.1-microsoft-standard-WSL2", "ok", "WSL 2"),
        ("4.4.0-19041-Microsoft", "warning", "WSL 1: no GPU"),
    ],
)
def test_windows_subsystem(monkeypatch: pytest.MonkeyPatch, release: str, level: str, words: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    system = doctor.system()[1]
    assert system.level == level
    assert words in system.found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The versions that the machine seems to have; the project needs two packages, and its pins are 2.13.0 and 1.5."""
    versions = {"torch": "2.13.0+cpu", "numpy": "1.5.2"} | dict.fromkeys(software.IMPORTED[1:], "1.0")

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=2.11", "numpy>=1.4", "trl>=1; extra == 'dev'"]
    )
    monkeypatch.setattr(software, "HERE", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").write_text("# tested\ntorch==2.13.0\nnumpy==1.5.0  # pinned\n")
    return versions


def test_packages_as_tested(installed: dict[str, str], tmp_path: Path) -> None:
    """Local tags and the last number make no difference; extras are not needed."""
    (finding,) = doctor.packages()
    assert finding.level == "ok"
    assert finding.found.startswith("as tested: torch 2.13.0+cpu, transformers 1.0")
    (tmp_path / "pyproject.toml").unlink()  # installed from a wheel: there are no pins
    assert doctor.packages()[0].found.startswith("none older than needed: torch")


def test_packages_that_are_missing_old_or_others(installed: dict[str, str]) -> None:
    installed["torch"] = "2.10.0+cu126"
    del installed["numpy"]
    assert doctor.packages() == [
        Finding("torch", "problem", "2.10.0+cu126, needed: >=2.11", "pip install --upgrade 'torch>=2.11'"),
        Finding("numpy", "problem", "not installed", "pip install 'numpy>=1.4'"),
    ]
    installed |= {"torch": "2.14.1", "numpy": "1.5.9"}
    (finding,) = doctor.packages()
    assert (finding.topic, finding.level) == ("versions", "warning")
    assert finding.found == "torch 2.14.1 (tested: 2.13.0)"


def test_a_project_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (finding,) = doctor.packages()
    assert (finding.level, finding.advice) == ("problem", "pip install .")


@pytest.mark.parametrize("broken", ["torch", "bitsandbytes", "huggingface_hub", "psutil"])
def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A DLL that is missing, a half-removed package: a finding, and everything else is still looked at."""
    original = importlib.import_module

    def failing(name: str, package: str | None = None) -> Any:
        if name == broken:
            raise OSError(f"lib{broken}.so: cannot open shared object file\nmore")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", failing)
    monkeypatch.setattr(doctor, "self_test", lambda device: [Finding("NF4 test", "ok", f"on {device}")])
    findings = doctor.examine()
    topics = {finding.topic: finding for finding in findings}
    assert ("NF4 test" in topics) == (broken not in ("torch", "bitsandbytes"))
    assert ("GPU" in topics) == ("threads" in topics) == (broken != "torch")
    assert ("hub cache" in topics) == (broken != "huggingface_hub")
    assert ("RAM" in topics) == (broken != "psutil")
    assert {"Python", "runs (here)", "own cache", "hub"} <= set(topics)
    if broken in software.IMPORTED or broken == "huggingface_hub":
        assert not can_train(findings)
        found = topics["hub" if broken == "huggingface_hub" else broken].found
        assert f"cannot be imported: lib{broken}.so: cannot open shared object file" in found


# ---- memory, disk, hub, threads


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(total=16 * 2**30, available=8 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: state)
    monkeypatch.setattr(surroundings, "_container_limit", lambda: None)
    assert doctor.memory() == [Finding("RAM", "ok", "8.0 of 16.0 GiB free")]
    state.available = 3 * 2**30
    assert doctor.memory()[0].level == "warning"
    state.available = 8 * 2**30
    monkeypatch.setattr(surroundings, "_container_limit", lambda: 6 * 2**30)
    assert doctor.memory() == [Finding("RAM", "ok", "6.0 of 6.0 GiB free (a container's limit)")]
    monkeypatch.setattr(surroundings, "_container_limit", lambda: 2**62)  # what no limit looks like
    assert doctor.memory() == [Finding("RAM", "ok", "8.0 of 16.0 GiB free")]


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each place the nearest folder that is there; 20 GiB are few for models, 64 MiB are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    usage = SimpleNamespace(free=30 * 2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert doctor.disks() == [
        Finding("runs (here)", "ok", f"{tmp_path}: 30.0 GiB free"),
        Finding("own cache", "ok", f"{tmp_path / 'not' / 'there'}: 30.0 GiB free"),
        Finding("hub cache", "ok", f"{tmp_path / 'hub'}: 30.0 GiB free"),
    ]
    assert list(tmp_path.iterdir()) == []
    usage.free = 19 * 2**30
    assert [finding.level for finding in doctor.disks()] == ["warning"] * 3
    usage.free = 63 * 2**20
    assert [finding.level for finding in doctor.disks()] == ["problem"] * 3

    def denied(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    own = doctor.disks()[1]
    assert (own.level, own.advice) == ("problem", "LOWRANK_ALIGN_CACHE names another folder")
    assert own.found == f"{tmp_path / 'not' / 'there'}: cannot be written (Permission denied)"


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is looked for and not shown."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert doctor.hub() == [Finding("hub", "ok", "logged in")]
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")
    assert doctor.hub() == [Finding("hub", "ok", "logged in, at the address in HF_ENDPOINT")]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert doctor.hub()[0].found.startswith("not logged in (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (finding,) = doctor.hub()
    assert finding.level == "warning"
    assert finding.found.startswith("offline (HF_HUB_OFFLINE is set), not logged in")

    def expired() -> str:
        raise RuntimeError(f"cannot renew {TOKEN}")

    monkeypatch.setattr("huggingface_hub.get_token", expired)
    assert doctor.hub() == [Finding("hub", "warning", "the login cannot be read: RuntimeError", "hf auth login")]


@pytest.mark.parametrize(
    ("count", "policy", "level"),
    [
        (4, "PASSIVE", "ok"),
        (4, "passive", "ok"),
        (5, "PASSIVE", "warning"),
        (4, "ACTIVE", "warning"),
        (1, "", "warning"),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, count: int, policy: str, level: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    (finding,) = doctor.threads()
    assert finding.level == level
    assert finding.found == f"{count} of 4 cores, OMP_WAIT_POLICY={policy or 'unset'}"


# ---- the command


def test_the_command_here(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real machine: this one runs the tests, so it can train. Nothing is wider than 80 but for a path, nothing
    tells the token, and JSON says the same."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = command("doctor")
    assert (shown.code, shown.err) == (EXIT_DONE, "")
    assert shown.out.splitlines()[-1] == "training can run here"
    assert [line for line in shown.out.splitlines() if len(line) > 80 and "/" not in line] == []
    machine_read = command("doctor", "--json")
    report = json.loads(machine_read.out)
    assert (machine_read.code, report["can_train"]) == (EXIT_DONE, True)
    assert {finding["topic"] for finding in report["findings"]} >= {"Python", "torch", "GPU", "NF4 test", "hub"}
    assert all(finding["topic"] in shown.out for finding in report["findings"])
    assert TOKEN not in shown.out + machine_read.out


def test_the_command_where_training_cannot_run(
    command: Callable[..., Any], machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test then takes the CPU, which `--device cpu` would."""
    machine(capability=(6, 1), name="NVIDIA GeForce GTX 1060", bf16=False)
    monkeypatch.setattr(doctor, "self_test", lambda device: [Finding("NF4 test", "ok", f"on {device}")])
    for check in ("system", "packages", "memory", "disks", "hub", "threads"):
        monkeypatch.setattr(doctor, check, lambda: [])
    shown = command("doctor")
    assert shown.code == EXIT_ENVIRONMENT
    assert shown.out == (
        f"ok       torch        {torch.__version__}, CUDA 13.0\n"
        "problem  GPU          NVIDIA GeForce GTX 1060, capability 6.1, 11.0 of 12.0 GiB\n"
        "                      free, fp16 (no bf16); this torch has no code for it (only\n"
        "                      sm_75, sm_80, sm_86, sm_90, sm_100, sm_120)\n"
        "                      -> install another torch build, one for an older CUDA\n"
        "                         (PyTorch's install selector names the build), or\n"
        "                         --device cpu\n"
        "ok       NF4 test     on cpu\n"
        "training as it is by default cannot run: 1 problem\n"
    )
