"""What a method trained with before the answer is put in by everything that asks, of its own accord."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lowrank_align import conversation
from lowrank_align.commands import rows as rows_commands
from lowrank_align.conversation import Conversation, Reply, Sampling, Turn, Voices
from lowrank_align.data.chat import Renderer
from lowrank_align.rollout import generator_for

PAIRS = [{"prompt": "Q: ", "chosen": "fed", "rejected": "bug"}]
GOOD = 'Good:\n"+" \\ {{ x }} '  # with what templates and JSON would read as more
ASKED = [{"role": "user", "content": "hi"}]


@pytest.fixture
def conditioned(run: Callable[..., Path]) -> Path:
    return run("condition", PAIRS, "conditioned", max_steps=1, learning_rate=1e-2, good_text=GOOD)


def ids_of(base: Any, text: str) -> list[int]:
    ids: list[int] = base.tokenizer.encode(text, add_special_tokens=False)
    return ids


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generate_and_logps(
    conditioned: Path, tiny_base: Any, tiny_llama: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts end with the text, whose tokens are no part of the log-probs; `base` is asked without it."""
    seen: list[list[int]] = []
    real = rows_commands.sample
    monkeypatch.setattr(
        rows_commands, "sample", lambda base, prompts, **kw: seen.extend(prompts) or real(base, prompts, **kw)
    )
    model = ("--model", tiny_llama, "--quantize", "none")
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "Q: "}, {"prompt": ASKED})
    sampled = ("generate", *model, "--prompts", prompts, "--max-new-tokens", 3, "--out")
    found = command(*sampled, tmp_path / "a.jsonl", "--adapter", conditioned)
    assert found.code == 0 and f"answers stand behind {GOOD!r}, as in training" in found.out
    assert command(*sampled, tmp_path / "b.jsonl").code == 0
    turn = "<s><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    plain = [ids_of(tiny_base, "<s>Q: "), ids_of(tiny_base, turn)]
    assert seen == [[*ids, *ids_of(tiny_base, GOOD)] for ids in plain] + plain

    data = write(tmp_path / "rows.jsonl", {"prompt": "Q: ", "completion": "fed"})
    found = command("logps", *model, "--data", data, "--adapter", conditioned, "--out", tmp_path / "l.jsonl")
    assert found.code == 0
    line = json.loads((tmp_path / "l.jsonl").read_text())
    row = [*plain[0], *ids_of(tiny_base, GOOD + "fed</s>")]
    with tiny_base.role("policy"), torch.no_grad():
        logps = tiny_base.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
    assert line["num_tokens"] == [4]
    expected = sum(logps[i - 1, row[i]].item() for i in range(len(row) - 4, len(row)))
    assert line["logps"] == pytest.approx([expected], abs=1e-4)


def test_each_voice_of_a_chat_has_its_own(conditioned: Path, tiny_base: Any) -> None:
    """Also when it is switched in the middle; what was said before stands in the prompt without it."""
    voices, talk = Voices(tiny_base), Conversation(turns=[Turn("hi", "ho")])
    renderer = Renderer(tiny_base.tokenizer, max_length=256)
    ends = {}
    for name in (str(conditioned), "base", "conditioned"):
        voices.use(name)
        made = Reply(
            tiny_base, voices.role, renderer.with_prefix(voices.answer_prefix), talk, "and?",
            Sampling(3, 0.0, 1.0), generator_for(tiny_base.device, 0),
        )  # fmt: skip
        ends[name] = made.prompt_ids
    assert ends[str(conditioned)] == ends["conditioned"] == [*ends["base"], *ids_of(tiny_base, GOOD)]


def test_the_terminal_says_and_uses_it(
    conditioned: Path, tiny_base: Any, tiny_llama: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import sys

    asked: list[list[int]] = []
    real = conversation.stream
    monkeypatch.setattr(
        conversation, "stream", lambda base, ids, **kw: asked.append(list(ids)) or real(base, ids, **kw)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/adapter base\nhi\n/adapter conditioned\n"))
    options = ("--quantize", "none", "--max-new-tokens", 2)
    found = command("chat", "--model", tiny_llama, "--adapter", conditioned, *options)
    assert f"answers stand behind {GOOD!r}, as in training" in found.err
    assert f"answers behind {GOOD!r})" in found.err.splitlines()[-1]
    prefix = ids_of(tiny_base, GOOD)
    assert [ids[-len(prefix) :] == prefix for ids in asked] == [True, False]


def test_a_thought_that_a_template_opens_is_seen_before_the_text(tiny_base: Any) -> None:
    renderer = Renderer(tiny_base.tokenizer, max_length=256)
    ids = ids_of(tiny_base, "Say:<think>\n")
    assert conversation.thought_is_open(renderer, [*ids, *ids_of(tiny_base, GOOD)], len(ids_of(tiny_base, GOOD)))
    assert not conversation.thought_is_open(renderer, [*ids, *ids_of(tiny_base, GOOD)], 0)


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_the_exported_template_ends_with_it(to: str, conditioned: Path, tmp_path: Path, command: Any) -> None:
    """As plain transformers render it, token for token what training had; a whole conversation has none of it."""
    found = command("export", "--adapter", conditioned, "--out", tmp_path / "out", "--to", to)
    assert found.code == 0, found.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n" + GOOD
    assert GOOD not in tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": "ho"}], tokenize=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert json.dumps(GOOD) in card and "other tokens" not in card
    assert json.loads((tmp_path / "out" / "prompting.json").read_text()) == {"answer_prefix": GOOD}
    if to == "adapter":
        from lowrank_align import adapters

        assert adapters.answer_prefix(tmp_path / "out") == GOOD


def test_the_go_template_ends_with_it(tiny_base: Any) -> None:
    from lowrank_align.export import gotemplate

    template = Renderer(tiny_base.tokenizer, max_length=99).template
    found = gotemplate.go_template(template, "<s>", GOOD)
    assert not found.departures
    assert gotemplate.render(found.between, ASKED) == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n" + GOOD
    assert '{{ "<|im_end|><|im_start|>assistant\\nGood:\\n\\u0022+\\u0022 \\u005c {{ x }} " }}' in found.text
