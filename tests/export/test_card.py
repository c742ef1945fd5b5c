"""The export's README: what it says of the training and of the base."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig

from lowrank_align import adapters
from lowrank_align.config import DPOSettings, PPOSettings, SFTSettings
from lowrank_align.export.card import card
from lowrank_align.export.source import Source


def written(folder: Path, to: str = "merged", model: str = "", **record: Any) -> tuple[dict[str, Any], str]:
    """The card's front matter and its text, of a policy on the base `model`."""
    (folder / adapters.WEIGHTS).write_bytes(b"weights")
    saved = adapters.Saved(folder, LoraConfig(r=1), {}, 0.0)
    renderer: Any = SimpleNamespace(template_hash=lambda: "hash")
    named, base = model or str(folder), folder
    source = Source(folder, folder, "policy", named, base, "", None, saved, record, renderer, torch.bfloat16, 256)
    text = card(source, "out", to, torch.bfloat16, {"summary": ["parity"]}, [], None)
    return yaml.safe_load(text.split("---")[1]), text.split("---", 2)[2]


def training(text: str) -> list[str]:
    return text[text.index("## Training") :].splitlines()


def test_training_shows_what_differs_from_the_defaults(tmp_path: Path) -> None:
    """No defaults (`device auto`, a beta of 0.1), no places; the rows by their name on the hub."""
    settings = DPOSettings(
        model="some/model", data="some/pairs", out="r/dpo", adapter="r/sft", beta=0.1, loss="ipo", max_steps=30,
        overwrite=True, eval_data="r/held.jsonl", chat_template="my/chat.jinja", target_modules=["q_proj"],
    )  # fmt: skip
    found = training(written(tmp_path, method="dpo", config=settings.model_dump())[1])
    rows = {line for line in found if line.startswith("| ") and "---" not in line and line != "| | |"}
    wanted = {"| loss | ipo |", "| max_steps | 30 |", "| data | some/pairs |", "| target_modules | q_proj |"}
    assert rows == wanted and found[0] == "## Training: what differs from the defaults"


def test_training_by_the_defaults(tmp_path: Path) -> None:
    config = SFTSettings(model=str(tmp_path), data=str(tmp_path / "rows"), out="r/sft").model_dump()
    assert training(written(tmp_path, method="sft", config=config)[1])[2] == "With the default settings of `sft`."
    assert "## Training" not in written(tmp_path)[1]  # a plain PEFT adapter


@pytest.mark.parametrize(("reward", "shown"), [("mine:score", True), ("r/reward", False), ("C:\\runs\\reward", False)])
def test_a_reward_function_has_a_name_and_a_run_a_place(reward: str, shown: bool, tmp_path: Path) -> None:
    config = PPOSettings(model="some/model", prompts="rows.jsonl", reward=reward, out="out").model_dump()
    text = written(tmp_path, method="ppo", config=config)[1]
    assert ("| reward | mine:score |" in text) == shown and "rows.jsonl" not in text and "runs" not in text


def test_the_base_is_linked_only_by_its_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`some/model` is one until there is a folder of that name; three parts are a folder's wherever it is."""
    monkeypatch.chdir(tmp_path)
    front, text = written(tmp_path, to="adapter", model="some/model", base="some/model")
    assert front["base_model"] == "some/model" and front["tags"][0] == "base_model:adapter:some/model"
    assert "LoRA adapter for `some/model`" in text
    (tmp_path / "some/model").mkdir(parents=True)
    for name in ("some/model", "deep/some/model", "model"):
        front, text = written(tmp_path, to="adapter", model=name, base=name)
        assert "base_model" not in front and front["tags"] == ["lowrank_align"]
        assert "LoRA adapter for `model`" in text
