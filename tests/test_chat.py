"""Talking: the turns, the voices on one base, one answer as it comes, and the terminal around them."""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_align.base import Base
from lowrank_align.commands import chat as terminal
from lowrank_align.config import ChatSettings
from lowrank_align.conversation import Conversation, Reply, Sampling, Turn, Voices
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Shape
from lowrank_align.data.load import load_rows
from lowrank_align.errors import EXIT_DATA_OR_CONFIG, EXIT_DONE, UserError
from lowrank_align.rollout import generator_for, sample

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(cache))


@pytest.fixture
def base(tiny_base: Any) -> Iterator[Any]:
    """The tiny base, its voices taken off after the test."""
    yield tiny_base
    for name in [name for name in tiny_base.roles if name.startswith("voice_")]:
        tiny_base.remove_role(name)


@pytest.fixture
def loud(trained: Path, tmp_path: Path) -> Path:
    """The run `sft` with random B in its adapter, so that it says something else than the base."""
    adapter = tmp_path / "loud"
    adapter.mkdir()
    tensors = load_file(trained / "sft" / "adapter" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.normal_(0, 0.3, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = (trained / "sft" / "adapter" / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config)
    return adapter


def reply(base: Any, conversation: Conversation, question: str, role: str = "base", **options: Any) -> Reply:
    sampling = Sampling(**vars(SAMPLING) | options)
    renderer = Renderer(base.tokenizer, max_length=256)
    return Reply(base, role, renderer, conversation, question, sampling, torch.Generator().manual_seed(0))


def fixed(monkeypatch: pytest.MonkeyPatch, base: Any, *texts: str, end: bool = True) -> list[list[int]]:
    """Whatever is asked, the model answers with these texts, one after the other; the prompts that it got."""
    prompts: list[list[int]] = []
    left = list(texts)

    def answer(base: Any, prompt_ids: list[int], *, end_ids: list[int], max_new_tokens: int, **options: Any) -> Any:
        prompts.append(prompt_ids)
        ids = base.tokenizer(left.pop(0), add_special_tokens=False).input_ids + end_ids[:1] * end
        return iter(ids[:max_new_tokens])

    monkeypatch.setattr("lowrank_align.conversation.stream", answer)
    return prompts


# ---- one answer


def test_an_answer_is_what_sample_draws(base: Any) -> None:
    """By hand: the prompt after tests/conftest.py's template, its completion, without the space before it."""
    prompt = base.tokenizer(
        "<s><|im_start|>system\nBe kind<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\nho<|im_end|>"
        "<|im_start|>user\nwell?<|im_end|><|im_start|>assistant\n",
        add_special_tokens=False,
    ).input_ids
    conversation = Conversation("Be kind", [Turn("hi", "ho")])
    found = reply(base, conversation, "well?")
    text = "".join(piece.text for piece in found)
    assert found.prompt_ids == prompt
    generator = torch.Generator().manual_seed(0)
    (expected,) = sample(base, [prompt], end_ids=[99, 100], max_new_tokens=12, generator=generator)[0]
    assert found.ids == expected.ids
    whole = base.tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert text == whole.lstrip()
    assert found.turn == Turn("well?", whole.strip(), expected.finished)
    assert conversation.turns == [Turn("hi", "ho")]  # who asked keeps the answer, or not


def test_an_answer_that_is_not_waited_for(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, base, " one two")
    found = reply(base, Conversation(), "count")
    pieces = [next(piece) for piece in [iter(found)] for _ in range(4)]
    assert "".join(piece.text for piece in pieces) == "one "
    assert found.turn == Turn("count", "one", finished=False)


def test_an_answer_that_ends_and_one_that_is_cut(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token is no text; with as many tokens as letters, it never comes."""
    fixed(monkeypatch, base, "\nyes \n", "yes")
    found = reply(base, Conversation(), "q")
    assert [piece.text for piece in found if piece.text.strip()] == ["y", "e", "s"]
    assert found.turn == Turn("q", "yes", finished=True)
    assert len(found.ids) == 7
    found = reply(base, Conversation(), "q", max_new_tokens=3)
    assert "".join(piece.text for piece in found) == "yes"
    assert found.turn == Turn("q", "yes", finished=False)


def test_thoughts(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a piece and in the turn, whole: what of it goes back to the model is for the template to say. One that the
    template has opened begins as a thought."""
    fixed(monkeypatch, base, "<think>hm</think>yes", "hm</think>yes", "hm</think>yes")
    found = reply(base, Conversation(), "q", max_new_tokens=40)
    said = list(found)
    assert "".join(piece.text for piece in said if piece.thinking) == "<think>hm</think>"
    assert "".join(piece.text for piece in said if not piece.thinking) == "yes"
    assert found.turn.answer == "<think>hm</think>yes"
    found = reply(base, Conversation(), "q", max_new_tokens=40)
    opened = base.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    Path("thinks.jinja").write_text(opened)
    renderer = Renderer(base.tokenizer, chat_template="thinks.jinja", max_length=256)
    sampling = Sampling(40, 1.0, 1.0)
    found = Reply(base, "base", renderer, Conversation(), "q", sampling, torch.Generator())
    assert "".join(piece.text for piece in found if piece.thinking) == "hm</think>"
    assert "".join(piece.text for piece in reply(base, Conversation(), "q", max_new_tokens=40) if piece.thinking) == ""


def test_the_oldest_turns_are_left_out(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 tokens; `er` and `in` are one each. A turn is <|im_start|>user\\n (5), question-i (10), <|im_end|> (1),
    <|im_start|>assistant\\n (11), answeringi (8), <|im_end|> (1): 36. Around it <s> (1), the system turn (8 + 4 + 1),
    the question (5 + 4 + 1) and the opened answer (11): 35. So n turns take 35 + 36 n, and 100 tokens of answer leave
    room for 3 of them (143), 50 for 4 (179). The system prompt stays."""
    prompts = fixed(monkeypatch, base, *["yes"] * 3)
    conversation = Conversation("mild", [Turn(f"question-{i}", f"answering{i}") for i in range(9)])
    assert reply(base, conversation, "next", max_new_tokens=100).left_out == 6
    found = reply(base, conversation, "next", max_new_tokens=50)
    assert found.left_out == 5
    list(found)
    assert len(prompts[0]) == 35 + 36 * 4
    text = base.tokenizer.decode(prompts[0])
    assert text.startswith("<s><|im_start|>system\nmild<|im_end|><|im_start|>user\nquestion-5<|im_end|>")
    conversation.turns = conversation.turns[:3]
    assert reply(base, conversation, "next", max_new_tokens=100).left_out == 0
    assert reply(base, conversation, "next", max_new_tokens=512).left_out == 1  # half the context, at most


def test_room_for_the_answer(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """<s>, 5 + 200 + 1 for the question, 11 for the opened answer: 218 of 256; the answer gets the 38 that are left."""
    fixed(monkeypatch, base, "q" * 99)
    found = reply(base, Conversation(), "x" * 200, max_new_tokens=64)
    assert len("".join(piece.text for piece in found)) == 38
    with pytest.raises(UserError) as error:
        reply(base, Conversation(), "x" * 238)
    assert str(error.value) == (
        "too long: 256 tokens with the system prompt, where prompt and answer may have 256 together"
    )


# ---- voices


def test_voices_share_the_base(base: Any, trained: Path, loud: Path) -> None:
    voices = Voices(base)
    assert (voices.names, voices.active, voices.role) == (["base"], "base", "base")
    before, roles = base.copies_in_memory(), len(base.roles)  # other tests have left theirs
    voices.use(str(trained / "sft"))
    voices.use("loud")
    assert voices.names == ["base", str(trained / "sft"), "loud"]
    loud_role = voices.role
    voices.use("sft")  # the last name of one that is there
    assert voices.active == str(trained / "sft")
    assert base.roles[voices.role].parent == trained / "sft"
    voices.use(str(loud.resolve()))  # the same by another name
    assert (voices.active, voices.role) == ("loud", loud_role)
    assert len(base.roles) == roles + 2
    voices.use("base")
    assert voices.role == "base"
    assert base.copies_in_memory() == before
    assert not any(p.requires_grad for p in base.roles[loud_role].parameters.values())


def test_each_voice_says_its_own(base: Any, loud: Path) -> None:
    voices = Voices(base)
    said = []
    for name in ("base", "loud", "base"):
        voices.use(name)
        said.append([piece.text for piece in reply(base, Conversation(), "hi", voices.role)])
    assert said[0] == said[2] != said[1]


def test_a_voice_that_cannot_be_used(base: Any, trained: Path, loud: Path, load_base: Callable[..., Any]) -> None:
    voices = Voices(base)
    voices.use("loud")
    (loud / "adapter_config.json").write_text("{")  # read once, not again
    roles = dict(base.roles)
    for name, reason in {
        "nowhere": "nowhere: no such run or adapter folder",
        str(trained / "reward"): f"{trained / 'reward'}: is a reward run, where a policy is expected",
    }.items():
        with pytest.raises(UserError) as error:
            voices.use(name)
        assert str(error.value) == reason
    other = Voices(load_base("llama"))
    with pytest.raises(UserError, match="made for"):
        other.use(str(trained / "sft"))
    assert (other.names, other.role) == (["base"], "base")
    assert (voices.active, base.roles) == ("loud", roles)


# ---- turns


def test_a_conversation_as_a_row() -> None:
    """What the rows' own reader takes: see the README's table. An answer that did not end gets no end token."""
    conversation = Conversation()
    with pytest.raises(UserError, match="nothing has been said yet"):
        conversation.row()
    conversation.turns.append(Turn("hi", "ho"))
    two = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert conversation.row() == {"messages": two}
    conversation.system = "Be kind"
    conversation.turns = [Turn("hi", "ho", finished=False)]
    system = {"role": "system", "content": "Be kind"}
    assert conversation.row() == {"messages": [system, *two], "finished": False}


# ---- the terminal


class Typed:
    """What a person types, line by line."""

    def __init__(self, base: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, **settings: Any) -> None:
        self.patch, self.capsys = monkeypatch, capsys
        renderer = Renderer(base.tokenizer, max_length=256)
        given = ChatSettings(**{"model": base.name, "max_new_tokens": 12} | settings)
        self.session = terminal.Session(base, renderer, given, terminal.Screen())

    def __call__(self, *lines: str) -> tuple[str, list[str]]:
        """stdout, and the lines on stderr without the three that greet."""
        self.patch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        self.capsys.readouterr()
        self.session.run()
        out, err = self.capsys.readouterr()
        return out, err.splitlines()[3:]

    @property
    def turns(self) -> list[Turn]:
        return self.session.conversation.turns


@pytest.fixture
def typed(base: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Typed]:
    return lambda **settings: Typed(base, monkeypatch, capsys, **settings)


def test_the_command_with_piped_input(
    tiny_llama: Path, trained: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers alone on stdout: what `generate`'s sampler gives for the same seed. The end of the input is the end."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    options = ("--quantize", "none", "--max-new-tokens", 5, "--temperature", 1, "--top-p", 1)
    found = command("chat", "--model", tiny_llama, "--adapter", trained / "sft", *options)
    assert found.code == EXIT_DONE
    assert found.err.splitlines()[:3] == [
        f"{tiny_llama}, none, on cpu; adapter: {trained / 'sft'}",
        "chat template: the model's own",
        "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves",
    ]
    base = Base.load(str(tiny_llama), quantize="none", device="cpu")
    base.add_role("sft", start_from=trained / "sft")
    text = "<s><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    prompt = base.tokenizer(text, add_special_tokens=False).input_ids
    generator = generator_for(base.device, 0, "chat")
    with base.role("sft"):
        drawn = sample(base, [prompt], end_ids=[99, 100], max_new_tokens=5, generator=generator)[0][0].ids
    assert found.out == base.tokenizer.decode(drawn, skip_special_tokens=True).lstrip() + "\n"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--adapter", "nowhere"), "nowhere: no such run or adapter folder"),
        (("--adapter", "{trained}/reward"), "{trained}/reward: is a reward run, where a policy is expected"),
        (("--temperature", "-1"), "temperature: input should be greater than or equal to 0 (got '-1')"),
        (("--chat-template", "none.jinja"), "chat_template: none.jinja: no such file, nor a template of the tokenizer"),
    ],
)
def test_what_is_wrong_before_the_model_loads(
    tiny_llama: Path, trained: Path, command: Callable[..., Any], flags: tuple[str, ...], line: str
) -> None:
    argv = [flag.format(trained=trained) for flag in flags]
    found = command("chat", "--model", tiny_llama, "--quantize", "none", *argv)
    assert (found.code, found.out) == (EXIT_DATA_OR_CONFIG, "")
    assert found.err == f"error: {line.format(trained=trained)}\n"


def test_questions_and_answers(typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question goes with the first and its answer; empty lines are nothing."""
    prompts = fixed(monkeypatch, base, "one", "two\n")
    talk = typed()
    assert talk("a", "", "  ", "b") == ("one\ntwo\n", [])
    assert talk.turns == [Turn("a", "one"), Turn("b", "two")]
    assert base.tokenizer.decode(prompts[1]) == (
        "<s><|im_start|>user\na<|im_end|><|im_start|>assistant\none<|im_end|>"
        "<|im_start|>user\nb<|im_end|><|im_start|>assistant\n"
    )


def test_lines_that_go_on_and_lines_with_a_slash(
    typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, base, "one", "two", "three")
    talk = typed()
    talk("a\\", "  b\\", "c", "//help", "open\\")
    assert [turn.question for turn in talk.turns] == ["a\n  b\nc", "/help", "open"]


def test_undo_retry_and_reset(typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, base, "one", "two", "other", " ")
    talk = typed()
    out, notes = talk("/undo", "/retry", "a", "b", "/retry", "/retry", "/undo")
    assert out == "one\ntwo\nother\n\n"
    assert notes == [
        "error: nothing has been said yet",
        "error: nothing has been said yet",
        "(nothing was said; the question is taken back)",  # the second /retry: the answer before it stays
        "(taken back; 1 turns left)",
    ]
    assert talk.turns == [Turn("a", "one")]
    assert talk("/reset") == ("", ["(a new conversation)"])
    assert talk.turns == []


def test_another_draw_at_each_retry(typed: Callable[..., Typed]) -> None:
    talk = typed()
    out, _ = talk("hi", "/retry", "/temperature 0", "/retry", "/retry")
    answers = out.splitlines()
    assert len(talk.turns) == 1
    assert talk.turns[0].answer != ""
    assert answers[-1] == answers[-2] != answers[0]


def test_settings_while_talking(typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, base, "abcdef")
    talk = typed(system="Be kind")
    out, notes = talk("/tokens 3", "/temperature 0.5", "/top-p 1", "/system  Be brief ", "a", "/stats")
    assert notes == [
        "(max_new_tokens 3)",
        "(temperature 0.5)",
        "(top_p 1.0)",
        "(system prompt set)",
        "(cut at 3 tokens)",
    ]
    given = talk.session.settings
    assert (given.max_new_tokens, given.temperature, given.top_p) == (3, 0.5, 1.0)
    # <s> 1, system 8 + 8 + 1, question 5 + 1 + 1, opened answer 11, and the 3 of the answer
    assert out.startswith("abc\n3 tokens in ")
    assert out.endswith(", context 39 of 256\n")
    assert talk.session.conversation.messages()[0] == {"role": "system", "content": "Be brief"}
    talk("/system")
    assert talk.session.conversation.system is None
    out, notes = talk("/tokens none", "/top-p 0", "/temperature")
    assert notes == [
        "error: max_new_tokens: input should be a valid integer, unable to parse string as an integer (got 'none')",
        "error: top_p: input should be greater than 0 (got '0')",
        "error: give a number, now 0.5",
    ]
    assert talk.session.settings == given


def test_switching_adapters(typed: Callable[..., Typed], trained: Path, loud: Path) -> None:
    talk = typed(temperature=0)
    out, notes = talk("hi", "/undo", "/adapter loud", "hi", "/undo", "/adapters", "/adapter base", "hi")
    first, second, bare, loud_marked, last = out.splitlines()
    assert first == last != second
    assert (bare, loud_marked) == ("  base", "* loud")
    assert [note for note in notes if "adapter" in note] == ["(adapter: loud)", "(adapter: base)"]
    out, notes = talk("/adapter nowhere", f"/adapter {trained / 'reward'}", "/adapter", "/adapters")
    assert notes == [
        "error: nowhere: no such run or adapter folder",
        f"error: {trained / 'reward'}: is a reward run, where a policy is expected",
        "error: give /adapter RUN, or /adapter base",
    ]
    assert out == "* base\n  loud\n"


def test_saving(typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are added, whatever ends the file; a row is read by what trains on it."""
    fixed(monkeypatch, base, "one", "\u00e9")
    talk = typed()
    Path("rows.jsonl").write_text('{"prompt": "p", "completion": "c"}')  # no newline at its end
    _, notes = talk("/save rows.jsonl", "/save rows.txt", "/save", "a", "/save rows.jsonl", "/save rows.jsonl")
    assert notes == [
        "error: nothing has been said yet",
        "error: rows.txt: name a .jsonl file",
        "error: give /save FILE.jsonl",
        "(rows.jsonl: 1 turns added as a row)",
        "(rows.jsonl: 1 turns added as a row)",
    ]
    lines = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]}
    assert lines == [{"prompt": "p", "completion": "c"}, said, said]
    assert len(load_rows("rows.jsonl", expect={Shape.demonstration}).rows) == 3
    Path("folder.jsonl").mkdir()
    _, notes = talk("/save folder.jsonl", "/save no/such/folder/rows.jsonl")
    assert notes[0].startswith("error: folder.jsonl: cannot be read (")
    assert notes[1].startswith("error: no/such/folder/rows.jsonl: could not be written: ")


def test_saving_leaves_the_old_file_when_the_disk_refuses(
    typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, base, "one")
    talk = typed()
    Path("rows.jsonl").write_text("before\n")

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", refuse)
        _, notes = talk("a", "/save rows.jsonl")
    assert notes == ["error: rows.jsonl: could not be written: No space left on device"]
    assert Path("rows.jsonl").read_text() == "before\n"
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_unknown_commands_and_help(typed: Callable[..., Typed]) -> None:
    talk = typed()
    out, notes = talk("/adaptr x", "/", "/help", "/quit", "never asked")
    assert notes == [
        "error: /adaptr: no such command (did you mean /adapter?); /help lists them",
        "error: /: no such command; /help lists them",
    ]
    assert all(f"/{word} " in out for word in terminal.COMMANDS)
    assert max(map(len, out.splitlines())) <= 100
    assert talk.turns == []


def test_the_context_is_full(typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, base, *["yes"] * 4)
    talk = typed(max_new_tokens=64)
    _, notes = talk(*["x" * 60] * 4, "y" * 300)
    # A question and its answer: 5 + 60 + 1 and 11 + 3 + 1, so 81; around them <s>, and the new question with the opened
    # answer, 66 + 11. One fits beside 64 tokens (1 + 81 + 77 + 64 = 223 of 256), two do not.
    assert notes == [
        "(the context is full: left out the oldest 1 turn)",
        "(the context is full: left out the oldest 2 turns)",
        "error: too long: 318 tokens with the system prompt, where prompt and answer may have 256 together",
    ]
    assert len(talk.turns) == 4


def test_a_template_that_refuses(typed: Callable[..., Typed], base: Any) -> None:
    """Nothing is kept of the question, and the talk goes on."""
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    Path("strict.jinja").write_text(template + base.tokenizer.chat_template)
    talk = typed()
    talk.session.renderer = Renderer(base.tokenizer, chat_template="strict.jinja", max_length=256)
    out, notes = talk("/system Be kind", "hi", "/system", "hi")
    assert notes[:2] == [
        "(system prompt set)",
        "error: chat: prompt: the chat template refuses this conversation (no system)",
    ]
    assert len(talk.turns) == 1


def test_what_the_model_says_does_not_work_the_terminal(
    typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape sequences (7-bit and 8-bit), bells and carriage returns are shown as signs; newline and tab are text."""
    said = "a\x1b[2Jb\x07\x9b31m\rc\td\ne\x7f"

    def answer(*args: Any, **options: Any) -> Any:
        return iter(range(len(said)))

    monkeypatch.setattr("lowrank_align.conversation.stream", answer)
    monkeypatch.setattr(Renderer, "decode", lambda self, ids: "".join(said[i] for i in ids))
    monkeypatch.setattr(Renderer, "end_ids", (), raising=False)
    session = typed(max_new_tokens=30)
    session.session.renderer.end_ids = []
    out, _ = session("hi")
    assert out == "a\u241b[2Jb\u2407\ufffd31m\u240dc\td\ne\u2421\n"
    assert session.turns[0].answer == said  # kept as it was said


def test_thoughts_are_dimmed_on_a_terminal_alone(
    typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, base, *["<think>x</think>y"] * 2)
    session = typed(max_new_tokens=40)
    assert session("hi")[0] == "<think>x</think>y\n"
    monkeypatch.setattr(type(session.session.screen._out), "is_terminal", property(lambda self: True))
    out, _ = session("hi")
    assert out.startswith("\x1b[2m<think>\x1b[0m")
    assert out.endswith("\x1b[0my\n")


# ---- Ctrl-C


def interrupting(monkeypatch: pytest.MonkeyPatch, base: Any, after: int, times: int = 1) -> None:
    """While the model says `abcdef`, Ctrl-C comes, so many times, as its letter number `after` is computed."""

    def answer(*args: Any, **options: Any) -> Iterator[int]:
        for place, token in enumerate(base.tokenizer("abcdef", add_special_tokens=False).input_ids):
            if place == after:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr("lowrank_align.conversation.stream", answer)


@pytest.mark.parametrize(("times", "kept"), [(1, "abcd"), (2, "abc")])
def test_ctrl_c_stops_the_answer(
    typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch, times: int, kept: str
) -> None:
    """The letter that is being computed still comes; a second Ctrl-C does not wait for it. The talk goes on, and what
    was said is kept, without an end."""
    before = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, base, after=3, times=times)
    session = typed()
    out, notes = session("a", "/adapters")
    assert (out, notes) == (f"{kept}\n* base\n", ["(stopped)"])
    assert session.turns == [Turn("a", kept, finished=False)]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_anything_is_said(
    typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(monkeypatch, base, after=0, times=2)
    session = typed()
    assert session("a") == ("\n", ["(nothing was said; the question is taken back)"])
    assert session.turns == []


def test_ctrl_c_at_the_prompt_leaves(typed: Callable[..., Typed], monkeypatch: pytest.MonkeyPatch) -> None:
    session = typed()

    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert session() == ("", [])


def test_out_of_memory(typed: Callable[..., Typed], base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*args: Any, **options: Any) -> Iterator[int]:
        yield from base.tokenizer("ab", add_special_tokens=False).input_ids
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("lowrank_align.conversation.stream", answer)
    session = typed()
    out, notes = session("a", "/adapters")
    assert (out, notes) == ("ab\n* base\n", ["error: out of memory; /reset, or a smaller /tokens, may help"])
    assert session.turns == []
