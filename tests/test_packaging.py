"""The wheel: complete, and working away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_INPUTS = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "lowrank_align", "apps", "presets"]


def run_python(*arguments: str, cwd: Path, **environment: str) -> str:
    """The standard output of a child Python, which must succeed."""
    child = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout (a build writes beside its sources) with one more preset in it."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    (source / "presets" / "made-by-this-test.yaml").write_text("model: tiny\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    run_python("-m", "pip", "wheel", *options, str(source), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that holds the installed wheel and nothing else: put it on PYTHONPATH."""
    target = wheel.parent / "installed"
    run_python(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
        cwd=wheel.parent,
    )
    return target


def test_wheel_holds_every_module_and_preset_and_nothing_else(wheel: Path) -> None:
    """lowrank_align/ as it is, apps/ with the page's own files as lowrank_align/apps/, and the presets."""
    package, apps, presets = ROOT / "lowrank_align", ROOT / "apps", ROOT / "presets"
    expected = {f"lowrank_align/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {f"lowrank_align/apps/{path.relative_to(apps).as_posix()}" for path in apps.rglob("*.py")}
    expected |= {f"lowrank_align/apps/studio/static/{path.name}" for path in (apps / "studio" / "static").iterdir()}
    expected |= {f"lowrank_align/presets/{path.name}" for path in presets.glob("*.yaml")}
    expected |= {"lowrank_align/py.typed", "lowrank_align/presets/made-by-this-test.yaml"}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_declares_licence_command_and_python(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(info["METADATA"]).decode().splitlines()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Apache License" in archive.read(info["LICENSE"]).decode()
    assert "lowrank-align = lowrank_align.cli:main" in archive.read(info["entry_points.txt"]).decode()


def test_installed_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    """Package and apps both come from the installed folder, and the presets lie where a module beside them looks."""
    code = (
        "import lowrank_align, lowrank_align.apps; from pathlib import Path;"
        "print(lowrank_align.__file__); print(lowrank_align.apps.__file__);"
        "print(Path(lowrank_align.__file__).parent / 'presets')"
    )
    package, apps, presets = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(package) == installed / "lowrank_align" / "__init__.py"
    assert Path(apps) == installed / "lowrank_align" / "apps" / "__init__.py"
    assert (Path(presets) / "made-by-this-test.yaml").read_text() == "model: tiny\n"


def test_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    """`--version` prints the version that pyproject.toml takes from the package; `--help` names the first command."""
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "lowrank_align/__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] in run_python("-m", "lowrank_align", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "demo" in run_python("-m", "lowrank_align", "--help", cwd=tmp_path, PYTHONPATH=str(installed))


def test_installed_wheel_trains(installed: Path, tmp_path: Path, trained: Path, tiny_llama: Path, cache: Path) -> None:
    """`show` and one step of `sft` from a folder that has nothing of the checkout, in one child; so has its preset."""
    rows, model = str(trained / "demonstrations.jsonl"), str(tiny_llama)
    few = ["--quantize", "none", "--max-steps", "1", "--batch-size", "2", "--rank", "2"]
    code = (
        "import sys; from lowrank_align.cli import main; from lowrank_align.presets import read_preset;"
        f"shown = main(['show', '--model', {model!r}, '--data', {rows!r}, '-n', '1']);"
        f"done = main(['sft', '--model', {model!r}, '--data', {rows!r}, '--out', 'run', *{few!r}]);"
        "print(shown, done, read_preset('tiny').model, sys.modules['lowrank_align'].__file__)"
    )
    out = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed), LOWRANK_ALIGN_CACHE=str(cache))
    assert out.splitlines()[-1] == f"0 0 tiny {installed / 'lowrank_align' / '__init__.py'}"
    assert "demonstrations.jsonl:1" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "plots" / "loss.png").is_file()


def test_constraints_pin_every_dependency_once_and_nothing_local() -> None:
    """Name==version lines only, sorted: a local tag (+cpu) or an address would tie the file to one machine."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = [re.fullmatch(r"([A-Za-z0-9._-]+)==[0-9][0-9A-Za-z.]*", line) for line in lines]
    assert all(names), [line for line, match in zip(lines, names, strict=True) if not match]
    pinned = [plain_name(match[1]) for match in names if match]
    assert pinned == sorted(set(pinned))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {plain_name(re.split(r"[<>=!~ ]", line)[0]) for line in wanted} <= set(pinned)


def plain_name(name: str) -> str:
    """A project name as package indexes compare it: lower case, one dash for each run of `-_.`."""
    return re.sub(r"[-_.]+", "-", name).lower()
