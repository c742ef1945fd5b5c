"""The switch with which a chat template lets the model think before it answers, or not."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import UserError

# As SmolLM3 has it: the default is set at the top, the system turn says how it is, and the empty block is written.
WITH_DEFAULT = """\
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{{- '<|im_start|>system\n' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# As Granite and DeepSeek V3.1 call it.
OTHER_NAME = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' and not thinking %}{{ '</think>' }}{% endif %}
    {{- message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if thinking else '</think>') }}{% endif %}"""


def trl_template(name: str) -> str:
    spec = find_spec("trl")
    assert spec and spec.origin
    return (Path(spec.origin).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


def rendered(renderer: Renderer, **more: Any) -> tuple[str, str]:
    """What the model gets to answer, and the trained tokens as text."""
    raw = {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}], **more}
    row = parse_row(raw, "rows.jsonl:1", 0)
    tree = renderer.tree_row(row).tree
    assert tree is not None
    (completion,) = tree.completions
    trained = [i for i, counts in zip(completion.ids, completion.mask, strict=True) if counts]
    return renderer.tokenizer.decode(renderer.prompt_ids(row)), renderer.tokenizer.decode(trained)


QWEN3 = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("thinking", "asked", "trained"),
    [
        (False, QWEN3 + "<think>\n\n</think>\n\n", "A<|im_end|>"),
        (True, QWEN3, "<think>\n\n</think>\n\nA<|im_end|>"),
        (None, QWEN3, "<think>\n\n</think>\n\nA<|im_end|>"),  # Qwen3 thinks by default
    ],
)
def test_qwen3(thinking: bool | None, asked: str, trained: str, make_tokenizer: Any) -> None:
    """Its template writes an empty think block before the last answer; without thinking it belongs to the prompt."""
    renderer = Renderer(make_tokenizer(trl_template("qwen3"), bos=False), max_length=999, thinking=thinking)
    assert rendered(renderer) == (asked, trained)
    assert renderer.thinking_switch == "enable_thinking"


@pytest.mark.parametrize(
    ("thinking", "says"), [(True, "/think"), (False, "/no_think"), (None, "/think")], ids=["on", "off", "default"]
)
def test_a_template_that_sets_its_own_default(thinking: bool | None, says: str, make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(WITH_DEFAULT, bos=False), max_length=999, thinking=thinking)
    asked = f"<|im_start|>system\n{says}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(renderer) == (asked, "A<|im_end|>")


@pytest.mark.parametrize(("thinking", "block"), [(True, ""), (False, "</think>"), (None, "</think>")])
def test_the_switch_of_another_name(thinking: bool | None, block: str, make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(OTHER_NAME, bos=False), max_length=999, thinking=thinking)
    assert rendered(renderer) == (QWEN3 + block, "A<|im_end|>")
    assert renderer.thinking_switch == "thinking"


def test_a_rows_own_kwargs_win(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(trl_template("qwen3"), bos=False), max_length=999, thinking=False)
    asked, trained = rendered(renderer, chat_template_kwargs={"enable_thinking": True})
    assert asked == QWEN3
    assert trained == "<think>\n\n</think>\n\nA<|im_end|>"


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("qwen3_5_nothink", "enable_thinking"),
        ("gemma4_v5", "enable_thinking"),
        ("glm4moe", "enable_thinking"),
        ("qwen2_5", None),
        ("qwen3_instruct_2507", None),
        ("deepseek_r1_distill", None),
        ("lfm2_2_5_v2", None),  # has a variable `thinking`, which it sets itself
    ],
)
def test_which_templates_have_one(name: str, switch: str | None, make_tokenizer: Any) -> None:
    """TRL's copies of the families' templates."""
    tokenizer = make_tokenizer(trl_template(name), special=("<|im_start|>", "<|im_end|>", "<turn|>"))
    assert Renderer(tokenizer, max_length=999).thinking_switch == switch


@pytest.mark.parametrize(("thinking", "flag"), [(True, "--thinking"), (False, "--no-thinking")])
def test_no_switch(thinking: bool, flag: str, make_tokenizer: Any, chatml: str) -> None:
    with pytest.raises(UserError) as caught:
        Renderer(make_tokenizer(chatml), max_length=999, thinking=thinking)
    assert str(caught.value) == f"{flag}: the chat template (the model's own) has no switch for it; leave it out"
    renderer = Renderer(make_tokenizer(chatml), max_length=999, thinking=thinking, thinking_if_possible=True)
    assert rendered(renderer) == rendered(Renderer(make_tokenizer(chatml), max_length=999))
