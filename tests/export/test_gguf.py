"""llama.cpp's converter: found or not, run, and its file read back; the real one where LLAMA_CPP names a checkout."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lowrank_align.errors import EnvironmentProblem
from lowrank_align.export.gguf import SCRIPT, VARIABLE, _same_rows, compare_tensors, convert, find_converter

STAND_IN = """\
import sys
from pathlib import Path
model, _, outfile, _, outtype = sys.argv[1:]
assert Path(model, "config.json").is_file()
Path(outfile).write_text(f"GGUF {outtype}")
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "llama.cpp").mkdir()
    script = tmp_path / "llama.cpp" / SCRIPT
    script.write_text(STAND_IN)
    return script


def test_it_is_found_by_the_variable_or_on_the_path(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(stand_in.parent))
    assert find_converter() == stand_in
    monkeypatch.setenv(VARIABLE, str(stand_in))
    assert find_converter() == stand_in
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("PATH", str(stand_in.parent))
    assert find_converter() == stand_in


def test_without_it_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(EnvironmentProblem, match=r"set LLAMA_CPP to its folder; --to ollama needs none of it"):
        find_converter()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=f"{SCRIPT} is not there"):
        find_converter()


def test_it_gets_folder_file_and_type(stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    convert(stand_in, tmp_path, tmp_path / "x.gguf", torch.float16)
    assert (tmp_path / "x.gguf").read_text() == "GGUF f16"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_thing", "No module named 'no_such_thing'; pip install no_such_thing where lowrank_align is"),
        ("raise SystemExit('unknown model')", "failed: unknown model"),
        ("print('nothing written')", "failed: nothing written"),
    ],
)
def test_its_failure_is_one_line(code: str, problem: str, stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(code)
    with pytest.raises(EnvironmentProblem, match=problem):
        convert(stand_in, tmp_path, tmp_path / "x.gguf", torch.float32)


def test_rows_in_another_order_are_the_same_and_another_number_is_not() -> None:
    matrix = torch.randn(6, 8).bfloat16()
    assert _same_rows(matrix[torch.randperm(6)].float(), matrix)
    other = matrix.clone()
    other.view(torch.int16)[3, 2] += 1
    assert not _same_rows(other.float(), matrix) and not _same_rows(matrix[:5].float(), matrix)


def test_without_a_reader_it_says_so(stand_in: Path, tmp_path: Path) -> None:
    if find_spec("gguf") is not None:
        pytest.skip("the gguf package is installed")
    assert "not installed" in compare_tensors(tmp_path / "x.gguf", tmp_path, stand_in)["note"]


@pytest.mark.skipif(
    VARIABLE not in os.environ or find_spec("sentencepiece") is None,
    reason=f"{VARIABLE} names no checkout of llama.cpp, or sentencepiece, which its converter needs, is not installed",
)
def test_the_real_converter(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """35 matrices of the layers and the embeddings, which are the head too."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = shared / "models" / "stories260k"
    converter = find_converter()
    convert(converter, model, tmp_path / "x.gguf", torch.float32)
    assert compare_tensors(tmp_path / "x.gguf", model, converter) == {"compared": 36, "tensors": 47, "wrong": []}
