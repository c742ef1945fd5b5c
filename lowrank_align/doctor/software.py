"""Python, the system it runs on, and the packages."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from lowrank_align.doctor.finding import Finding, import_error, imports

PROJECT = "lowrank-align"
HERE = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 11)
IMPORTED = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def system() -> list[Finding]:
    """Python, and what it runs on."""
    version, where = platform.python_version(), f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        python = Finding("Python", "problem", version, "install Python 3.11 or newer")
    else:
        python = Finding("Python", "ok", version)
    release = platform.release()
    if "microsoft" not in release.lower():
        return [python, Finding("system", "ok", where)]
    if "WSL2" not in release and release.endswith("-Microsoft"):
        return [python, Finding("system", "warning", f"{where} (WSL 1: no GPU)", "wsl --set-version NAME 2")]
    advice = "keep models and data inside Linux (/mnt/c is slow); .wslconfig sets how much RAM Linux gets"
    return [python, Finding("system", "ok", f"{where} (WSL 2: the GPU's driver is that of Windows)", advice)]


def packages() -> list[Finding]:
    """What the project needs, against its lower bounds, and in a checkout against the tested versions."""
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version

        needed = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or []]
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        return [Finding("packages", "problem", f"cannot be listed ({error})", "pip install .")]
    found, differing, tested = [], [], _tested_versions()
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "problem", "not installed", f"pip install '{requirement}'"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            advice = f"pip install --upgrade '{requirement}'"
            found.append(Finding(name, "problem", f"{version}, needed: {requirement.specifier}", advice))
        elif name in tested and Version(version).release[:2] != Version(tested[name]).release[:2]:
            differing.append(f"{name} {version} (tested: {tested[name]})")
        if name in IMPORTED and (name == "torch" or imports("torch")) and (reason := import_error(name)):
            found.append(Finding(name, "problem", f"{version} cannot be imported: {reason}", f"reinstall {name}"))
    if differing:
        advice = "should work; if something does not: pip install -c constraints.txt ."
        found.append(Finding("versions", "warning", ", ".join(differing), advice))
    if not found:
        against = "as tested" if tested else "none older than needed"
        found.append(Finding("packages", "ok", f"{against}: {', '.join(_short_versions())}"))
    return found


def _tested_versions() -> dict[str, str]:
    """The pins of constraints.txt, in a checkout; an installed project has none."""
    file = HERE / "constraints.txt"
    if not (HERE / "pyproject.toml").is_file() or not file.is_file():
        return {}
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return dict(line.split("==", 1) for line in lines if "==" in line)  # type: ignore[misc]


def _short_versions() -> Iterator[str]:
    for name in IMPORTED:
        yield f"{name} {importlib.metadata.version(name)}"
