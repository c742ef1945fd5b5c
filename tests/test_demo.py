"""The demo in small: every stage runs, the report has what it promises, and nobody's folder is taken away."""

import json
from pathlib import Path

import pytest
from lowrank_align.apps.demo import demo as demo_module

from lowrank_align.cli import main


def test_the_whole_loop_in_small(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four methods on one copy of the base; a second call replaces the first's folder."""
    monkeypatch.setattr(demo_module, "QUICK_SHARE", 40)
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


def test_another_model_needs_a_score(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "some/model"]) == 2
    assert "--score module:function" in capsys.readouterr().err
