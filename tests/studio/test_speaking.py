"""The thread in which the base does what people ask: in which order, beside a run, and what becomes of errors."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.errors import UserError
from lowrank_align.rollout import generator_for, sample
from lowrank_align.studio import speaking
from lowrank_align.studio.answers import Source
from lowrank_align.studio.speaking import AHEAD, CHAT, COLLECT, Speaker
from lowrank_align.studio.voices import BASE, LIVE

PROMPT = [{"role": "user", "content": "hello"}]
PAIRS = [{"prompt": f"{i}. Say: ", "chosen": f"a good word {i}", "rejected": f"bad {i}"} for i in range(6)]


@pytest.fixture
def speaker(tiny_base: Any) -> Iterator[Speaker]:
    made = Speaker(tiny_base)
    yield made
    made.close()


class Held:
    """Keeps the speaker busy until it is let go, so that what comes meanwhile waits together."""

    def __init__(self, speaker: Speaker) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

        def work() -> Iterator[None]:
            self.begun.set()
            self.go_on.wait(60)
            yield

        self.ticket = speaker.start(work(), speaking.NOW)
        self.begun.wait(60)


def noted(order: list[str], name: str, bits: int) -> Iterator[None]:
    for _ in range(bits):
        order.append(name)
        yield


def test_the_urgent_first_and_equals_in_turns(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat's three bits, then the two collecting ones by turns, then what is drawn ahead."""
    monkeypatch.setattr(speaking, "AHEAD_AFTER_SECONDS", 0.0)
    held, order = Held(speaker), list[str]()
    asked = [("ahead", AHEAD, 1), ("left", COLLECT, 2), ("right", COLLECT, 2), ("chat", CHAT, 3)]
    tickets = [speaker.start(noted(order, name, bits), urgency) for name, urgency, bits in asked]
    held.go_on.set()
    for ticket in tickets:
        assert ticket.wait(60)
    assert order == ["chat", "chat", "chat", "left", "right", "left", "right", "ahead"]


def test_what_is_drawn_ahead_waits_a_moment_unless_it_is_wanted(speaker: Speaker, monkeypatch: Any) -> None:
    monkeypatch.setattr(speaking, "AHEAD_AFTER_SECONDS", 3600.0)
    order: list[str] = []
    ticket = speaker.start(noted(order, "ahead", 1), AHEAD)
    speaker.call(lambda: None)
    assert order == [] and not ticket.done.is_set()
    ticket.urgency = COLLECT
    speaker.call(lambda: None)  # wakes it
    assert ticket.wait(60) and order == ["ahead"]


def test_errors_reach_whoever_asked_and_nobody_else(speaker: Speaker) -> None:
    def fails() -> None:
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        speaker.call(fails)
    assert speaker.call(lambda: 7) == 7
    assert speaker.call(lambda: speaker.call(lambda: 8)) == 8  # from the speaker's own thread


def test_cancelled_work_is_closed_and_those_who_wait_are_told(speaker: Speaker) -> None:
    closed, told = threading.Event(), threading.Event()

    def work() -> Iterator[None]:
        try:
            while True:
                yield
        finally:
            closed.set()

    ticket = speaker.start(work())
    ticket.when_done(told.set)
    while not ticket.served:
        ticket.wait(0.001)
    ticket.cancel()
    assert ticket.wait(60) and closed.wait(60) and told.wait(60)
    ticket.when_done(told.clear)  # at once, as it is done already
    assert not told.is_set()


def test_a_closed_speaker_takes_nothing_more(tiny_base: Any) -> None:
    made = Speaker(tiny_base)
    waiting = made.start(noted([], "x", 10**9))
    made.close()
    assert waiting.done.is_set()
    with pytest.raises(RuntimeError, match="closing"):
        made.start(iter(()))


def test_an_answer_is_what_the_base_samples(studio: Any) -> None:
    """The same draws as `sample` with the answer's seed, temperature and top-p under the same role."""
    answer = studio.answer(PROMPT, Source(temperature=0.9, top_p=0.8, max_new_tokens=12), seed=5)
    assert answer.wait(60)
    generator = generator_for(studio.base.device, 5, "answer")
    drawn = sample(
        studio.base, [answer.prompt_ids], end_ids=studio.renderer.end_ids, max_new_tokens=12, generator=generator,
        temperature=0.9, top_p=0.8,
    )[0][0]  # fmt: skip
    assert (answer.ids, answer.finished) == (drawn.ids, drawn.finished)
    assert answer.completion().tokens == len(drawn.ids) and answer.adapter_hash is None


def test_a_stopped_answer_draws_no_further_token(studio: Any) -> None:
    answer = studio.answer(PROMPT, Source(temperature=1.0, max_new_tokens=200), seed=1)
    answer.stop()
    assert answer.wait(60) and answer.stopped and len(answer.ids) <= 1 and not answer.finished


def test_text_prompts_keep_the_space_that_goes_on(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of plain text goes on where it ends: what is kept has the space, what is shown has not."""
    from lowrank_align.studio import answers

    ids = studio.base.tokenizer(" fine, a", add_special_tokens=False).input_ids
    monkeypatch.setattr("lowrank_align.conversation.stream", lambda *given, **options: iter(ids))
    answer = studio.answer("It was", Source())
    assert answer.wait(60)
    assert (answer.text, answer.completion().content) == ("fine, a", " fine, a")
    assert answers.Answer is type(answer)


def test_unknown_voices_and_nothing_that_trains(studio: Any) -> None:
    for name, told in (("dop", "dop: no such adapter"), (LIVE, "nothing trains now")):
        answer = studio.answer(PROMPT, Source(name))
        assert answer.wait(60) and told in str(answer.error)


def test_a_run_trained_anew_under_its_name_is_loaded_anew(studio: Any, run: Any) -> None:
    """The voice keeps its role, with the new weights and their hash."""
    run("dpo", PAIRS, "runs/one", max_steps=1)
    studio.voices.refresh()
    assert studio.voices.names() == [BASE, "one"] and studio.voices.rewards() == []
    first = studio.speaker.call(lambda: studio.voices.voice("one"))
    before = {k: p.detach().clone() for k, p in studio.base.trainable_parameters(first.role).items()}
    run("dpo", PAIRS, "runs/one", max_steps=2, overwrite=True)
    second = studio.speaker.call(lambda: studio.voices.voice("one"))
    after = studio.base.trainable_parameters(second.role)
    assert second.role == first.role and second.adapter_hash != first.adapter_hash
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_talking_while_it_trains_changes_nothing(method: str, studio: Any, run: Any, tmp_path: Path) -> None:
    """The same adapter, byte for byte, whether people chat, score and load adapters meanwhile or not."""
    rows = PAIRS if method == "dpo" else [{"prompt": row["prompt"]} for row in PAIRS]
    knobs = {} if method == "dpo" else {"reward": "lowrank_align.tiny:exact_score", "max_new_tokens": 8}
    run("dpo", PAIRS, "runs/other", max_steps=1)
    alone = run(method, rows, "alone", max_steps=3, **knobs)
    studio.voices.refresh()
    going, answered = threading.Event(), []

    def people() -> None:
        while not going.is_set():
            answer = studio.answer(PROMPT, Source("other" if len(answered) % 2 else BASE, max_new_tokens=6))
            answer.wait(60)
            answered.append(answer)
            if len(answered) % 3 == 0:
                studio.implicit_rewards("other", PROMPT, ["yes", "no"])

    thread = threading.Thread(target=people)
    thread.start()
    try:
        beside = run(method, rows, "beside", max_steps=3, **knobs)
    finally:
        going.set()
        thread.join()
    assert answered and not [answer.error for answer in answered if answer.error]
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (alone, beside)]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [(folder / "metrics.jsonl").read_text().split('"seconds"')[0] for folder in (alone, beside)]
    assert metrics[0] == metrics[1]
