"""Runs that the page starts: checked, watched, stopped, resumed, and what is left of them on the base."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.config import METHODS, read_yaml
from lowrank_align.errors import NumericError, UserError
from lowrank_align.runs import read_state
from lowrank_align.store import Completion, Judgement, Record
from lowrank_align.studio import training
from lowrank_align.studio.live_run import LiveRun
from lowrank_align.studio.run_data import freeze
from lowrank_align.studio.run_request import Request, View, all_settings
from lowrank_align.studio.training import Trainer
from lowrank_align.studio.words import duration, flags_as_settings, sentence

QUICK = {"max_steps": 2, "batch_size": 2}


def said(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def judge(studio: Any, prompt: str, first: str, second: str, ranks: tuple[float, float], who: str = "you") -> None:
    """A pair that `who` has judged; equal ranks are a tie."""
    answers = tuple(Completion(said(text, "assistant"), source="base") for text in (first, second))
    record = Record("pair", said(prompt, "user"), answers)
    verdict = "tie" if ranks[0] == ranks[1] else "preferred"
    studio.store.add(record)
    studio.store.judge(record.id, who, Judgement(verdict, ranks=None if verdict == "tie" else ranks))


def collect(studio: Any, count: int = 6, who: str = "you") -> None:
    for i in range(count):
        judge(studio, f"Count to {i}.", f"one, two, {i}", "no", (1, 2), who)


def finish(studio: Any, request: Request) -> Any:
    studio.trainer.start(request)
    assert studio.trainer.wait(120)
    return studio.trainer.status()


def checkpointing(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def request(method: str = "dpo", name: str = "first", **changes: Any) -> Request:
    return Request(method, name, **({"knobs": QUICK} | changes))


# ---- a run


def test_a_run_from_the_store_to_a_voice(studio: Any) -> None:
    collect(studio)
    assert studio.trainer.status().state == "idle" and studio.trainer.in_words() == ""
    status = finish(studio, request(more="rank: 4\nsample_tokens: 4"))
    assert (status.state, status.step, status.total) == ("finished", 2, 2)
    assert "finished after" in status.sentence
    assert [entry["step"] for entry in studio.trainer.figures] == [1, 2]
    assert studio.trainer.figures[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy = reference
    assert any("training on 6 rows" in line for line in studio.trainer.log)
    assert studio.trainer.samples and studio.trainer.samples[0].prompt
    assert studio.trainer.health()[0].what == "Too few steps to say how it goes."
    assert "first" in studio.voices.names() and studio.trainer.before() == "base"
    assert studio.trainer.in_words() == ""


def test_what_a_run_leaves_behind(studio: Any) -> None:
    """No role, no recomputation and no training mode on the base; its rows beside it, as the config names them.

    `reward_2` is what a run's second reward model is called.
    """
    collect(studio)
    studio.base.add_role("reward_2", rank=2)
    studio.base.enable_checkpointing(True)
    assert checkpointing(studio.base.model)
    finish(studio, request(more="gradient_checkpointing: true"))
    assert set(studio.base.roles) == {"base"}
    assert not studio.base.model.training and not checkpointing(studio.base.model)
    rows = Path("runs/first.data.jsonl")
    assert read_yaml("runs/first/config.yaml")["data"] == str(rows)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 6
    assert lines[0] == {
        "prompt": said("Count to 0.", "user"),
        "chosen": said("one, two, 0", "assistant"),
        "rejected": said("no", "assistant"),
    }


def test_a_run_starts_from_another(studio: Any) -> None:
    collect(studio)
    assert finish(studio, request("sft", "taught")).state == "finished"
    assert finish(studio, request(start="taught")).state == "finished"
    assert read_yaml("runs/first/config.yaml")["adapter"] == "runs/taught"
    assert studio.trainer.before() == "taught"


def test_ppo_follows_a_reward_run(studio: Any) -> None:
    collect(studio, 2)
    with pytest.raises(UserError, match="no reward model yet, and ppo follows one"):
        studio.trainer.start(request("ppo", "follows"))
    assert finish(studio, request("reward", "taste")).state == "finished"
    with pytest.raises(UserError, match="tast: no reward run .did you mean taste"):
        studio.trainer.start(request("ppo", "follows", reward="tast"))
    asked = request("ppo", "follows", more="max_new_tokens: 4\nppo_epochs: 1\nrank: 2")
    status = finish(studio, asked)  # the only reward run need not be named
    assert status.state == "finished", status.sentence
    assert read_yaml("runs/follows/config.yaml")["reward"] == ["runs/taste"]
    assert studio.voices.rewards() == ["taste"] and "follows" in studio.voices.names()
    assert "objective/kl" in studio.trainer.figures[0]
    assert set(studio.base.roles) == {"base"}


def test_every_method_is_offered_with_its_numbers(studio: Any) -> None:
    assert studio.trainer.methods() == list(METHODS)
    for method in METHODS:
        names = [knob.name for knob in studio.trainer.knobs(method)]
        assert {"epochs", "max_steps", "learning_rate", "batch_size"} <= set(names)
        assert not {name for name, _, _ in all_settings(method)} & {"data", "prompts", "model", "out", "reward", *names}
    assert {knob.name: knob.value for knob in studio.trainer.knobs("dpo")}["beta"] == METHODS["dpo"].model_fields[
        "beta"
    ].default


def test_the_numbers_of_the_presets_model(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """presets/tiny.yaml: DPO with 2 epochs, a rate of 7e-4 and beta 0.3."""
    monkeypatch.setattr(studio.base, "name", "tiny")
    values = {knob.name: knob.value for knob in studio.trainer.knobs("dpo")}
    assert (values["epochs"], values["learning_rate"], values["beta"], values["batch_size"]) == (2, 7e-4, 0.3, 16)


# ---- one at a time, and endings


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs do nothing but wait for `release`, then raise `error` where there is one."""

    class Held:
        begun, release = threading.Event(), threading.Event()
        error: BaseException | None = None

    def train(settings: Any, **_: Any) -> None:
        Held.begun.set()
        assert Held.release.wait(60)
        if Held.error is not None:
            raise Held.error

    monkeypatch.setattr(training, "train", train)
    return Held


def test_one_run_at_a_time(studio: Any, held: Any) -> None:
    collect(studio, 2)
    studio.trainer.start(request())
    assert held.begun.wait(60)
    assert studio.trainer.status().state == "preparing" and studio.trainer.in_words() == "preparing first"
    with pytest.raises(UserError, match="first trains already; wait for it, or stop it first"):
        studio.trainer.start(request(name="second"))
    studio.trainer.stop()
    assert studio.trainer.status().state == "stopping"
    held.release.set()
    assert studio.trainer.wait(60)
    assert not Path("runs/second.data.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NumericError("runs/first: 5 steps in a row; lower --learning-rate"), "lower learning_rate"),
        (MemoryError(), "out of memory; lower micro_batch_size"),
        (RuntimeError("CUDA error: out of memory"), "out of memory; lower micro_batch_size"),
        (ValueError("shapes"), "an error of the program's own (ValueError), told in the terminal"),
    ],
)
def test_a_failing_run_is_one_sentence(studio: Any, held: Any, error: Exception, told: str) -> None:
    collect(studio, 2)
    held.error = error
    held.release.set()
    status = finish(studio, request())
    assert status.state == "failed" and told in status.sentence and "\n" not in status.sentence
    assert not status.active and not Path("runs/first.data.jsonl").exists()
    held.error = None
    assert finish(studio, request()).state == "finished"  # the name is free again, the studio usable


def test_a_request_that_fails_leaves_the_last_run_to_be_seen(studio: Any, held: Any) -> None:
    collect(studio, 2)
    held.release.set()
    finish(studio, request())
    Path("runs/first").mkdir()  # as a real run would have left it
    with pytest.raises(UserError, match="rannk: unknown setting .did you mean rank"):
        studio.trainer.start(request(name="second", more="rannk: 3"))
    assert studio.trainer.status().run == "first" and not Path("runs/second.data.jsonl").exists()


# ---- stop and resume


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[LiveRun], None]], None]:
    """Do something in the training thread after every step."""

    def wrap(function: Callable[[LiveRun], None]) -> None:
        step = LiveRun.step

        def stepped(self: LiveRun, number: int, figures: Any) -> None:
            step(self, number, figures)
            function(self)

        monkeypatch.setattr(LiveRun, "step", stepped)

    return wrap


def test_stop_saves_and_resume_goes_on(studio: Any, after_step: Any) -> None:
    collect(studio)
    asked = request(knobs={"max_steps": 4, "batch_size": 2}, more="save_steps: 50")
    after_step(lambda live: live.stop() if live.status().step == 1 else None)
    status = finish(studio, asked)
    assert (status.state, status.step, status.resumable) == ("stopped", 1, True)
    assert status.sentence == "first: stopped at step 1 of 4 and saved; Resume goes on."

    again = Trainer(studio)  # as after a new start of the program
    (found,) = again.resumable()
    assert (found.name, found.method, found.step) == ("first", "dpo", 1)
    assert found.sentence == "first (dpo) was stopped; it goes on from step 1."
    again.resume("first")
    assert again.wait(120)
    assert (again.status().state, again.status().step) == ("finished", 4)
    assert [entry["step"] for entry in again.figures] == [1, 2, 3, 4]
    assert again.resumable() == []
    with pytest.raises(UserError, match="no run can be resumed"):
        again.resume("first")


def test_a_run_that_died_is_offered(studio: Any, after_step: Any) -> None:
    """A killed process leaves `running` in run.json, and its lock is free."""
    collect(studio)
    after_step(lambda live: live.stop())
    finish(studio, request(knobs={"max_steps": 4, "batch_size": 2}))
    state = read_state(Path("runs/first")) or {}
    Path("runs/first/run.json").write_text(json.dumps(state | {"state": "running"}))
    assert studio.trainer.resumable()[0].sentence == "first (dpo) broke off; it goes on from step 1."


def test_a_closing_studio_stops_its_run_and_waits_for_the_save(studio: Any, after_step: Any) -> None:
    collect(studio)
    stepped = threading.Event()
    after_step(lambda live: stepped.set())
    studio.trainer.start(request(knobs={"max_steps": 100_000, "batch_size": 2}))
    assert stepped.wait(120)
    studio.trainer.close()
    status = studio.trainer.status()
    assert status.state == "stopped" and (read_state(Path("runs/first")) or {})["state"] == "stopped"
    assert list(Path("runs/first/checkpoints").glob(f"step-*{status.step}"))
    with pytest.raises(UserError, match="closing"):
        studio.trainer.start(request(name="second"))


# ---- before a start


def texts(studio: Any, asked: Request) -> list[str]:
    return [one.text for one in studio.trainer.check(asked).said]


def test_a_check_tells_rows_flaws_memory_and_time(studio: Any) -> None:
    """4 choices: the better one is the longer in 3 of them. One row is there twice, one also the other way round."""
    judge(studio, "A?", "long answer", "no", (1, 2))
    judge(studio, "A?", "long answer", "no", (1, 2))
    judge(studio, "A?", "long answer", "no", (2, 1))
    judge(studio, "B?", "a longer answer", "yes", (1, 2))
    judge(studio, "C?", "one", "two", (1, 1))
    check = studio.trainer.check(request(knobs={"epochs": 2, "batch_size": 4}))
    found = [one.text for one in check.said]
    assert (check.rows, check.steps, check.can_start) == (5, 3, True)
    assert found[0] == "5 pairs; 2 rounds in batches of 4: 3 steps."
    assert "Only 5 rows: good for a try, too few to learn a taste from." in found
    assert any(text.startswith("The chosen answer is the longer one in 75 %") for text in found)
    assert "1 tie: it teaches that both answers are as good." in found
    assert any(text.startswith("Exact copies of an earlier row: 1 of 5 rows") for text in found)
    assert any("opposite preference" in text and "1 of 5 rows" in text for text in found)
    assert any(text.startswith("Memory: needs ") for text in found)
    assert found[-1].startswith("Time: unknown until the first step")
    assert not Path("runs").exists() or not list(Path("runs").iterdir())  # nothing is written by looking


def test_a_check_of_clean_rows(studio: Any) -> None:
    collect(studio, 24)
    found = texts(studio, request(knobs={"epochs": 1, "batch_size": 24}))
    assert "No duplicates, no contradictions." in found
    assert "Only 1 step: with a batch size of 1 there are about 20." in found
    assert any("100 %" in text and text.endswith("Expect longer answers.") for text in found)


def test_a_check_of_one_annotators_rows(studio: Any) -> None:
    collect(studio, 3, who="ann")
    collect(studio, 2, who="ben")
    assert studio.trainer.check(request(data=View(annotator="ann"))).rows == 3
    assert studio.trainer.check(request()).rows == 5
    (nothing,) = texts(studio, request(data=View(annotator="cleo")))
    assert nothing.startswith(
        "Nothing to learn from: dpo takes judged pairs, and there are none by cleo yet. Collect some first"
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"more": "learning_rte: 1"}, "learning_rte: unknown setting (did you mean learning_rate?)"),
        ({"more": "learning_rate: 1"}, "has a field of its own"),
        ({"more": "data: /etc/passwd"}, "chosen above"),
        ({"more": "report_to: [wandb]"}, "chosen above"),
        ({"more": "quantize: nf4"}, "is the base's"),
        ({"more": "overwrite: true"}, "not set by hand"),
        ({"more": "rank: many"}, "rank: "),
        ({"more": "a: &x 1\nb: *x"}, "not valid YAML"),
        ({"knobs": {"learning_rate": -1}}, "learning_rate: "),
        ({"name": "../elsewhere"}, "no name for a run"),
        ({"name": " "}, "needs a name"),
        ({"start": "frist"}, "no adapter to start from"),
        ({"method": "dop"}, "did you mean dpo?"),
    ],
)
def test_what_may_not_be_asked(studio: Any, changes: dict[str, Any], told: str) -> None:
    collect(studio, 2)
    check = studio.trainer.check(Request(**({"method": "dpo", "name": "first"} | changes)))
    assert not check.can_start and told in check.said[0].text
    with pytest.raises(UserError):
        studio.trainer.start(Request(**({"method": "dpo", "name": "first"} | changes)))
    assert studio.trainer.status().state == "idle"


def test_names(studio: Any) -> None:
    assert studio.trainer.fresh_name("dpo") == "dpo-1"
    for name in ("dpo-1", "dpo-2"):
        Path("runs", name, "adapter").mkdir(parents=True)
    assert studio.trainer.fresh_name("dpo") == "dpo-3"
    with pytest.raises(UserError, match="dpo-2: a run of that name is there already; take dpo-3"):
        studio.trainer.start(request(name="dpo-2"))


def test_files(studio: Any, tmp_path: Path) -> None:
    """Only what lies beside the runs, or was uploaded; an upload is copied beside the run."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    uploads, beside = tmp_path / "uploads", tmp_path / "runs" / "mine.jsonl"
    for file in (uploads / "up.jsonl", beside, tmp_path / "secret.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(row) + "\n")
    (tmp_path / "runs" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert studio.trainer.files() == ["link.jsonl", "mine.jsonl"]
    assert studio.trainer.file("mine.jsonl") == beside.resolve()
    for outside in ("../secret.jsonl", "link.jsonl", str(tmp_path / "secret.jsonl"), str(uploads / "up.jsonl")):
        with pytest.raises(UserError, match="not in the folder of the runs"):
            studio.trainer.file(outside)
    (tmp_path / "runs" / "first.data.jsonl").symlink_to(tmp_path / "secret.jsonl")  # replaced, not written through
    secret = (tmp_path / "secret.jsonl").read_bytes()
    uploaded = studio.trainer.file(uploads / "up.jsonl", [uploads])
    assert texts(studio, request(data=uploaded))[0].startswith("1 pair;")
    assert finish(studio, request(data=uploaded)).state == "finished"
    assert read_yaml("runs/first/config.yaml")["data"] == "runs/first.data.jsonl"
    mine = studio.trainer.file("mine.jsonl")
    assert (tmp_path / "secret.jsonl").read_bytes() == secret
    assert not (tmp_path / "runs" / "first.data.jsonl").is_symlink()
    assert freeze(studio, "dpo", mine, Path("runs/other.data.jsonl")) == (beside.resolve(), 0)  # stays where it is


# ---- pace


def older_run(studio: Any, name: str, seconds: float, batch_size: int, base_hash: str | None = None) -> None:
    """A run of DPO with four steps of so many seconds, of which one was slow."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    record = {"base_hash": base_hash or studio.base.weights_hash, "method": "dpo"}
    record["config"] = {"batch_size": batch_size, "quantize": studio.base.quantize}
    (folder / "provenance.json").write_text(json.dumps(record))
    (folder / "run.json").write_text(json.dumps({"state": "finished", "method": "dpo", "started": name}))
    lines = [json.dumps({"step": i + 1, "seconds": s}) for i, s in enumerate((seconds, 90.0, seconds, seconds))]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_time_is_predicted_from_the_newest_run_of_this_base(studio: Any) -> None:
    """The newest took 8 s for 4 rows, 2 s each; 6 pairs twice in batches of 4 are 3 steps of 4 rows: 24 s."""
    collect(studio)
    older_run(studio, "2026-a", seconds=80.0, batch_size=4)
    older_run(studio, "2026-b", seconds=8.0, batch_size=4)
    older_run(studio, "2026-c", seconds=800.0, batch_size=4, base_hash="another")
    found = texts(studio, request(knobs={"epochs": 2, "batch_size": 4}))
    assert found[-1] == "Time: about 24 seconds, at the pace of 2026-b."


def test_when_there_are_enough_pairs(studio: Any) -> None:
    """By default one epoch: 60 pairs of 4 s each are 4 minutes."""
    assert studio.trainer.enough(12) == "38 more pairs make a first DPO round worth while."
    assert studio.trainer.enough(49) == "1 more pair make a first DPO round worth while."
    assert studio.trainer.enough(50) == "Enough for a first DPO round."
    older_run(studio, "2026-a", seconds=16.0, batch_size=4)
    assert Trainer(studio).enough(60) == "Enough for another DPO round (about 4 minutes here)."


def test_durations() -> None:
    seconds = {0.2: "1 second", 24.0: "24 seconds", 59.4: "59 seconds", 61: "1 minute", 250: "4 minutes"}
    seconds |= {3600: "1 h", 4800: "1 h 20 min"}
    assert {value: duration(value) for value in seconds} == seconds


def test_sentences_keep_names_as_they_are() -> None:
    assert sentence("no such file") == "No such file."
    assert sentence("rank: too large!") == "rank: too large!"
    assert sentence("max_length is small.") == "max_length is small."


def test_flags_are_told_as_settings() -> None:
    text = "lower --max-length or --rank; a --made-up-flag stays"
    assert flags_as_settings(text) == "lower max_length or rank; a --made-up-flag stays"
