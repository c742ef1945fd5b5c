"""The demo in small: every stage runs, the report has what it promises, and nobody's folder is taken away."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lowrank_align.apps.demo import demo as demo_module
from rich.console import Console

from lowrank_align.cli import main


def test_the_whole_loop_in_small(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four methods on one copy of the base; a second call replaces the first's folder. Without the runs' curves."""
    monkeypatch.setattr(demo_module, "QUICK_SHARE", 40)
    monkeypatch.setattr(import_module("lowrank_align.plots"), "PLOTS", {})
    out = tmp_path / "demo"
    out.mkdir()
    (out / demo_module.MARKER).touch()
    (out / "of an older demo").touch()
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    assert not (out / "of an older demo").exists()
    report = json.loads((out / "report.json").read_text())
    assert set(report["methods"]) == {"sft", "dpo", "ppo", "ppo_exact"}
    for figures in report["methods"].values():
        assert -4 <= figures["score"] <= 3
        assert 0 <= figures["win_rate_interval"][0] <= figures["win_rate"] <= figures["win_rate_interval"][1] <= 1
        assert figures["tokens_per_second"] > 0
        assert figures["peak_memory_bytes"] > 0
    assert report["methods"]["sft"]["kl"] == 0
    assert 0 <= report["reward"]["accuracy"] <= 1
    assert report["base_copies"] == 1
    assert len(report["samples"]) == 3
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "| DPO |" in (out / "report.md").read_text()
    assert "one copy of the base" in capsys.readouterr().out


def test_a_folder_that_no_demo_wrote_is_left_alone(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "no demo wrote" in capsys.readouterr().err
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_demo_on_another_disk_is_replaced(tmp_path: Path) -> None:
    """The folder is a link: what is in it goes, the link stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / demo_module.MARKER).touch()
    (tmp_path / "elsewhere" / "of an older demo").touch()
    (tmp_path / "demo").symlink_to(tmp_path / "elsewhere")
    demo_module._clear(tmp_path / "demo")
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == [demo_module.MARKER]


@pytest.mark.parametrize(("flag", "value", "model"), [("--model", "m", "m"), ("--preset", "qwen3-4b", "Qwen/Qwen3-4B")])
def test_another_model_needs_a_score(flag: str, value: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", flag, value]) == 2
    assert f"error: demo: {model} needs --score module:function" in capsys.readouterr().err


def test_a_presets_settings(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one those of presets/tiny.yaml, a tenth of its 40 steps; with one its own, and of steps as many."""
    (tmp_path / "mine.yaml").write_text(
        "model: m\nsettings: {rank: 3}\nmethods:\n  sft: {learning_rate: 0.5, max_steps: 60}\n"
    )
    seen: list[Any] = []
    monkeypatch.setattr(demo_module, "train", lambda settings, **_: seen.append(settings))
    for preset in (None, str(tmp_path / "mine.yaml")):
        demo = demo_module.Demo(tiny_base, tmp_path, "", len, Console(), 0, 10, [], [], 4, preset)
        demo_module._train(demo, "sft", "sft", data="d")
    assert [(s.learning_rate, s.max_steps, s.rank, s.model) for s in seen] == [
        (1e-3, 4, 16, tiny_base.name),
        (0.5, 6, 3, tiny_base.name),
    ]
