"""Which template is used, and how the assistant's turns are found in what very different templates write."""
# ruff: noqa: E501 -- templates are long lines

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lowrank_align.data.chat import PLAIN_TEMPLATE, Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import UserError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "S"}
CHAT = [user("1"), assistant("one"), user("2"), assistant("two")]


def trained(renderer: Renderer, raw: dict[str, Any]) -> list[str]:
    """The text of every stretch of trained tokens."""
    rendered = renderer.tree_row(parse_row(raw, "rows.jsonl:1", 0))
    assert rendered.tree is not None, rendered.dropped
    stretches: list[list[int]] = [[]]
    for completion in rendered.tree.completions:
        for token, counts in zip(completion.ids, completion.mask, strict=True):
            stretches = [*stretches[:-1], [*stretches[-1], token]] if counts else [*stretches, []]
        stretches.append([])
    return [renderer.tokenizer.decode(ids) for ids in stretches if ids]


def notes(renderer: Renderer, messages: list[dict[str, str]]) -> tuple[str, ...]:
    return renderer.tree_row(parse_row({"messages": messages}, "rows.jsonl:1", 0)).notes


# --- which template


def test_a_model_without_a_template_gets_the_plain_one(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=999)
    assert renderer.template_source == "plain"
    row = parse_row({"prompt": [SYSTEM, user(" Salt? ")], "completion": "Yes.\n"}, "", 0)
    asked = "<s>S\n\nUser: Salt?\nAssistant:"
    assert renderer.tokenizer.decode(renderer.prompt_ids(row)) == asked
    rendered = renderer.tree_row(row).tree
    assert rendered is not None
    assert renderer.tokenizer.decode(rendered.prompt_ids) == asked
    assert renderer.tokenizer.decode(rendered.completions[0].ids) == " Yes.</s>"


def test_prompt_and_answer_of_the_plain_template_are_what_training_sees(make_tokenizer: Any) -> None:
    """The merge of the space with "Y" is a token that a generation prompt ending in a space would have torn apart."""
    renderer = Renderer(make_tokenizer(merges=[("Ġ", "Y")]), max_length=999)
    row = parse_row({"prompt": [user("Q")], "completion": "Yes"}, "", 0)
    rendered = renderer.tree_row(row).tree
    assert rendered is not None
    assert rendered.prompt_ids == renderer.prompt_ids(row)
    assert [renderer.tokenizer.decode([i]) for i in rendered.completions[0].ids] == [" Y", "e", "s", "</s>"]


def test_the_plain_template_refuses_roles_that_it_does_not_know(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=999)
    with pytest.raises(UserError, match="the plain template knows user, assistant and one system turn"):
        trained(renderer, {"messages": [user("1"), SYSTEM, assistant("one")]})


def test_the_models_own_template_and_its_hash(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=99)
    assert renderer.template_source == "the model's own"
    assert renderer.template_hash() == hashlib.sha256(chatml.encode()).hexdigest()
    assert (
        Renderer(make_tokenizer(), max_length=99).template_hash() == hashlib.sha256(PLAIN_TEMPLATE.encode()).hexdigest()
    )


def test_a_template_named_by_the_user(make_tokenizer: Any, chatml: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(chatml.replace("<|im_end|>", "</s>"))
    renderer = Renderer(make_tokenizer(chatml), chat_template=str(tmp_path / "mine.jinja"), max_length=99)
    assert renderer.template_source == "named by the user"
    assert trained(renderer, {"messages": CHAT}) == ["one</s>", "two</s>"]
    assert Renderer(make_tokenizer(chatml), chat_template="plain", max_length=99).template_source == "plain"


def test_a_template_among_those_of_the_tokenizer(make_tokenizer: Any, chatml: str) -> None:
    named = {"default": chatml, "short": chatml.replace("<|im_end|>", "</s>")}
    assert trained(Renderer(make_tokenizer(named), max_length=99), {"messages": CHAT})[0] == "one<|im_end|>"
    short = Renderer(make_tokenizer(named), chat_template="short", max_length=99)
    assert (trained(short, {"messages": CHAT})[0], short.template_source) == ("one</s>", "named by the user")


def test_a_row_with_tools_gets_the_tokenizers_template_for_tools(make_tokenizer: Any, chatml: str) -> None:
    named = {"default": chatml, "tool_use": "{{ tools[0]['name'] }}" + chatml}
    renderer = Renderer(make_tokenizer(named), max_length=99)
    row = parse_row({"prompt": [user("Q")], "tools": [{"name": "clock"}]}, "", 0)
    assert renderer.tokenizer.decode(renderer.prompt_ids(row)).startswith("<s>clock<|im_start|>user")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "no regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "no regular file"),
        (lambda file: file.write_text("x" * 1_000_001), "over 1 MB; a template is a few pages"),
    ],
)
def test_templates_that_never_end(make: Callable[[Path], Any], why: str, make_tokenizer: Any, tmp_path: Path) -> None:
    make(tmp_path / "theirs.jinja")
    with pytest.raises(UserError, match=f"theirs.jinja: cannot be read .{why}.$"):
        Renderer(make_tokenizer(), chat_template=str(tmp_path / "theirs.jinja"), max_length=99)


def test_a_template_that_is_not_there_names_its_neighbour(make_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("")
    with pytest.raises(UserError) as caught:
        Renderer(make_tokenizer(), chat_template=str(tmp_path / "mine.jina"), max_length=99)
    assert str(caught.value) == (
        f"chat_template: {tmp_path}/mine.jina: no such file, nor a template of the tokenizer (did you mean mine.jinja?)"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"^the chat template \(the model's own\) does not work: .*endfor"),
        ("hello", r"^the chat template \(the model's own\) does not print what the assistant says$"),
        ("{{ messages[0]['content'] / 0 }}", r"^the chat template \(the model's own\) does not work: "),
    ],
)
def test_a_template_that_does_not_work_is_one_line(make_tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Renderer(make_tokenizer(template), max_length=99)
    assert "\n" not in str(caught.value)


# --- what templates do


def test_the_kwargs_of_a_row_reach_the_template(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer("{{ mood }}" + chatml), max_length=999)
    row = parse_row({"prompt": [user("Q")], "chat_template_kwargs": {"mood": "calm"}}, "", 0)
    assert renderer.tokenizer.decode(renderer.prompt_ids(row)).startswith("<s>calm<|im_start|>user")


def test_templates_that_print_the_date_print_the_same_every_day(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer("{{ strftime_now('%d %b %Y, %Y-%m-%d') }}" + chatml), max_length=999)
    row = parse_row({"prompt": [user("Q")]}, "", 0)
    assert renderer.tokenizer.decode(renderer.prompt_ids(row)).startswith("<s>26 Jul 2024, 2024-07-26<|im_start|>")


NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_a_template_without_an_end_gets_one_after_the_last_turn(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(NO_END), max_length=999)
    assert trained(renderer, {"messages": CHAT}) == [" one", " two</s>"]
    assert renderer.end_ids == [renderer.tokenizer.eos_token_id]


def test_an_end_that_is_no_token_of_the_tokenizer_is_trained_as_text(make_tokenizer: Any, chatml: str) -> None:
    """ChatML on a model that does not know it: generation can stop at the end token only."""
    renderer = Renderer(make_tokenizer(chatml, special=()), max_length=999)
    assert trained(renderer, {"messages": CHAT}) == ["one<|im_end|>", "two<|im_end|></s>"]
    assert renderer.end_ids == [renderer.tokenizer.eos_token_id]


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_without_a_generation_prompt(make_tokenizer: Any) -> None:
    """Llama 2's form: the answer begins right after `[/INST]`; its second BOS stands between turns, not trained."""
    renderer = Renderer(make_tokenizer(LLAMA2), max_length=999)
    assert trained(renderer, {"messages": CHAT}) == [" one </s>", " two </s>"]


ENDS_WITH_EOS = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_what_a_template_adds_after_the_last_turns_end_is_not_trained(make_tokenizer: Any) -> None:
    """Phi-3's form: the whole text ends with `</s>`, but generation ends at `<|im_end|>`."""
    assert trained(Renderer(make_tokenizer(ENDS_WITH_EOS), max_length=999), {"messages": CHAT}) == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]


OTHER_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def test_an_end_that_only_earlier_turns_have_is_not_trained(make_tokenizer: Any) -> None:
    """gpt-oss' form: a model ends its turn with one token, which the template replaces by another in the history."""
    assert trained(Renderer(make_tokenizer(OTHER_END), max_length=999), {"messages": CHAT}) == ["one", "two</s>"]


THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns(make_tokenizer: Any) -> None:
    """Qwen3's form: thinking is printed for the last turn only, so that a shorter conversation is no beginning of it."""
    renderer = Renderer(make_tokenizer(THINKS), max_length=999)
    assert trained(renderer, {"messages": CHAT}) == ["one<|im_end|>", "<think></think>two<|im_end|>"]
    assert notes(renderer, CHAT) == ()


OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_a_generation_prompt_that_is_not_printed_before_answers(make_tokenizer: Any) -> None:
    """DeepSeek-R1's form. The answer "<table>" begins like the `<think>` that is missing; it is trained whole."""
    renderer = Renderer(make_tokenizer(OPENS_THINKING), max_length=999)
    chat = [user("1"), assistant("<table>"), user("2"), assistant("<t")]
    assert trained(renderer, {"messages": chat}) == ["<table><|im_end|>", "<t<|im_end|>"]
    assert notes(renderer, chat) == ("the generation prompt is not what the template prints before an answer",)
    row = parse_row({"prompt": [user("1")]}, "", 0)
    assert renderer.tokenizer.decode(renderer.prompt_ids(row)).endswith("assistant\n<think>\n")


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ 'says ' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_a_templates_own_marks_decide_where_its_generation_prompt_does_not(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(MARKED), max_length=999)
    assert trained(renderer, {"messages": CHAT}) == ["says one<|im_end|>", "says two<|im_end|>"]


DROPS_TOOLS = (
    "{% for m in messages if m['role'] != 'tool' %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_turns_that_a_template_leaves_out_are_noted(make_tokenizer: Any) -> None:
    chat = [user("1"), assistant("call"), {"role": "tool", "content": "42"}, assistant("two")]
    renderer = Renderer(make_tokenizer(DROPS_TOOLS), max_length=999)
    assert notes(renderer, chat) == ("the chat template leaves out or rewrites turns of role tool",)
    assert trained(renderer, {"messages": chat}) == ["call</s>", "two</s>"]


TOOL_CHAT = [user("1"), assistant("call"), {"role": "tool", "content": "42"}, assistant("two")]


def test_an_earlier_turn_whose_end_cannot_be_told_is_not_trained(make_tokenizer: Any) -> None:
    """Nothing ends a turn in this template, and what stands before a tool's turn is not known as it is before a user's."""
    renderer = Renderer(make_tokenizer(NO_END), max_length=999)
    assert notes(renderer, TOOL_CHAT) == (
        "the template does not show where one of the answers stands; it is not trained",
    )
    assert trained(renderer, {"messages": TOOL_CHAT}) == [" two</s>"]


def test_a_templates_own_marks_tell_the_end_of_an_earlier_turn(make_tokenizer: Any) -> None:
    marked = NO_END.replace(
        "{{ m['role'] + ': ' + m['content'] + '\n' }}",
        "{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + '\n' }}"
        "{% endgeneration %}{% else %}{{ ' ' + m['content'] + '\n' }}{% endif %}",
    )
    renderer = Renderer(make_tokenizer(marked), max_length=999)
    assert trained(renderer, {"messages": TOOL_CHAT}) == [" call", " two</s>"]


PARTS = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_a_template_made_for_parts_of_content(make_tokenizer: Any) -> None:
    assert trained(Renderer(make_tokenizer(PARTS), max_length=999), {"messages": CHAT}) == ["one</s>", "two</s>"]


# --- TRL's templates of real models: the originals through our renderer, against the masks of the ones marked by hand

TRL = find_spec("trl")
FOLDER = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL and TRL.submodule_search_locations else None
FOUR_TURNS = [user("Hi\nthere"), assistant("Hello!\nYou?"), user("Good."), assistant("Nice to hear")]
# Template, its turn's end, and whether it takes a system turn. Those that think are compared on one round: TRL's marked
# ones print the thinking in every turn, the originals only in the last.
TEMPLATES = [
    ("llama3", "<|eot_id|>", True, 4),
    ("qwen2_5", "<|im_end|>", True, 4),
    ("qwen3_instruct_2507", "<|im_end|>", True, 4),
    ("qwen3", "<|im_end|>", True, 2),
    ("gemma", "<end_of_turn>", False, 4),
    ("gemma3", "<end_of_turn>", True, 4),
    ("phi3", "<|end|>", True, 4),
    ("phi3_5", "<|end|>", True, 4),
    ("cohere", "<|END_OF_TURN_TOKEN|>", True, 4),
    ("lfm2", "<|im_end|>", True, 4),
]
SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
           "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|START_OF_TURN_TOKEN|>",
           "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")  # fmt: skip


def marked_by_hand(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], end: str) -> list[str]:
    """What TRL trains on, without what follows the turn's end (it trains the newline after it too, and Phi's `</s>`)
    and without the newline of the header, which its template for Qwen2.5 counts as the answer's.
    """
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text, stretches, inside = "", [], False
    for token, counts in zip(out["input_ids"], out["assistant_masks"], strict=True):
        if counts:
            text = text + tokenizer.decode([token]) if inside else tokenizer.decode([token])
        elif inside:
            stretches.append(text)
        inside = bool(counts)
    stretches += [text] if inside else []
    return [stretch[: stretch.index(end) + len(end)].removeprefix("\n") for stretch in stretches]


@pytest.mark.skipif(FOLDER is None, reason="trl is not installed")
@pytest.mark.parametrize(("name", "end", "system", "turns"), TEMPLATES, ids=[name for name, *_ in TEMPLATES])
def test_templates_of_real_models(make_tokenizer: Any, name: str, end: str, system: bool, turns: int) -> None:
    assert FOLDER is not None
    original, training = ((FOLDER / f"{name}{kind}.jinja").read_text() for kind in ("", "_training"))
    messages = [SYSTEM] * system + FOUR_TURNS[:turns]
    expected = marked_by_hand(make_tokenizer(training, special=SPECIAL), messages, end)
    assert len(expected) == turns // 2 and all(stretch.endswith(end) for stretch in expected)
    renderer = Renderer(make_tokenizer(original, special=SPECIAL), max_length=9999)
    assert trained(renderer, {"messages": messages}) == expected
    assert renderer.end_ids == renderer.tokenizer.convert_tokens_to_ids([end, "</s>"])
    row = parse_row({"messages": messages}, "", 0)
    rendered = renderer.tree_row(row).tree
    assert rendered is not None and rendered.prompt_ids[:1] == [renderer.tokenizer.bos_token_id]
    assert rendered.prompt_ids.count(renderer.tokenizer.bos_token_id) == 1
