"""llama.cpp's file. No library converts to it; llama.cpp's own `convert_hf_to_gguf.py` does, where it is."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_align.errors import EnvironmentProblem
from lowrank_align.export.source import NAMES
from lowrank_align.export.verify import TensorFiles

SCRIPT, VARIABLE = "convert_hf_to_gguf.py", "LLAMA_CPP"
OUT_TYPES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
MISSING = re.compile(r"No module named '([\w-]+)")


def find_converter() -> Path:
    """llama.cpp's converter: in the checkout that `LLAMA_CPP` names, or on PATH. EnvironmentProblem without it."""
    if checkout := os.environ.get(VARIABLE):
        script = Path(checkout).expanduser()
        script = script if script.name == SCRIPT else script / SCRIPT
        if not script.is_file():
            raise EnvironmentProblem(f"{VARIABLE}: {script} is not there; name a checkout of llama.cpp")
        return script
    found = shutil.which(SCRIPT) or next(
        (str(p) for folder in os.get_exec_path() if (p := Path(folder) / SCRIPT).is_file()), None
    )
    if found is None:
        raise EnvironmentProblem(
            f"--to gguf needs llama.cpp's {SCRIPT}: get llama.cpp's source, set {VARIABLE} to its folder; "
            "--to ollama needs none of it"
        )
    return Path(found)


def convert(converter: Path, model: Path, file: Path, dtype: torch.dtype) -> None:
    """Run the converter on a model folder; EnvironmentProblem with its last words where it fails."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(file)]
    command += ["--outtype", OUT_TYPES[NAMES[dtype]]]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not file.is_file():
        words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = words[-1] if words else f"exit code {done.returncode}"
        module = MISSING.search(last)
        remedy = f"; pip install {module[1]} where lowrank_align is" if module else ""
        raise EnvironmentProblem(f"{converter.name} failed: {last}{remedy}")


def compare_tensors(file: Path, model: Path, converter: Path) -> dict[str, Any]:
    """The file's matrices against the model folder's, by their rows: llama.cpp permutes those of queries and keys.

    {"compared", "tensors", "wrong"}, or {"note"} where no reader is installed. One-dimensional tensors are left out:
    some families' norms are stored otherwise.
    """
    reader = _reader(converter)
    if reader is None:
        return {"note": "not read back: the gguf package is not installed"}
    try:
        found = reader.GGUFReader(str(file))
        arch = str(found.fields["general.architecture"].contents())
        blocks = int(found.fields[f"{arch}.block_count"].contents())
        kind = next(key for key, name in reader.MODEL_ARCH_NAMES.items() if name == arch)
    except (KeyError, StopIteration, ValueError) as error:
        return {"note": f"not read back: {error}"}
    names, files = reader.get_tensor_name_map(kind, blocks), TensorFiles(model)
    ours = {names.get_name(key, (".weight", ".bias")): key for key in files.names()}
    compared, wrong = 0, []
    for tensor in found.tensors:
        values = _values(reader, tensor)
        if values is None or values.dim() != 2 or tensor.name not in ours:
            continue
        compared += 1
        if not _same_rows(values, files[ours[tensor.name]]):
            wrong.append(str(tensor.name))
    return {"compared": compared, "tensors": len(found.tensors), "wrong": wrong}


def _reader(converter: Path) -> Any:
    """The `gguf` package: the installed one, or that of the converter's own checkout."""
    if importlib.util.find_spec("gguf") is None:
        beside = converter.resolve().parent / "gguf-py"
        if not (beside / "gguf").is_dir():
            return None
        sys.path.append(str(beside))
    import gguf

    return gguf


def _values(reader: Any, tensor: Any) -> Tensor | None:
    """The numbers of an unquantised tensor in fp32, as rows; None for a quantised one."""
    if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
        return None
    shape = [int(n) for n in reversed(tensor.shape)]
    if tensor.tensor_type.name == "BF16":
        return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).float().reshape(shape)
    return torch.from_numpy(tensor.data.copy()).float().reshape(shape)


def _same_rows(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two matrices have the same rows in any order, by a weighted sum of each in fp64."""
    if theirs.shape != ours.shape:
        return False

    def keys(matrix: Tensor) -> Tensor:
        weights = torch.linspace(1.0, 2.0, matrix.shape[1], dtype=torch.float64)
        return torch.cat([part.double() @ weights for part in matrix.float().split(4096)]).sort().values

    return torch.allclose(keys(theirs), keys(ours), rtol=1e-9, atol=1e-9)
