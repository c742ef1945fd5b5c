"""The Train tab's handlers, without a browser: what a page is sent before, while and after a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from lowrank_align.apps.studio.train import Handlers
from lowrank_align.apps.studio.train_parts import EMPTY, lay_out, progress_bar

from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Judgement, Record
from lowrank_align.studio.run_request import KNOBS, View


@pytest.fixture
def tab(studio: Any) -> Handlers:
    with gr.Blocks() as demo:
        speaker = gr.Dropdown(elem_id="chat-adapter")
        handlers = Handlers(studio, SimpleNamespace(demo=demo), lay_out(studio))
    assert handlers.speakers == [speaker]
    return handlers


def asked(tab: Handlers, name: str = "first", data: str = "everything", **numbers: Any) -> list[Any]:
    """What a page sends with Start."""
    given = {"max_steps": 2, "batch_size": 2} | numbers
    return ["dpo", name, data, None, "base", None, None, None, *(given.get(knob) for knob in KNOBS)]


def pairs(studio: Any) -> None:
    for i in range(3):
        record = Record("pair", f"Count to {i}: ", (Completion("no"), Completion("one, two")))
        studio.store.add(record)
        studio.store.judge(record.id, "ann", Judgement("preferred", ranks=(2, 1), tags=("short",)))


def test_every_answer_fills_its_components(tab: Handlers) -> None:
    assert len(tab.view()) == len(tab.live)
    assert len(tab.refresh(None, None, None)) == len(tab.choices)
    assert len(tab.open("dpo")) == len(tab.of_method) + len(tab.live) + len(tab.choices)
    assert len(tab.tick(-1)) == len(tab.live) + len(tab.choices)


def test_an_empty_studio_says_what_to_do(tab: Handlers) -> None:
    assert tab.view()[2] == EMPTY
    assert tab.check(*asked(tab)).startswith("✗ Nothing to learn from: dpo takes judged pairs")
    with pytest.raises(UserError, match="Collect some first"):
        tab.start(*asked(tab))


def test_a_run_is_seen_and_a_quiet_page_is_left_alone(tab: Handlers, studio: Any) -> None:
    pairs(studio)
    name, seen, *_ = tab.start(*asked(tab))
    assert name == "dpo-1"  # what is proposed for the next
    assert studio.trainer.wait(120)
    shown = dict(zip([part.elem_id for part in tab.live], tab.tick(seen), strict=False))
    assert "first: finished after" in shown["train-status"]
    assert 'value="2" max="2"' in shown["train-progress"]
    assert shown["train-ended"]["visible"] and shown["train-start"]["interactive"]
    assert not shown["train-stop"]["interactive"]
    version = studio.trainer.status().version
    assert all(value == gr.skip() for value in tab.tick(version))
    drawn = [update for update in tab.view() if isinstance(update, dict) and update.get("x_lim")]
    assert drawn and list(drawn[0]["value"]["step"]) == [1, 2]
    tabs, speaker = tab.chat()
    assert tabs["selected"] == "chat" and speaker["value"] == "first"
    assert tab.compare("ann")["selected"] == "arena"


def test_data_is_chosen_by_person_tag_or_file(tab: Handlers, studio: Any) -> None:
    pairs(studio)
    assert tab._data() == [("everything collected", "everything"), ("tagged short", "tag:short"),
                           ("an uploaded file", "uploaded")]  # fmt: skip
    assert tab.request(*asked(tab, data="tag:short")).data == View(tag="short")
    assert tab.request(*asked(tab, data="annotator:ann")).data == View(annotator="ann")
    assert tab.request(*asked(tab, data="")).data == View()
    with pytest.raises(UserError, match="no file is uploaded yet"):
        tab.request(*asked(tab, data="uploaded"))
    with pytest.raises(UserError, match="not in the folder of the runs"):
        tab.request(*asked(tab, data="file:../studio.db"))


def test_an_upload_counts_only_from_the_folder_of_uploads(tab: Handlers, studio: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("{}\n")
    with pytest.raises(UserError, match="upload it"):
        tab.take_upload(str(outside))


def test_a_method_brings_its_numbers_and_a_typed_name_stays(tab: Handlers) -> None:
    about, name, reward, loss, settings, *knobs = tab.take_method("ppo", "dpo-1")
    assert about.startswith("Proximal policy optimisation") and name == "ppo-1" and reward["visible"]
    shown = {knob: update for knob, update in zip(KNOBS, knobs, strict=True)}
    assert shown["kl_coefficient"]["value"] == 0.05 and not shown["beta"]["visible"]
    assert shown["batch_size"]["precision"] == 0 and shown["learning_rate"]["precision"] is None
    assert "max_new_tokens" in [row[0] for row in settings]
    assert tab.take_method("sft", "mine")[1] == gr.skip()
    assert not loss["visible"] and not shown["group_size"]["visible"]


def test_a_loss_is_chosen_where_there_are_several(tab: Handlers, studio: Any) -> None:
    pairs(studio)
    loss = tab.take_method("dpo", "")[3]
    assert loss["visible"] and loss["value"] == "sigmoid" and "simpo" in loss["choices"]
    assert tab.take_method("online-dpo", "")[3]["choices"] == ["sigmoid", "ipo", "hinge"]
    words = asked(tab)
    words[6] = "hinge"
    tab.start(*words)
    assert studio.trainer.wait(120)
    assert "loss:\n- hinge" in (studio.runs / "first" / "config.yaml").read_text()


def test_a_bar_needs_a_run() -> None:
    assert progress_bar(0, 0) == ""
    assert progress_bar(3, 10) == '<progress value="3" max="10" aria-label="steps done"></progress>'
